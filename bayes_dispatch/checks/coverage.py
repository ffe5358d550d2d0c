"""Coverage of the posterior intervals of the weights: how often a true weight lies inside.

Those of the posterior are equal-tailed, and judged over the components whose posterior mean exceeds .05. An exact
posterior covers its level on them, for they are chosen without a look at the truth. Chosen by their true weight it does
not: a component that is there, but that evidence hardly shows, lies in the upper tail even of an exact posterior, and
those that are not there, always inside, would not make up for it. A true weight of 0 or of 1 ties with draws that are
next to it (nearer than ``RESOLUTION``), and its rank among them is drawn at random, as in simulation-based calibration:
an interval that reaches down to 0 would otherwise always hold a 0. Calibrated ones are judged by what is promised of
them. Coverage below the nominal level means intervals that are too narrow; :func:`simulated_coverage`, the same
statistic on evidence simulated from the fitted program, tells how much of it is the prior's, for which weights that are
given may be rare. The rest is the likelihoods' fault, or the evidence's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from bayes_dispatch.arguments import number, several, shown, whole
from bayes_dispatch.checks.sbc import posterior_ranks, true_weights
from bayes_dispatch.dispatcher.arrays import as_points
from bayes_dispatch.dispatcher.conformal import COUNTED
from bayes_dispatch.errors import ConfigError, NotFittedError, TensorError

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from bayes_dispatch.dispatcher.posterior import DispatchPosterior

__all__ = [
    "Coverage",
    "CoverageCurve",
    "calibrated_coverage",
    "coverage_curve",
    "interval_coverage",
    "simulated_coverage",
]

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Coverage(NamedTuple):
    """Share of true weights inside their intervals, its standard error (prompts as clusters), how many counted, and the
    mean width of their intervals."""

    value: float
    standard_error: float
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody needs here
    width: float


@dataclass(frozen=True, eq=False)
class CoverageCurve:
    """Coverage at several nominal levels, on the same prompts.

    Attributes:
        levels: ``(L,)`` nominal levels, ascending.
        values: ``(L,)`` coverage.
        standard_errors: ``(L,)``, with prompts as clusters.
        count: true weights that counted.
        widths: ``(L,)`` mean widths of their intervals.
    """

    levels: np.ndarray
    values: np.ndarray
    standard_errors: np.ndarray
    count: int
    widths: np.ndarray


def interval_coverage(
    posterior: DispatchPosterior, truth: Float[np.ndarray, "prompt weight"], probability: float = 0.9
) -> Coverage:
    """Coverage of the equal-tailed intervals of the weights.

    Args:
        posterior: draws ``(draw, prompt, K+1)``.
        truth: ``(prompt, K+1)`` true weights, rows on the simplex.
        probability: nominal level.

    Returns:
        The coverage over components whose posterior mean exceeds .05.

    Raises:
        TensorError: truth of another shape or off the simplex, or no posterior mean above .05.
        ConfigError: a level outside 0 to 1.
    """
    low, high = posterior.interval(probability)
    ranks = posterior_ranks(posterior, truth)
    # A rank among S draws stands for an interval of length 1 / (S + 1): a point of it, so that any level can be held.
    places = (ranks + np.random.default_rng(0).random(ranks.shape)) / (len(posterior.weights) + 1)
    own = posterior.mean > COUNTED
    if not own.any():
        raise TensorError(f"expected a posterior mean above {COUNTED}, got none in {len(own)} prompts")
    return _coverage(own.astype(float), np.abs(places - 0.5) <= probability / 2, high - low)


def calibrated_coverage(
    posterior: DispatchPosterior, truth: Float[np.ndarray, "prompt weight"], probability: float = 0.9
) -> Coverage:
    """Coverage of :meth:`DispatchPosterior.calibrated_interval`, as they are promised: of one of a prompt's counted
    components, taken at random, so that each prompt counts as much.

    An interval is taken as it stands: one that reaches down to 0 holds a true weight of 0.

    Args:
        posterior: of a calibrated dispatcher. truth, probability: as in :func:`interval_coverage`.

    Raises:
        NotFittedError: the dispatcher was not calibrated.
        TensorError, ConfigError: as :func:`interval_coverage`, or a level that takes more calibration prompts.
    """
    truth = true_weights(posterior, truth)
    if posterior.calibrated is None:
        raise NotFittedError("expected a posterior of a calibrated dispatcher, got one without calibrate()")
    (low, high), own = posterior.calibrated(probability)
    return _coverage(own / own.sum(1, keepdims=True), (low <= truth) & (truth <= high), high - low)


def _coverage(
    shares: Float[np.ndarray, "prompt weight"],
    inside: Bool[np.ndarray, "prompt weight"],
    widths: Float[np.ndarray, "prompt weight"],
) -> Coverage:
    """Where each component counts by its share; those of share 0 do not."""
    hits, sizes = (inside * shares).sum(1), shares.sum(1)  # (prompt,)
    value = hits.sum() / sizes.sum()
    error = np.sqrt(np.sum((hits - value * sizes) ** 2)) / sizes.sum()
    width = float((widths * shares).sum() / sizes.sum())
    return Coverage(float(value), float(error), int((shares > 0).sum()), width)


def coverage_curve(
    posterior: DispatchPosterior,
    truth: Float[np.ndarray, "prompt weight"],
    levels: Sequence[float] | Float[np.ndarray, " level"] = LEVELS,
) -> CoverageCurve:
    """:func:`interval_coverage` at several nominal levels.

    Args:
        posterior: draws ``(draw, prompt, K+1)``.
        truth: ``(prompt, K+1)`` true weights, rows on the simplex.
        levels: nominal levels, ascending, each between 0 and 1.

    Returns:
        The curve.

    Raises:
        TensorError: truth of another shape or off the simplex, or no posterior mean above .05.
        ConfigError: no levels, or levels that do not ascend between 0 and 1.
    """
    levels = _ascending(levels)
    found = [interval_coverage(posterior, truth, level) for level in levels]
    return CoverageCurve(
        np.array(levels),
        np.array([coverage.value for coverage in found]),
        np.array([coverage.standard_error for coverage in found]),
        found[0].count,
        np.array([coverage.width for coverage in found]),
    )


def simulated_coverage(
    dispatcher: Dispatcher,
    truth: Float[np.ndarray, "prompt weight"] | None = None,
    levels: Sequence[float] | Float[np.ndarray, " level"] = LEVELS,
    count: int = 2_000,
    draws: int = 256,
    seed: int = 0,
) -> CoverageCurve:
    """:func:`coverage_curve` on evidence simulated from the fitted program: what intervals cover if it is right.

    Args:
        dispatcher: a fitted one.
        truth: ``(prompt, K+1)`` weights to simulate at, such as those of the documents that the real coverage is
            measured on; drawn from the prior by default.
        levels: nominal levels, ascending, each between 0 and 1.
        count: simulations; rows of ``truth`` are repeated to fill them.
        draws: posterior draws of each.
        seed: of the simulation.

    Raises:
        NotFittedError: a dispatcher before ``fit``.
        TensorError: truth of another shape or off the simplex, or no posterior mean above .05.
        ConfigError: no levels, levels that do not ascend between 0 and 1, or a number that is out of range.
    """
    levels, count, weights = _ascending(levels), whole("count", count, 1), None
    if truth is not None:
        rows = as_points(truth, "true weights")
        count = max(count, len(rows))
        weights = np.resize(rows, (count, rows.shape[1]))
    drawn, posterior = dispatcher.simulate(count, draws, seed, weights)
    return coverage_curve(posterior, drawn, levels)


def _ascending(levels: Sequence[float] | np.ndarray) -> list[float]:
    found = [number(level) for level in several("levels", levels)]
    if not found or not (np.diff([0.0, *found, 1.0]) > 0).all():
        raise ConfigError(f"expected levels that ascend between 0 and 1, got {shown(levels)}")
    return found
