"""Simulation-based calibration: true weights rank uniformly among independent draws of an exact posterior.

Talts et al. 2018 (arXiv 1804.06788) for the ranks; Säilynoja, Bürkner & Vehtari 2022 (arXiv 2103.10522) for the bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from bayes_dispatch.checks.rank_bands import RankBand, rank_band
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, TensorError

__all__ = [
    "RankUniformity",
    "SimulationBasedCalibration",
    "Simulator",
    "posterior_ranks",
    "rank_uniformity",
    "simulation_based_calibration",
]

RESOLUTION = 1e-3  # of the guide, which counts smaller weights by their probability to be that small


@runtime_checkable
class Simulator(Protocol):
    """What draws prompts from its own program and infers their weights; a ``Dispatcher`` does."""

    def simulate(self, count: int, draws: int, seed: int) -> tuple[np.ndarray, DispatchPosterior]: ...


@dataclass(frozen=True, eq=False)
class RankUniformity:
    """Whether the ranks of one component look uniform.

    Attributes:
        component: its name.
        ecdf: ``(S,)`` share of ranks below j, for j = 1 … S.
        band: where the whole ECDF of uniform ranks lies with probability ``band.level``.
    """

    component: str
    ecdf: np.ndarray
    band: RankBand

    @property
    def inside(self) -> bool:
        """Whether the ECDF lies inside the band everywhere."""
        return self.band.contains(self.ecdf)

    @property
    def excess(self) -> float:
        """How far the ECDF leaves the band at most; 0 inside."""
        return float(np.maximum(np.maximum(self.band.lower - self.ecdf, self.ecdf - self.band.upper), 0).max())


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

    @property
    def passed(self) -> bool:
        """Whether every component is inside its band."""
        return all(component.inside for component in self.components)


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
    truth = np.asarray(truth, dtype=np.float64)
    if truth.shape != posterior.weights.shape[1:]:
        raise TensorError(f"expected true weights of shape {posterior.weights.shape[1:]}, got {truth.shape}")
    if not ((truth >= 0).all() and np.allclose(truth.sum(1), 1, atol=1e-4)):
        raise TensorError("expected true weights on the simplex, got rows that are negative or do not sum to 1")
    if seed < 0 or not 0 <= resolution < 0.5:
        raise ConfigError(f"expected a seed ≥ 0 and a resolution from 0 to .5, got {seed} and {resolution}")
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
    if draws < 1:
        raise ConfigError(f"expected at least 1 draw, got {draws}")
    if not 0 < false_alarm_rate < 1:
        raise ConfigError(f"expected a false-alarm rate between 0 and 1, got {false_alarm_rate}")
    if ranks.ndim != 2 or len(ranks) == 0 or ranks.shape[1] != len(components) or not len(components):
        raise TensorError(f"expected ranks of shape (N, {len(components)}), N ≥ 1, got shape {ranks.shape}")
    if not np.issubdtype(ranks.dtype, np.integer) or ranks.min() < 0 or ranks.max() > draws:
        raise TensorError(
            f"expected integer ranks from 0 to {draws}, got {ranks.dtype} from {ranks.min()} to {ranks.max()}"
        )
    band = rank_band(len(ranks), draws, 1 - false_alarm_rate / len(components))
    verdicts = []
    for name, column in zip(components, ranks.T, strict=True):
        counts = np.bincount(column, minlength=draws + 1)
        verdicts.append(RankUniformity(name, counts.cumsum()[:-1] / len(ranks), band))
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

    It checks inference against the program (the guide and its tempering), not the program against real prompts. Draws
    must be independent: resampled ones repeat, and fail unless they are few among many proposals.

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
    if count < 1 or draws < 1:
        raise ConfigError(f"expected at least 1 simulation and 1 draw, got {count} and {draws}")
    if seed < 0:
        raise ConfigError(f"expected a seed ≥ 0, got {seed}")
    truth, posterior = dispatcher.simulate(count, draws, seed)
    ranks = posterior_ranks(posterior, truth, seed, resolution)
    return rank_uniformity(ranks, draws, posterior.experts, false_alarm_rate)
