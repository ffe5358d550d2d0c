"""Real prompts of known weights as training pairs of the guide: pure ones, known mixtures, and concatenations of pure
ones.

A concatenation of pieces has their byte-weighted mean of pooled features and the sum of their counts. Exact zeros
count as weights below the guide's resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.dispatcher.program.observed import Prompts

__all__ = ["RealPrompts"]


@dataclass(frozen=True, eq=False)
class RealPrompts:
    """A source of real ``(prompts, weights)`` pairs.

    Args:
        prompts: the real prompts, every view observed (missing rows masked).
        weights: ``(N, K+1)`` known weights, one-hot for pure prompts, NaN rows where unknown.
    """

    prompts: Prompts
    weights: Tensor

    @cached_property
    def groups(self) -> tuple[Int[Tensor, " pure"], Int[Tensor, " mixed"]]:
        """Rows of pure and of mixed prompts."""
        top = self.weights.nan_to_num().max(-1).values
        return (top == 1).nonzero().squeeze(-1), ((top > 0) & (top < 1)).nonzero().squeeze(-1)

    @cached_property
    def _longest(self) -> float:
        return max(float(self.prompts.lengths.max()), 1.0)

    def __call__(self, count: int) -> tuple[Prompts, Float[Tensor, "prompt weight"]]:
        """Draw ``count`` prompts with torch's generator, equally pure, mixed and concatenated where there are any."""
        pure, mixed = self.groups
        sources = [rows for rows in (pure, mixed) if len(rows)]
        share = count // (len(sources) + bool(len(pure)))
        rows = torch.cat([rows[torch.randint(len(rows), (share,))] for rows in sources])
        taken = self.prompts.select(rows).unlabelled(), self.weights[rows]
        if not len(pure):
            return taken
        joined = self.concatenate(count - len(rows))
        return Prompts.concatenate([taken[0], joined[0]]), torch.cat([taken[1], joined[1]])

    def concatenate(self, count: int) -> tuple[Prompts, Float[Tensor, "prompt weight"]]:
        """``count`` concatenations of two or three pure prompts, where possible no longer than the longest prompt."""
        pure, _ = self.groups
        pieces = pure[torch.randint(len(pure), (8 * count, 3))]  # (8n, 3)
        sizes = self.prompts.lengths[pieces].clamp(min=1.0)
        sizes[torch.rand(len(pieces)) < 0.7, 2] = 0.0
        fits = sizes.sum(-1) <= self._longest
        chosen = torch.argsort(fits.int(), descending=True, stable=True)[:count]
        pieces, sizes = pieces[chosen], sizes[chosen]
        shares = (sizes / sizes.sum(-1, keepdim=True)).unsqueeze(-1)  # (n, 3, 1)
        used = sizes > 0
        prompts = self.prompts
        unknown = ((prompts.lengths[pieces] == 0) & used).any(-1)
        lengths = torch.where(unknown, torch.zeros(()), sizes.sum(-1))
        missing = {name: (mask[pieces] & used).any(-1) for name, mask in prompts.missing.items()}
        observed = {
            name: (values[pieces] * (used.unsqueeze(-1) if name in prompts.totals else shares)).sum(1)
            for name, values in prompts.observed.items()
        }
        totals = {name: (values[pieces] * used).sum(-1) for name, values in prompts.totals.items()}
        return Prompts(lengths, totals, missing, observed), (self.weights[pieces] * shares).sum(1)
