"""Simulation-based calibration: true weights rank uniformly among independent draws of an exact posterior.

Talts et al. 2018 (arXiv 1804.06788) for the ranks; Säilynoja, Bürkner & Vehtari 2022 (arXiv 2103.10522) for the bands
that hold the whole ECDF of uniform ranks. arviz has them too, but by other means from version to version, and from 1.0
on by simulation and for values without ties; those here are exact for ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binom, poisson

from bayes_dispatch.arguments import fraction, real, whole
from bayes_dispatch.arguments import seed as a_seed
from bayes_dispatch.dispatcher.arrays import as_points, short_repr
from bayes_dispatch.dispatcher.exact.cells import RESOLUTION
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import TensorError

__all__ = [
    "RankUniformity",
    "SimulationBasedCalibration",
    "Simulator",
    "posterior_ranks",
    "rank_uniformity",
    "simulation_based_calibration",
    "true_weights",
]

STEPS = 14  # of the bisection for the pointwise level, in its logarithm
NEGLIGIBLE = 1e-20


@runtime_checkable
class Simulator(Protocol):
    """What draws prompts from its own program and infers their weights; a ``Dispatcher`` does."""

    def simulate(self, count: int, draws: int, seed: int) -> tuple[np.ndarray, DispatchPosterior]: ...


@dataclass(frozen=True, eq=False)
class RankUniformity:
    """Whether the ranks of one component look uniform.

    Attributes:
        component: its name.
        points: ``(S,)`` j / (S + 1) for j = 1 … S: what the ECDF of uniform ranks is on average.
        ecdf: ``(S,)`` share of ranks below j.
        lower, upper: ``(S,)`` ends of the band that holds the whole ECDF of uniform ranks.
    """

    component: str
    points: np.ndarray
    ecdf: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    __repr__ = short_repr

    @property
    def inside(self) -> bool:
        """Whether the ECDF lies inside the band everywhere."""
        return self.excess == 0

    @property
    def excess(self) -> float:
        """How far the ECDF leaves the band at most; 0 inside."""
        return float(np.maximum(np.maximum(self.lower - self.ecdf, self.ecdf - self.upper), 0).max())


@dataclass(frozen=True, eq=False)
class SimulationBasedCalibration:
    """Ranks of true weights among posterior draws, and a verdict for each component.

    Attributes:
        components: one for each expert, base last.
        ranks: ``(N, K+1)`` from 0 to ``draws``.
        draws: posterior draws of each simulation.
        false_alarm_rate: an exact posterior fails in any component with at most this probability.
    """

    components: tuple[RankUniformity, ...]
    ranks: np.ndarray
    draws: int
    false_alarm_rate: float
    __repr__ = short_repr

    @property
    def passed(self) -> bool:
        """Whether every component is inside its band."""
        return all(component.inside for component in self.components)


def true_weights(
    posterior: DispatchPosterior, truth: Float[np.ndarray, "prompt weight"]
) -> Float[np.ndarray, "prompt weight"]:
    """``(N, K+1)`` what the weights of a posterior's prompts are.

    Raises:
        TensorError: weights of another shape, or off the simplex.
    """
    found = as_points(truth, "true weights")
    if found.shape != posterior.weights.shape[1:]:
        raise TensorError(f"expected true weights of shape {posterior.weights.shape[1:]}, got {found.shape}")
    return found


def posterior_ranks(
    posterior: DispatchPosterior,
    truth: Float[np.ndarray, "prompt weight"],
    seed: int = 0,
    resolution: float = RESOLUTION,
) -> Int[np.ndarray, "prompt weight"]:
    """Rank of each true weight: how many draws lie below it, ties in random order.

    Args:
        posterior: independent draws ``(S, N, K+1)``.
        truth: ``(N, K+1)`` true weights, rows on the simplex.
        seed: of the order of ties.
        resolution: weights nearer to 0 or 1 than this are ties. The truth is often known in float32, the draws in
            float64: without it a float32 weight of 1 would exceed every draw.

    Returns:
        ``(N, K+1)`` ranks from 0 to S.

    Raises:
        TensorError: truth of another shape, or off the simplex.
        ConfigError: a negative seed, or a resolution outside 0 to .5.
    """
    truth = true_weights(posterior, truth)
    resolution, seed = real("resolution", resolution, 0, 0.5), a_seed(seed)
    draws, truth = (np.clip(weights, resolution, 1 - resolution) for weights in (posterior.weights, truth))
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)  # (N, K+1)
    return below + np.random.default_rng(seed).integers(0, ties, endpoint=True)


def rank_uniformity(
    ranks: Int[np.ndarray, "prompt weight"], draws: int, components: Sequence[str], false_alarm_rate: float = 0.05
) -> SimulationBasedCalibration:
    """Hold the ECDF of each component's ranks against its simultaneous band.

    The rate is shared out by Bonferroni: each of the K+1 bands has level ``1 − false_alarm_rate / (K+1)``.

    Args:
        ranks: ``(N, K+1)`` from 0 to ``draws``, rows independent.
        draws: S, posterior draws that each rank was taken among.
        components: K+1 names.
        false_alarm_rate: probability, at most, that uniform ranks fail in any component.

    Returns:
        The verdicts.

    Raises:
        TensorError: no ranks, other than integers from 0 to S, or another number of columns than names.
        ConfigError: fewer than one draw, or a rate outside 0 to 1.
    """
    ranks = np.asarray(ranks)
    draws, false_alarm_rate = whole("draws", draws, 1), fraction("a false-alarm rate", false_alarm_rate)
    if ranks.ndim != 2 or len(ranks) == 0 or ranks.shape[1] != len(components) or not len(components):
        raise TensorError(f"expected ranks of shape (N, {len(components)}), N ≥ 1, got shape {ranks.shape}")
    if not np.issubdtype(ranks.dtype, np.integer) or ranks.min() < 0 or ranks.max() > draws:
        raise TensorError(
            f"expected integer ranks from 0 to {draws}, got {ranks.dtype} from {ranks.min()} to {ranks.max()}"
        )
    points = np.arange(1, draws + 1) / (draws + 1)
    lower, upper = rank_band(len(ranks), draws, 1 - false_alarm_rate / len(components))
    verdicts = []
    for name, column in zip(components, ranks.T, strict=True):
        ecdf = np.bincount(column, minlength=draws + 1).cumsum()[:-1] / len(ranks)
        verdicts.append(RankUniformity(name, points, ecdf, lower / len(ranks), upper / len(ranks)))
    return SimulationBasedCalibration(tuple(verdicts), ranks, draws, false_alarm_rate)


def simulation_based_calibration(
    dispatcher: Simulator,
    count: int = 1_000,
    draws: int = 255,
    seed: int = 0,
    false_alarm_rate: float = 0.05,
    resolution: float = RESOLUTION,
) -> SimulationBasedCalibration:
    """Draw weights and evidence from a fitted program, infer the weights, and check that their ranks are uniform.

    It checks inference against the program, not the program against real prompts. Draws must be independent.

    Args:
        dispatcher: a fitted one, or another :class:`Simulator`.
        count: N, simulations.
        draws: S, independent posterior draws of each.
        seed: of simulation, draws and ties.
        false_alarm_rate: probability, at most, that an exact posterior fails in any component, base included.
        resolution: weights nearer to 0 or 1 than this are ties. The rate of false alarms holds at any; a larger one
            leaves out how weights that are practically 0 are distributed, and under a sparse prior these are many.

    Returns:
        The verdict of each component.

    Raises:
        NotFittedError: a dispatcher before ``fit``.
        ConfigError: fewer than one simulation or draw, a negative seed, a rate outside 0 to 1, or a resolution outside
            0 to .5.
    """
    count, draws, seed = whole("count", count, 1), whole("draws", draws, 1), a_seed(seed)
    truth, posterior = dispatcher.simulate(count, draws, seed)
    ranks = posterior_ranks(posterior, truth, seed, resolution)
    return rank_uniformity(ranks, draws, posterior.experts, false_alarm_rate)


@lru_cache(maxsize=64)
def rank_band(count: int, draws: int, level: float) -> tuple[Int[np.ndarray, " point"], Int[np.ndarray, " point"]]:
    """How many of ``count`` uniform ranks lie below j = 1 … S: ends of a band that holds all S numbers at once.

    Each is Binomial(N, j / (S + 1)). Equal-tailed intervals of them hold all with less than their probability, so they
    are widened until they hold all with at least ``level``; discreteness makes it slightly more.
    """
    points = np.arange(1, draws + 1) / (draws + 1)

    def intervals(tail: float) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = binom.ppf(tail / 2, count, points), binom.isf(tail / 2, count, points)
        return lower.astype(np.int64), upper.astype(np.int64)

    # Bonferroni's tail, (1 − level) / S, is small enough; the largest tail that holds the level is found by bisection.
    low, high = np.log((1 - level) / draws), 0.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if probability_inside(count, *intervals(np.exp(middle))) >= level:
            low = middle
        else:
            high = middle
    return intervals(np.exp(low))


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
