"""The noise temper τ: how much wider the views' noise is than a prompt's tokens, taken one by one, would have it.

Views are not independent given the weights, nor is a prompt quite what training prompts were. So prompts of known
weights choose τ, by the posterior density of these weights among all of the components that share the prompt: a proper
score, which a posterior that is too narrow loses by as well as one that is too wide. That others may share it is left
out: the narrowest noise tells best who does, at whatever width of the intervals. Prompts of the fit itself fit too
well, so τ is never below 1. It goes with the globals: where known weights move these, τ is chosen anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import logsumexp

from bayes_dispatch.dispatcher.arrays import on_simplex
from bayes_dispatch.dispatcher.exact.quadrature import Quadrature
from bayes_dispatch.dispatcher.exact.supports import largest_weights
from bayes_dispatch.dispatcher.program.observed import Prompts

__all__ = ["FEWEST", "KnownPrompts", "choose_temper"]

TEMPERS = np.geomspace(1.0, 8.0, 7)
JUDGED = 1000  # mixed prompts of a fit that choose τ, at most: it varies by a third between samples of 150
FEWEST = 30  # of them, below which pure ones are joined; and known prompts, below which a temper stays as it is
POINTS = 256  # other weights of the same components, that the own are compared with


def choose_temper(
    quadrature: Quadrature,
    known: KnownPrompts,
    random: np.random.Generator,
    judged: int = JUDGED,
) -> float:
    """The τ, from 1 to 8, under which weights of known prompts are likeliest; 1 where none are known.

    Args:
        quadrature: of the fitted program. known: prompts with features as noisy as those of new ones.
        random: chooses among prompts, and among weights.
        judged: prompts that are asked, at most.
    """
    prompts, weights = known.judged(random, judged)
    if not len(weights):
        return 1.0
    supports, own = largest_weights(weights[:, None])
    others = np.where(own > 0, random.standard_exponential((POINTS, supports.shape[2])), 0.0)
    points = on_simplex(np.concatenate([own, others], axis=1))
    supports = supports.repeat(1 + POINTS, axis=1)

    def score(temper: float) -> float:
        density = quadrature.at(temper).log_density(prompts, supports, points)
        return float(np.mean(density[:, 0] - logsumexp(density, axis=1)))

    scores = np.array([score(temper) for temper in TEMPERS])
    best, logs = int(scores.argmax()), np.log(TEMPERS)
    if best in (0, len(scores) - 1):
        return float(TEMPERS[best])
    bend, slope, _ = np.polyfit(logs[best - 1 : best + 2], scores[best - 1 : best + 2], 2)
    return float(np.exp(-slope / (2 * bend)))


@dataclass(frozen=True, eq=False)
class KnownPrompts:
    """Prompts, some of which are of known weights.

    Args:
        prompts: every view observed (missing rows masked).
        weights: ``(N, K+1)``, one-hot for pure prompts, NaN rows where unknown.
        of: ``(N,)``, see ``distinct_rows``; no two are the same by default.
    """

    prompts: Prompts
    weights: np.ndarray
    of: np.ndarray | None = None

    @cached_property
    def parts(self) -> list[Int[np.ndarray, " copy"]]:
        """Rows of known weights; copies of a prompt are together."""
        rows = np.flatnonzero(np.isfinite(self.weights).all(1))
        if self.of is None:
            return list(rows[:, None])
        order = rows[np.argsort(self.of[rows], kind="stable")]
        return np.split(order, np.flatnonzero(np.diff(self.of[order])) + 1) if len(rows) else []

    @property
    def tell(self) -> bool:
        """Whether they are enough to tell what globals should be."""
        return len(self.parts) >= FEWEST

    @cached_property
    def groups(self) -> tuple[Int[np.ndarray, " pure"], Int[np.ndarray, " mixed"]]:
        """Rows of pure prompts, and of mixed ones."""
        top = np.nan_to_num(self.weights).max(1)
        return np.flatnonzero(top == 1), np.flatnonzero((top > 0) & (top < 1))

    def judged(self, random: np.random.Generator, most: int) -> tuple[Prompts, Float[np.ndarray, "prompt weight"]]:
        """Some mixed prompts, or concatenations of pure ones, no more than these where those suffice, with weights."""
        pure, mixed = self.groups
        rows = random.permutation(mixed)[:most]
        prompts, weights = self.prompts.select(torch.from_numpy(rows)), self.weights[rows]
        if len(rows) >= FEWEST or len(pure) < 2:
            return prompts, weights
        wanted = max(FEWEST, min(most, len(pure)))
        joined, of_joined = self.concatenate(wanted - len(rows), random)
        return Prompts.concatenate([prompts, joined]), np.concatenate([weights, of_joined])

    def concatenate(
        self, count: int, random: np.random.Generator
    ) -> tuple[Prompts, Float[np.ndarray, "prompt weight"]]:
        """``count`` concatenations of two or three pure prompts, where possible no longer than the longest prompt.

        They have the mean of pooled features by length, and the sum of counts. Prompts of unknown length are joined
        where there are no others: then all are as long.
        """
        prompts, pure = self.prompts, torch.from_numpy(self.groups[0])
        measured = pure[prompts.lengths[pure] > 0]
        pure = measured if len(measured) > 1 else pure
        longest = max(float(prompts.lengths.max()), 1.0)
        pieces = pure[torch.from_numpy(random.integers(len(pure), size=(8 * count, 3)))]
        sizes = prompts.lengths[pieces].clamp(min=1.0)
        sizes[torch.from_numpy(random.random(len(pieces)) < 0.7), 2] = 0.0
        fits = sizes.sum(-1) <= longest
        chosen = torch.argsort(fits.int(), descending=True, stable=True)[:count]
        pieces, sizes = pieces[chosen], sizes[chosen]
        shares = (sizes / sizes.sum(-1, keepdim=True)).unsqueeze(-1)  # (n, 3, 1)
        used = sizes > 0
        unknown = ((prompts.lengths[pieces] == 0) & used).any(-1)
        lengths = sizes.sum(-1).masked_fill(unknown, 0.0)
        missing = {name: (mask[pieces] & used).any(-1) for name, mask in prompts.missing.items()}
        observed = {
            name: (values[pieces] * (used.unsqueeze(-1) if name in prompts.totals else shares)).sum(1)
            for name, values in prompts.observed.items()
        }
        totals = {name: (values[pieces] * used).sum(-1) for name, values in prompts.totals.items()}
        weights = (torch.from_numpy(self.weights)[pieces] * shares).sum(1).numpy()
        return Prompts(lengths, totals, missing, observed), weights
