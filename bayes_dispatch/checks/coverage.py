"""Coverage of the posterior intervals of the weights.

One definition throughout: equal-tailed intervals, over the components whose true weight exceeds .02 (a true zero is
never inside an interval). Even an exact posterior does not reach its nominal level on such a selection, so coverage is
read beside the attainable one: the same statistic on simulations from the fitted program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from bayes_dispatch.errors import ConfigError, TensorError

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from bayes_dispatch.dispatcher.posterior import DispatchPosterior

__all__ = [
    "Coverage",
    "CoverageCurve",
    "interval_coverage",
    "coverage_curve",
    "attainable_coverage",
    "attainable_coverage_curve",
]

SMALLEST = 0.02  # true weights up to this do not count
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Coverage(NamedTuple):
    """Share of true weights inside their intervals, its standard error (prompts as clusters), and how many counted."""

    value: float
    standard_error: float
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody needs here


@dataclass(frozen=True, eq=False)
class CoverageCurve:
    """Coverage at several nominal levels, on the same prompts.

    Attributes:
        levels: ``(L,)`` nominal levels, ascending.
        values: ``(L,)`` coverage.
        standard_errors: ``(L,)``, with prompts as clusters.
        count: true weights that counted.
    """

    levels: np.ndarray
    values: np.ndarray
    standard_errors: np.ndarray
    count: int


def interval_coverage(
    posterior: DispatchPosterior, truth: Float[np.ndarray, "prompt weight"], probability: float = 0.9
) -> Coverage:
    """Coverage of the equal-tailed intervals of the weights.

    Args:
        posterior: draws ``(draw, prompt, K+1)``.
        truth: ``(prompt, K+1)`` true weights, rows on the simplex.
        probability: nominal level.

    Returns:
        The coverage over components whose true weight exceeds .02.

    Raises:
        TensorError: truth of another shape or off the simplex, or no weight above .02 in it.
        ConfigError: a level outside 0 to 1.
    """
    truth = np.asarray(truth, dtype=np.float64)
    if truth.shape != posterior.weights.shape[1:]:
        raise TensorError(f"expected true weights of shape {posterior.weights.shape[1:]}, got {truth.shape}")
    if not np.allclose(truth.sum(1), 1, atol=1e-4):
        raise TensorError("expected true weights on the simplex, got rows that do not sum to 1")
    counted = truth > SMALLEST
    if not counted.any():
        raise TensorError(f"expected a true weight above {SMALLEST}, got none in {len(truth)} prompts")
    low, high = posterior.interval(probability)
    inside = (low <= truth) & (truth <= high) & counted
    hits, sizes = inside.sum(1), counted.sum(1)  # (prompt,)
    value = hits.sum() / sizes.sum()
    error = np.sqrt(np.sum((hits - value * sizes) ** 2)) / sizes.sum()
    return Coverage(float(value), float(error), int(sizes.sum()))


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
        TensorError: truth of another shape or off the simplex, or no weight above .02 in it.
        ConfigError: no levels, or levels that do not ascend between 0 and 1.
    """
    _check_levels(levels)
    found = [interval_coverage(posterior, truth, float(level)) for level in levels]
    return CoverageCurve(
        np.array(levels, dtype=np.float64),
        np.array([coverage.value for coverage in found]),
        np.array([coverage.standard_error for coverage in found]),
        found[0].count,
    )


def attainable_coverage(
    dispatcher: Dispatcher,
    truth: Float[np.ndarray, "prompt weight"] | None = None,
    probability: float = 0.9,
    count: int = 2_000,
    draws: int = 256,
    seed: int = 0,
) -> Coverage:
    """The coverage that the fitted program itself would show: :func:`interval_coverage` on simulated evidence.

    Args:
        dispatcher: a fitted one.
        truth: ``(prompt, K+1)`` weights to simulate at, such as those of the documents that the real coverage is
            measured on; drawn from the prior by default.
        probability: nominal level.
        count: simulations; rows of ``truth`` are repeated to fill them.
        draws: posterior draws of each.
        seed: of the simulation.

    Returns:
        The attainable coverage.

    Raises:
        NotFittedError: a dispatcher before ``fit``.
        ConfigError: a level outside 0 to 1.
    """
    drawn, posterior = _simulated(dispatcher, truth, count, draws, seed)
    return interval_coverage(posterior, drawn, probability)


def attainable_coverage_curve(
    dispatcher: Dispatcher,
    truth: Float[np.ndarray, "prompt weight"] | None = None,
    levels: Sequence[float] | Float[np.ndarray, " level"] = LEVELS,
    count: int = 2_000,
    draws: int = 256,
    seed: int = 0,
) -> CoverageCurve:
    """:func:`attainable_coverage` at several nominal levels, on one set of simulations.

    Args:
        dispatcher: a fitted one.
        truth: ``(prompt, K+1)`` weights to simulate at; drawn from the prior by default.
        levels: nominal levels, ascending, each between 0 and 1.
        count: simulations; rows of ``truth`` are repeated to fill them.
        draws: posterior draws of each.
        seed: of the simulation.

    Returns:
        The curve to read :func:`coverage_curve` beside.

    Raises:
        NotFittedError: a dispatcher before ``fit``.
        ConfigError: no levels, or levels that do not ascend between 0 and 1.
    """
    _check_levels(levels)
    drawn, posterior = _simulated(dispatcher, truth, count, draws, seed)
    return coverage_curve(posterior, drawn, levels)


def _simulated(
    dispatcher: Dispatcher, truth: np.ndarray | None, count: int, draws: int, seed: int
) -> tuple[np.ndarray, DispatchPosterior]:
    weights = None if truth is None else np.resize(np.asarray(truth), (max(count, len(truth)), truth.shape[1]))
    return dispatcher.simulate(count if weights is None else len(weights), draws, seed, weights)


def _check_levels(levels: Sequence[float] | np.ndarray) -> None:
    if len(levels) == 0 or not (np.diff([0.0, *levels, 1.0]) > 0).all():
        raise ConfigError(f"expected levels that ascend between 0 and 1, got {[float(level) for level in levels]}")
