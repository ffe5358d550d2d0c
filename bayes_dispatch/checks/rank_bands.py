"""Simultaneous bands for the ECDF of uniform ranks (Säilynoja, Bürkner & Vehtari 2022, arXiv 2103.10522).

Of N ranks, each uniform on 0 … S, the number below j is Binomial(N, j / (S + 1)). A band of equal-tailed binomial
intervals at every j holds the whole ECDF with less than their probability; it is widened until it holds it with at
least the stated one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binom, poisson

from bayes_dispatch.errors import ConfigError

__all__ = ["RankBand", "rank_band"]

STEPS = 14  # of the bisection for the pointwise level, in its logarithm
NEGLIGIBLE = 1e-20


@dataclass(frozen=True, eq=False)
class RankBand:
    """A region that holds the whole ECDF of ``count`` uniform ranks with at least a given probability.

    Attributes:
        count: N, ranks.
        draws: S; ranks go from 0 to S.
        level: simultaneous probability, at least.
        points: ``(S,)`` j / (S + 1) for j = 1 … S: what the ECDF of uniform ranks is on average.
        lower, upper: ``(S,)`` ends of the band for the share of ranks below j, inclusive.
    """

    count: int
    draws: int
    level: float
    points: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    def contains(self, ecdf: Float[np.ndarray, " point"]) -> bool:
        """Whether an ECDF, the share of ranks below j for j = 1 … S, lies inside everywhere."""
        return bool(((self.lower <= ecdf) & (ecdf <= self.upper)).all())


def rank_band(count: int, draws: int, level: float = 0.95) -> RankBand:
    """The simultaneous band of the ECDF of uniform ranks; remembered by its arguments.

    Args:
        count: N, ranks.
        draws: S; ranks go from 0 to S.
        level: simultaneous probability; discreteness makes it slightly more.

    Returns:
        The band.

    Raises:
        ConfigError: fewer than one rank or draw, or a level outside 0 to 1.
    """
    if count < 1 or draws < 1:
        raise ConfigError(f"expected at least 1 rank and 1 draw, got {count} and {draws}")
    if not 0 < level < 1:
        raise ConfigError(f"expected a level between 0 and 1, got {level}")
    return _band(int(count), int(draws), float(level))


@lru_cache(maxsize=64)
def _band(count: int, draws: int, level: float) -> RankBand:
    points = np.arange(1, draws + 1) / (draws + 1)
    # Bonferroni's tail, (1 − level) / S, is small enough; the largest tail that holds the level is found by bisection.
    low, high = np.log((1 - level) / draws), 0.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if probability_inside(count, *_intervals(count, points, np.exp(middle))) >= level:
            low = middle
        else:
            high = middle
    lower, upper = (ends / count for ends in _intervals(count, points, np.exp(low)))
    for array in (points, lower, upper):
        array.setflags(write=False)
    return RankBand(count, draws, level, points, lower, upper)


def probability_inside(count: int, lower: Int[np.ndarray, " point"], upper: Int[np.ndarray, " point"]) -> float:
    """Probability that the number of uniform ranks below j is within ``lower[j-1] … upper[j-1]`` for every j = 1 … S.

    The numbers of each rank are independent Poisson variates given that they sum to ``count``, so the recursion over j
    is a convolution (Moscovich & Nadler 2017, doi:10.1016/j.spl.2016.11.027).
    """
    kernel = poisson.pmf(np.arange(count + 1), count / (len(lower) + 1))
    kernel = kernel[: np.flatnonzero(kernel > NEGLIGIBLE)[-1] + 1]
    state, start = np.ones(1), 0  # probability of each number so far, from ``start`` on
    for low, high in zip([*lower, count], [*upper, count], strict=True):
        following = np.convolve(state, kernel)[low - start : high - start + 1]
        state, start = np.pad(following, (0, high - low + 1 - len(following))), low
    return float(state[0] / poisson.pmf(count, count))


def _intervals(count: int, points: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Binomial intervals that leave out at most ``tail``, half on each side."""
    lower, upper = binom.ppf(tail / 2, count, points), binom.isf(tail / 2, count, points)
    return lower.astype(np.int64), upper.astype(np.int64)
