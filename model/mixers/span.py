"""Which tokens of a padded batch a mixer has to read."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Span"]


@dataclass(frozen=True, eq=False)
class Span:
    """Which tokens of a right-padded (B, T) batch are new.

    Attributes:
        tokens: real tokens of each row, (B,), or ``None`` where all T are real.
        before: tokens of each row that its cached state has read already, (B,).
        aligned: ``before`` is the same number for all rows, and no row is padded.
    """

    tokens: Tensor | None
    before: Tensor
    aligned: bool

    def mask(self, length: int) -> Tensor | None:
        """(B, T), true where a token is real; ``None`` where all are."""
        return None if self.tokens is None else torch.arange(length, device=self.tokens.device) < self.tokens[:, None]
