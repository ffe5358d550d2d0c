"""Which tokens of a padded batch a mixer has to read."""

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def mask(self, length: int) -> Tensor | None:
        """(B, T), true where a token is real; ``None`` where all are."""
        if self.tokens is None:
            return None
        return torch.arange(length, device=self.tokens.device) < self.tokens[:, None]
