"""Matrices whose singular values can be scaled from call to call (Singular Value Fine-tuning, arXiv 2501.06252)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.mambaformer.fingerprint import contents
from bayes_dispatch.model.mambaformer.svd.factors import Factors, decompose

__all__ = ["SVDLinear", "SVDMatrix", "by_row", "of_rows"]


class SVDMatrix(nn.Module):
    """``W(z) = U diag(s * z) Vᵀ``, applied without being built where that is cheaper.

    Where all scales of a row are 1 it is the stored W, to the last bit: recomposing it would move logits by 1e-5.

    The published implementation also multiplies by ``Σ s / Σ (s * z)``; we do not, so that blending scales is the same
    as blending the adapted matrices. Fewer scales than the rank are those of the largest singular values; the others
    stay as they are.

    Attributes:
        weight: W, shape (out_features, in_features).
        rank: number of singular values, min(out_features, in_features).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)
        self.rank = min(in_features, out_features)
        self._factors: tuple[tuple[object, ...], Factors] | None = None

    def product(
        self, x: Float[Tensor, "B T in_features"], scales: Float[Tensor, "*B r"] | None = None
    ) -> Float[Tensor, "B T out_features"]:
        """``W(z) x``; without scales ``W x``, with the stored ``W`` itself.

        Args:
            x: inputs. scales: ``None``, one set (r,) for all rows, or one set per row (B, r), with r up to the rank.

        Raises:
            TensorError: more scales than the rank, or for another number of rows.
        """
        if scales is None:
            return F.linear(x, self.weight)
        self.check_scales(scales, x.shape[0])
        U, s, Vt, _ = self.factors(scales.shape[-1])
        if len(s) < self.rank:
            change = s * (scales - 1)
            return F.linear(x, self.weight) + F.linear(F.linear(x, Vt) * of_rows(change), U)

        def scaled(x: Tensor, z: Tensor) -> Tensor:
            if z.ndim == 1 and self._folding_pays(x.shape[0] * x.shape[1]):
                return F.linear(x, (U * (s * z)) @ Vt)
            return F.linear(F.linear(x, Vt) * of_rows(s * z), U)

        return by_row(x, scales, lambda x: F.linear(x, self.weight), scaled)

    def check_scales(self, scales: Tensor, rows: int) -> None:
        """Raise ``TensorError`` unless these are scales for all rows, or for each of them."""
        kinds = ((self.rank,), (rows, self.rank))
        if scales.shape[:-1] not in {kind[:-1] for kind in kinds} or not 1 <= scales.shape[-1] <= self.rank:
            expected = " or ".join(map(str, kinds))
            raise TensorError(f"expected scales of shape {expected} or fewer of them, got {tuple(scales.shape)}")

    def factors(self, rank: int | None = None) -> Factors:
        """The leading singular triples of the present weight, all by default; kept until it changes."""
        wanted, key = self.rank if rank is None else rank, self._key()
        kept = self._factors  # of which other threads may make another
        if kept is None or kept[0] != key or len(kept[1].s) < wanted:
            with torch.inference_mode(False):  # they stay, and may be trained through later
                kept = self._factors = key, decompose(self.weight.detach().clone(), wanted)
        return kept[1].leading(wanted)

    def keep_factors(self, factors: Factors) -> None:
        """Take these for the present weight's."""
        self._factors = (self._key(), factors)

    def folded(self, scales: Float[Tensor, " r"]) -> Float[Tensor, "out_features in_features"]:
        """W(z) itself."""
        U, s, Vt, _ = self.factors(scales.shape[-1])
        return self.weight + (U * (s * (scales - 1))) @ Vt

    def _key(self) -> tuple[object, ...]:
        return contents([self.weight]), self.weight.dtype, self.weight.device

    def _folding_pays(self, tokens: int) -> bool:
        """Whether building W(z) once takes fewer multiplications than two factored products for each token."""
        out_features, in_features = self.weight.shape
        folded = (self.rank + tokens) * out_features * in_features
        return folded < tokens * self.rank * (out_features + in_features)


class SVDLinear(SVDMatrix):
    """A linear map: ``y = W(z) x``."""

    def forward(
        self, x: Float[Tensor, "B T in_features"], scales: Float[Tensor, "*B r"] | None = None
    ) -> Float[Tensor, "B T out_features"]:
        """``product``: arguments and errors are its own."""
        return self.product(x, scales)


def by_row(
    x: Tensor, scales: Tensor, plain: Callable[[Tensor], Tensor], scaled: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``plain`` of the rows of ``x`` whose scales are all 1, and ``scaled`` of the others with theirs.

    Where gradients flow through the scales, or a compiler traces, all rows are ``scaled``.
    """
    if torch.compiler.is_compiling() or (scales.requires_grad and torch.is_grad_enabled()):
        return scaled(x, scales)
    ones = (scales == 1).all(dim=-1)
    if not bool(ones.any()):
        return scaled(x, scales)
    if bool(ones.all()):
        return plain(x)
    y = scaled(x, scales)  # of all: to move the other rows would take longer
    y[ones] = plain(x[ones]).to(y.dtype)
    return y


def of_rows(values: Tensor) -> Tensor:
    """Per-row values (B, r) as (B, 1, r); shared ones as they are."""
    return values if values.ndim == 1 else values[:, None]
