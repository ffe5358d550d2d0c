"""Has what arrives stopped looking like the held-out prompts? A conformal test martingale with a guaranteed alarm.

Each arriving score is ranked among all scores before it, held-out and arrived: while all are exchangeable these
smoothed p-values are independent and uniform (Vovk, Gammerman & Shafer 2005, *Algorithmic Learning in a Random World*),
which ranks among the held-out alone are not. A game that bets against uniform p-values then has a capital that is a
martingale, and by Ville's inequality P(it ever reaches 1 / rate) ≤ rate, however long one looks. The bets are those of
the Composite Jumper (Vovk et al. 2021, *Retrain or not retrain*, arXiv 2102.10439), with stakes up to 2.

Scores enter by the bin they fall in, so that memory does not grow. The edges are quantiles of every fourth held-out
score; the others fill the bins before the first arrival. The edges thus depend on none of the ranked scores, and coarse
ones cost power, not the guarantee. An alarm has to come before new scores have become ordinary: what drifts slowly, or
arrives where few scores were held out, is found late or never.

>>> monitor = drift_monitor(np.random.default_rng(0).normal(size=400), false_alarm_rate=0.01)
>>> monitor, report = watch(monitor, np.full(50, -2.0))
>>> monitor.alarmed, int((report.martingale < 100).sum())
(True, 9)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from bayes_dispatch.arguments import fraction, whole
from bayes_dispatch.arguments import seed as a_seed
from bayes_dispatch.dispatcher.arrays import Frozen, as_values, short_repr
from bayes_dispatch.errors import ConfigError

__all__ = ["DriftMonitor", "DriftReport", "drift_monitor", "watch"]

JUMPS = np.array([1e-4, 1e-3, 1e-2, 1e-1, 1.0])  # of the capital is spread over all stakes before each bet; 1 keeps it
STAKES = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])  # a p-value p pays 1 + stake · (p − ½)
EDGES_FROM = 4  # every fourth held-out score
FEWEST = 20  # held-out scores


@dataclass(frozen=True, eq=False)
class DriftMonitor(Frozen):
    """What is kept between arrivals. It never changes: threads that share one take turns to replace it by the next.

    Attributes:
        edges: ``(B−1,)`` increasing; B bins.
        counts: ``(B,)`` scores so far in each bin.
        capital: ``(5, 5)`` shares of the capital by jump rate and stake; they sum to 1.
        log_martingale: log of the whole capital, 0 at first.
        log_highest: the largest that it has been.
        arrived: scores since the monitor was made.
        false_alarm_rate: bounds the probability that exchangeable scores ever raise the alarm.
        seed: of the order of ties.
    """

    edges: np.ndarray
    counts: np.ndarray
    capital: np.ndarray
    log_martingale: float
    log_highest: float
    arrived: int
    false_alarm_rate: float
    seed: int
    __repr__ = short_repr

    @property
    def alarmed(self) -> bool:
        """Whether the martingale has ever reached ``1 / false_alarm_rate``."""
        return bool(self.log_highest >= -np.log(self.false_alarm_rate))

    def pack(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON; ``DriftMonitor.unpack`` reads them."""
        arrays = {name: getattr(self, name).tolist() for name in ("edges", "counts", "capital")}
        return {**vars(self), **arrays}

    @classmethod
    def unpack(cls, numbers: dict[str, Any]) -> DriftMonitor:
        """The monitor that was packed.

        Raises:
            ConfigError: something is missing, or no monitor.
        """
        try:
            monitor = cls(
                np.array(numbers["edges"], dtype=np.float64),
                np.array(numbers["counts"], dtype=np.int64),
                np.array(numbers["capital"], dtype=np.float64),
                float(numbers["log_martingale"]),
                float(numbers["log_highest"]),
                whole("arrived", numbers["arrived"], 0),
                fraction("a false-alarm rate", numbers["false_alarm_rate"]),
                a_seed(numbers["seed"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"expected a drift monitor, got {type(error).__name__}: {error}") from None
        _check(monitor)
        return monitor


@dataclass(frozen=True, eq=False)
class DriftReport:
    """What a run of arrivals did.

    Attributes:
        p_values: ``(M,)`` conformal p-values: near 0 for scores below most others, near 1 above.
        martingale: ``(M,)`` capital after each arrival; infinite where it exceeds float64.
        first_alarm: index among these arrivals of the first whose capital reached ``1 / false_alarm_rate``.
    """

    p_values: np.ndarray
    martingale: np.ndarray
    first_alarm: int | None
    __repr__ = short_repr


def drift_monitor(
    calibration: Float[np.ndarray, " held_out"], false_alarm_rate: float = 0.01, bins: int = 64, seed: int = 0
) -> DriftMonitor:
    """A monitor before the first arrival.

    Args:
        calibration: ``(N,)`` scores of held-out prompts of the kind that is expected, such as log predictive densities,
            in no particular order; N ≥ 20. Hundreds let small drifts show: one is found only as far as it stands out
            among these scores.
        false_alarm_rate: bounds the probability that exchangeable scores ever raise the alarm.
        bins: at most; ranks are as coarse as these.
        seed: of the order of ties.

    Returns:
        The monitor.

    Raises:
        TensorError: scores that are NaN or infinite, or not one axis of them.
        ConfigError: fewer than 20 scores, a rate outside 0 to 1, fewer than 2 bins, or a negative seed.
    """
    scores = as_values(calibration, "calibration scores")
    if len(scores) < FEWEST:
        raise ConfigError(f"expected at least {FEWEST} calibration scores, got {len(scores)}")
    bins, seed = whole("bins", bins, 2), a_seed(seed)
    chosen = np.arange(len(scores)) % EDGES_FROM == 0
    edges = np.unique(np.quantile(scores[chosen], np.arange(1, bins) / bins))
    counts = np.bincount(np.searchsorted(edges, scores[~chosen], side="right"), minlength=len(edges) + 1)
    capital = np.full((len(JUMPS), len(STAKES)), 1 / (len(JUMPS) * len(STAKES)))
    rate = fraction("a false-alarm rate", false_alarm_rate)
    monitor = DriftMonitor(edges, counts, capital, 0.0, 0.0, 0, rate, seed)
    _check(monitor)
    return monitor


def watch(monitor: DriftMonitor, scores: Float[np.ndarray, " arrival"]) -> tuple[DriftMonitor, DriftReport]:
    """Arrivals in their order.

    Args:
        monitor: before them.
        scores: ``(M,)``, M ≥ 1.

    Returns:
        The monitor after them, and what they did.

    Raises:
        TensorError: no scores, or some that are NaN or infinite.
    """
    p_values, capital = [], []
    for score in as_values(scores, "scores"):
        monitor, p_value = _step(monitor, float(score))
        p_values.append(p_value)
        capital.append(monitor.log_martingale)
    with np.errstate(over="ignore"):
        martingale = np.exp(capital)
    over = np.flatnonzero(np.array(capital) >= -np.log(monitor.false_alarm_rate))
    return monitor, DriftReport(np.array(p_values), martingale, int(over[0]) if len(over) else None)


def _step(monitor: DriftMonitor, score: float) -> tuple[DriftMonitor, float]:
    """The monitor after one arrival, and its p-value."""
    place = int(np.searchsorted(monitor.edges, score, side="right"))
    counts = monitor.counts.copy()
    counts[place] += 1  # the arrival ties with itself
    tie = np.random.default_rng([monitor.seed, monitor.arrived]).random()
    p_value = float((counts[:place].sum() + tie * counts[place]) / counts.sum())
    total = monitor.capital.sum(axis=1, keepdims=True)
    spread = (1 - JUMPS[:, None]) * monitor.capital + JUMPS[:, None] * total / len(STAKES)
    paid = spread * (1 + STAKES * (p_value - 0.5))
    factor = float(paid.sum())
    now = monitor.log_martingale + float(np.log(factor))
    highest, arrived = max(monitor.log_highest, now), monitor.arrived + 1
    after = replace(monitor, counts=counts, capital=paid / factor, log_martingale=now)
    return replace(after, log_highest=highest, arrived=arrived), p_value


def _check(monitor: DriftMonitor) -> None:
    edges, counts, capital = monitor.edges, monitor.counts, monitor.capital
    if edges.ndim != 1 or not np.isfinite(edges).all() or not (np.diff(edges) > 0).all():
        raise ConfigError("expected finite edges that increase, got others")
    if counts.shape != (len(edges) + 1,) or (counts < 0).any():
        raise ConfigError(f"expected {len(edges) + 1} counts ≥ 0, got {counts.tolist()}")
    if capital.shape != (len(JUMPS), len(STAKES)) or not (capital >= 0).all() or not np.isclose(capital.sum(), 1):
        raise ConfigError(f"expected capital of shape {(len(JUMPS), len(STAKES))} that sums to 1, got another")
    if not monitor.log_martingale <= monitor.log_highest < np.inf:
        raise ConfigError(
            f"expected a martingale below its highest, got logs {monitor.log_martingale} and {monitor.log_highest}"
        )
