"""Singular value decompositions of a model's matrices: exact or randomised, and kept on disk beside the model."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.errors import ConfigError

__all__ = ["Factors", "decompose"]

LARGE = 1024  # of the smaller side; above, a leading part is found by random projections
OVERSAMPLING, POWER_ITERATIONS = 16, 8


class Factors(NamedTuple):
    """The leading singular triples of a matrix W (out, in).

    Attributes:
        U: (out, r). s: (r,), falling. Vt: (r, in).
        error: the largest ``|W v - s u|`` or ``|Wᵀ u - s v|`` of a triple over the largest singular value; of exact
            triples it is rounding alone.
    """

    U: Float[Tensor, "out r"]
    s: Float[Tensor, " r"]
    Vt: Float[Tensor, "r in"]
    error: float

    def hold(self, rank: int, dtype: torch.dtype) -> bool:
        """Whether these are as many triples, and no less precise."""
        return rank <= len(self.s) and torch.promote_types(self.s.dtype, dtype) == self.s.dtype

    def leading(self, rank: int, dtype: torch.dtype) -> "Factors":
        """The first ``rank`` triples, in this precision."""
        if rank == len(self.s) and dtype == self.s.dtype:
            return self
        return Factors(self.U[:, :rank].to(dtype), self.s[:rank].to(dtype), self.Vt[:rank].to(dtype), self.error)


@torch.no_grad()
def decompose(weight: Float[Tensor, "out in"], rank: int | None = None) -> Factors:
    """The leading ``rank`` singular triples, all by default, in the precision of ``weight``.

    Of a large matrix a small part is found by random projections with power iterations, always the same ones (Halko,
    Martinsson and Tropp 2011); everything else is exact, computed in float64.

    Raises:
        ConfigError: a rank below 1 or above that of the matrix.
    """
    full = min(weight.shape)
    rank = full if rank is None else rank
    if not 1 <= rank <= full:
        raise ConfigError(f"expected a rank of 1 to {full}, got {rank}")
    if full > LARGE and 4 * rank <= full:
        from sklearn.utils.extmath import randomized_svd  # takes a second to import, and large matrices are rare

        full_precision = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
        more = {"n_oversamples": OVERSAMPLING, "n_iter": POWER_ITERATIONS, "random_state": 0}
        U, s, Vt = (torch.from_numpy(part) for part in randomized_svd(full_precision.cpu().numpy(), rank, **more))
    else:
        U, s, Vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    U, s, Vt = (factor.to(weight).contiguous() for factor in (U[:, :rank], s[:rank], Vt[:rank]))
    missed = torch.maximum((weight @ Vt.T - U * s).norm(dim=0).max(), (weight.T @ U - Vt.T * s).norm(dim=0).max())
    return Factors(U, s, Vt, float(missed / s[0].clamp(min=1e-30)))
