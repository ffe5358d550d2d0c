"""Which tokens of a padded batch a mixer has to read."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayes_dispatch.model.mambaformer.compiled.switch import Array, token_counts

__all__ = ["Span"]


@dataclass(frozen=True, eq=False)
class Span:
    """Which tokens of a right-padded (B, T) batch are new, and how many came before.

    Attributes:
        tokens: real tokens of each row, (B,), or ``None`` where all T are real.
        before: tokens that the cached state has read already: one number for all rows, or one per row (B,).
        dropped: how many of those, after ``before``'s first ones, attention has forgotten; likewise.
    """

    tokens: Tensor | None = None
    before: int | Tensor = 0
    dropped: int | Tensor = 0

    @property
    def aligned(self) -> bool:
        """Whether no row is padded and all have read as many tokens."""
        return self.tokens is None and not isinstance(self.before, Tensor)

    def places(self, batch: int) -> tuple[Array, Array, Array]:
        """What compiled loops ask about a step of one token: new tokens, tokens held and position, (B,) each."""
        before = _per_row(self.before, batch)
        held = before if isinstance(self.dropped, int) and self.dropped == 0 else before - _per_row(self.dropped, batch)
        return token_counts(self.tokens, batch, 1), held, before

    def mask(self, length: int) -> Tensor | None:
        """(B, T), true where a token is real; ``None`` where all are."""
        if self.tokens is None:
            return None
        return torch.arange(length, device=self.tokens.device) < self.tokens[:, None]


def _per_row(number: int | Tensor, batch: int) -> Array:
    return number.numpy() if isinstance(number, Tensor) else np.full(batch, number)
