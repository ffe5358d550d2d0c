"""A linear map whose singular values can be scaled from call to call (Singular Value Fine-tuning, arXiv 2501.06252)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.errors import TensorError

__all__ = ["SVDLinear"]


class SVDLinear(nn.Module):
    """``y = W(z) x`` with ``W(z) = U diag(s * z) Vᵀ``; without scales, ``y = W x`` with the stored ``W`` itself.

    The published implementation also multiplies by ``Σ s / Σ (s * z)``; we do not, so that blending scales is the same
    as blending the adapted matrices.

    Attributes:
        weight: W, shape (out_features, in_features).
        rank: number of singular values, min(out_features, in_features).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)
        self.rank = min(in_features, out_features)
        self._factors: tuple[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] | None = None

    def forward(
        self, x: Float[Tensor, "B T in_features"], scales: Float[Tensor, "*B r"] | None = None
    ) -> Float[Tensor, "B T out_features"]:
        """Apply the map.

        Args:
            x: inputs. scales: ``None``, one set (rank,) for all rows, or one set per row (B, rank).

        Raises:
            TensorError: scales of another rank, or for another number of rows.
        """
        if scales is None:
            return F.linear(x, self.weight)
        if scales.shape not in ((self.rank,), (x.shape[0], self.rank)):
            expected = f"({self.rank},) or ({x.shape[0]}, {self.rank})"
            raise TensorError(f"expected scales of shape {expected}, got {tuple(scales.shape)}")
        U, s, Vt = self.factors()
        if scales.ndim == 1 and self._folding_pays(x.shape[0] * x.shape[1]):
            return F.linear(x, (U * (s * scales)) @ Vt)
        scaled = s * scales
        return F.linear(F.linear(x, Vt) * (scaled if scales.ndim == 1 else scaled[:, None]), U)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, rank), s (rank,), Vᵀ (rank, in) of the present weight, computed in float64, kept until it changes."""
        W = self.weight
        key = (-1 if W.is_inference() else W._version, W.data_ptr(), W.dtype, W.device)
        if self._factors is None or self._factors[0] != key:
            with torch.inference_mode(False):  # they stay, and may be trained through later
                U, s, Vt = torch.linalg.svd(W.detach().double(), full_matrices=False)
                self._factors = (key, tuple(factor.to(W.dtype).contiguous() for factor in (U, s, Vt)))
        return self._factors[1]

    def _folding_pays(self, tokens: int) -> bool:
        """Whether building W(z) once takes fewer multiplications than two factored products for each token."""
        out_features, in_features = self.weight.shape
        folded = (self.rank + tokens) * out_features * in_features
        return folded < tokens * self.rank * (out_features + in_features)
