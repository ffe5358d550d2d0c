"""A token embedding whose singular values can be scaled: what the first block reads, and the head where it is tied."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bayes_dispatch.model.adaptation import MatrixScales, Scales
from bayes_dispatch.model.mambaformer.svd.linear import SVDMatrix, by_row, of_rows, parts_of

__all__ = ["EMBEDDING", "SVDEmbedding"]

EMBEDDING = "embedding"  # its name in an adaptation


class SVDEmbedding(SVDMatrix):
    """Rows of ``E(z) = U diag(s * z) Vᵀ`` (V, D) by token; ``product`` is the head that is tied to them.

    With scales per row of the batch no E(z) is built: row b of it all is ``(U[token] * s * z_b) Vᵀ``.
    """

    def __init__(self, vocab_size: int, width: int, multiplier: float = 1.0) -> None:
        super().__init__(width, vocab_size)
        nn.init.normal_(self.weight, std=0.02)
        self.multiplier = multiplier  # of what is read, not of the head

    def forward(
        self, ids: Int[Tensor, "B T"], scales: Scales | None = None, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "B T width"]:
        """The embeddings of tokens.

        Args:
            ids: tokens. scales: ``None`` for the stored rows themselves, one set (r,) for all rows of the batch, or one
                set per row (B, r), with r up to the rank. dtype: of what is read; ``None`` for that of the weight.

        Raises:
            TensorError: more scales than the rank, or for another number of rows.
        """
        dtype = dtype or self.weight.dtype
        own, delta = (None, None) if scales is None else parts_of(scales)
        x = self._stored(ids, dtype) if own is None else self._scaled_rows(ids, own, dtype)
        if delta is not None:
            up, down, c = delta.to(x)
            x = x + (F.embedding(ids, up) * of_rows(c)) @ down
        return x if self.multiplier == 1 else x * self.multiplier

    def _stored(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight).to(dtype)

    def _scaled_rows(self, ids: Tensor, scales: MatrixScales, dtype: torch.dtype) -> Tensor:
        z, (U, s, Vt, _) = self.prepare(scales, ids.shape[0])
        if len(s) < self.rank:
            return self._stored(ids, dtype) + (F.embedding(ids, U) * of_rows(s * (z - 1))) @ Vt

        def scaled(ids: Tensor, z: Tensor) -> Tensor:
            if z.ndim == 1 and ids.numel() > len(U):  # more tokens than rows of E
                return F.embedding(ids, (U * (s * z)) @ Vt)
            return (F.embedding(ids, U) * of_rows(s * z)) @ Vt

        return by_row(ids, scales._replace(z=z), lambda ids: self._stored(ids, dtype), scaled)
