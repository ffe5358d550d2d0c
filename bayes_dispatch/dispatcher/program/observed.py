"""Evidence of prompts as the generative program's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["AT_ONCE", "Prompts"]

AT_ONCE = 32  # prompts whose posteriors are in memory together


@dataclass(frozen=True, eq=False)
class Prompts:
    """Evidence of N prompts as tensors, masked where missing.

    Args:
        lengths: ``(N,)`` tokens, 0 where unknown.
        totals: by view of counts ``(N,)``, their sum (0 where missing).
        missing: by view ``(N,)`` bool.
        observed: by view ``(N, ·)``; a view that is not here is drawn from the program.
        labels: ``(N,)`` expert index, −1 where unknown; ``None`` for none.
        known: ``(N, K+1)`` known weights, NaN rows where unknown; ``None`` for none.
    """

    lengths: Float[Tensor, " prompt"]
    totals: Mapping[str, Float[Tensor, " prompt"]]
    missing: Mapping[str, Bool[Tensor, " prompt"]]
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Int[Tensor, " prompt"] | None = None
    known: Float[Tensor, "prompt weight"] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, dtype: torch.dtype) -> Prompts:
        """The same evidence in another floating-point type, without labels and known weights."""
        totals = {name: values.to(dtype) for name, values in self.totals.items()}
        observed = {name: values.to(dtype) for name, values in self.observed.items()}
        return Prompts(self.lengths.to(dtype), totals, self.missing, observed)

    def blank(self) -> Prompts:
        """The same lengths, totals and missing views, nothing observed."""
        return Prompts(self.lengths, self.totals, self.missing)

    def select(self, rows: Tensor) -> Prompts:
        """The prompts at ``rows`` (integer or bool tensor)."""
        return Prompts(
            self.lengths[rows],
            {name: values[rows] for name, values in self.totals.items()},
            {name: mask[rows] for name, mask in self.missing.items()},
            {name: values[rows] for name, values in self.observed.items()},
            None if self.labels is None else self.labels[rows],
            None if self.known is None else self.known[rows],
        )

    def pieces(self) -> Iterator[Prompts]:
        """All prompts in order, a few at a time; of none, one empty piece.

        Posteriors of many are long where one of them is vague: what is asked of each prompt is asked piece by piece.
        """
        return (self.select(rows) for rows in torch.arange(len(self), device=self.lengths.device).split(AT_ONCE))

    @classmethod
    def concatenate(cls, parts: Sequence[Prompts]) -> Prompts:
        """The prompts of several sets with the same views, in order, without labels and known weights."""
        first = parts[0]
        return cls(
            torch.cat([p.lengths for p in parts]),
            {name: torch.cat([p.totals[name] for p in parts]) for name in first.totals},
            {name: torch.cat([p.missing[name] for p in parts]) for name in first.missing},
            {name: torch.cat([p.observed[name] for p in parts]) for name in first.observed},
        )
