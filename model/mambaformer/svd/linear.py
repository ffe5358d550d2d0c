"""Matrices whose singular values can be scaled from call to call (Singular Value Fine-tuning, arXiv 2501.06252)."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.adaptation import Delta, MatrixScales, Scales, rows_of_ones
from bayes_dispatch.model.mambaformer.eager import eager
from bayes_dispatch.model.mambaformer.fingerprint import contents
from bayes_dispatch.model.mambaformer.products import Head, times
from bayes_dispatch.model.mambaformer.svd.factors import Factors, decompose

__all__ = ["SVDLinear", "SVDMatrix", "by_row", "matrices", "of_rows", "parts_of"]


class SVDMatrix(nn.Module):
    """``W(z) = U diag(s * z) Vᵀ``, applied without being built where that is cheaper.

    Where all scales of a row are 1 it is the stored W, to the last bit: recomposing it would move logits by 1e-5.

    The published implementation also multiplies by ``Σ s / Σ (s * z)``; we do not, so that blending scales is the same
    as blending the adapted matrices. Fewer scales than the rank are those of the largest singular values; the others
    stay as they are.

    Attributes:
        weight: W, shape (out_features, in_features); in the precision of the inputs, or less precise (``times``).
        rank: number of singular values, min(out_features, in_features).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)
        self.rank = min(in_features, out_features)
        self._factors: tuple[tuple[object, ...], Factors, object] | None = None  # of what, and when last looked at

    def product(
        self, x: Float[Tensor, "B T in_features"], scales: Scales | None = None
    ) -> Float[Tensor, "B T out_features"]:
        """``W(z) x``; without scales ``W x``, with the stored ``W`` itself.

        Args:
            x: inputs. scales: ``None``, one set (r,) for all rows, or one set per row (B, r), with r up to the rank; a
                delta is added to the product.

        Raises:
            TensorError: more scales than the rank, or for another number of rows.
        """
        if scales is None:
            return times(x, self.weight)
        z, delta = parts_of(scales)
        y = times(x, self.weight) if z is None else self._scaled(x, z)
        return y if delta is None else y + delta.to(x)(x)

    def _scaled(self, x: Tensor, scales: MatrixScales) -> Tensor:
        z, (U, s, Vt, _) = self.prepare(scales, x.shape[0])
        if len(s) < self.rank:
            change = s * (z - 1)
            return times(x, self.weight) + F.linear(F.linear(x, Vt) * of_rows(change), U)

        def scaled(x: Tensor, z: Tensor) -> Tensor:
            if z.ndim == 1 and self._folding_pays(x.shape[0] * x.shape[1]):
                return F.linear(x, (U * (s * z)) @ Vt)
            return F.linear(F.linear(x, Vt) * of_rows(s * z), U)

        return by_row(x, scales._replace(z=z), lambda x: times(x, self.weight), scaled)

    def prepare(self, scales: MatrixScales, rows: int) -> tuple[Tensor, Factors]:
        """The scales, on this device, and as many singular triples; ``TensorError`` unless for all rows or for each."""
        z = cast(Tensor, scales.z).to(self.weight.device)
        kinds, shape = ((self.rank,), (rows, self.rank)), tuple(z.shape)
        if shape[:-1] not in {kind[:-1] for kind in kinds} or not 1 <= shape[-1] <= self.rank:
            raise TensorError(f"expected scales of shape {kinds[0]} or {kinds[1]} or fewer of them, got {shape}")
        return z, self.factors(shape[-1], scales.weights, z.dtype)

    @eager  # it reads memory, and no graph can hold that
    def factors(self, rank: int | None = None, weights: object = None, dtype: torch.dtype | None = None) -> Factors:
        """The leading singular triples of the present weight, all by default; kept until it changes.

        Args:
            rank: how many. weights: where given and the same as at the latest call, the weight is not looked at.
            dtype: of the triples; ``None`` for the weight's, and float32 where that is less precise.
        """
        wanted = self.rank if rank is None else rank
        dtype = dtype or torch.promote_types(self.weight.dtype, torch.float32)
        kept = self._factors  # of which other threads may make another
        if kept is None or weights is None or kept[2] is not weights or not kept[1].hold(wanted, dtype):
            key = self._key()
            if kept is not None and kept[0] == key and kept[1].hold(wanted, dtype):
                found = kept[1]
            else:
                with torch.inference_mode(False):  # they stay, and may be trained through later
                    found = decompose(self.weight.detach().to(dtype, copy=True), wanted)
            kept = self._factors = key, found, weights
        return kept[1].leading(wanted, dtype)

    def keep_factors(self, factors: Factors) -> None:
        """Take these for the present weight's."""
        self._factors = (self._key(), factors, None)

    def folded(
        self, scales: Float[Tensor, " r"] | None, delta: Delta | None = None, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "out in"]:
        """W(z), and a delta for all rows, as one matrix; ``dtype`` as for ``factors``."""
        dtype = dtype or torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.weight.to(dtype)
        if scales is not None:
            U, s, Vt, _ = self.factors(scales.shape[-1], dtype=dtype)
            weight = weight + (U * (s * (scales - 1))) @ Vt
        if delta is not None:
            up, down, c = delta.to(weight)
            weight = weight + (up * c.reshape(-1)) @ down
        return weight

    def _key(self) -> tuple[object, ...]:
        return contents([self.weight]), self.weight.dtype, self.weight.device

    def _folding_pays(self, tokens: int) -> bool:
        """Whether building W(z) once takes fewer multiplications than two factored products for each token."""
        out_features, in_features = self.weight.shape
        folded = (self.rank + tokens) * out_features * in_features
        return folded < tokens * self.rank * (out_features + in_features)


class SVDLinear(SVDMatrix):
    """A linear map: ``y = W(z) x``, and its bias where it has one."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(
        self, x: Float[Tensor, "B T in_features"], scales: Scales | None = None
    ) -> Float[Tensor, "B T out_features"]:
        """``product`` and the bias: arguments and errors are those of ``product``."""
        y = self.product(x, scales)
        return y if self.bias is None else y + self.bias


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """The weights of large products, by the name of the parameter: what may be kept in another precision."""
    large = (SVDMatrix, Head)
    return {f"{name}.weight": part.weight for name, part in module.named_modules() if isinstance(part, large)}


def parts_of(scales: Scales) -> tuple[MatrixScales | None, Delta | None]:
    """Scales that there are, and what is added."""
    if not isinstance(scales, MatrixScales):
        return MatrixScales(scales), None
    return None if scales.z is None else scales, scales.delta


def by_row(
    x: Tensor, scales: MatrixScales, plain: Callable[[Tensor], Tensor], scaled: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``plain`` of the rows of ``x`` whose scales are all 1, and ``scaled`` of the others with theirs.

    Where gradients flow through the scales, or a compiler traces, all rows are ``scaled``.
    """
    z = cast(Tensor, scales.z)
    if torch.compiler.is_compiling() or (z.requires_grad and torch.is_grad_enabled()):
        return scaled(x, z)
    ones = rows_of_ones(z) if scales.ones is None else scales.ones
    if isinstance(ones, bool):
        return plain(x) if ones else scaled(x, z)
    y = scaled(x, z)  # of all: to move the other rows would take longer
    y[ones] = plain(x[ones]).to(y.dtype)
    return y


def of_rows(values: Tensor) -> Tensor:
    """Per-row values (B, r) as (B, 1, r); shared ones as they are."""
    return values if values.ndim == 1 else values[:, None]
