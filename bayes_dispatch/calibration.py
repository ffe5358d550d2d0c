"""Calibration of weight posteriors, as plain functions on draws and probabilities.

Coverage follows one definition throughout: equal-tailed intervals, over the components whose true weight exceeds .02 (a
true zero is never inside an interval). Even an exact posterior does not reach its nominal level on such a selection, so
it is read beside :func:`attainable_coverage`, the same statistic on simulations from the fitted program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bayes_dispatch.errors import TensorError

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher import Dispatcher
    from bayes_dispatch.posterior import DispatchPosterior

__all__ = ["Coverage", "attainable_coverage", "brier_score", "expected_calibration_error", "interval_coverage"]

SMALLEST = 0.02  # true weights up to this do not count


class Coverage(NamedTuple):
    """Share of true weights inside their intervals, its standard error (prompts as clusters), and how many counted."""

    value: float
    standard_error: float
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody needs here


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
        TensorError: truth of another shape, or off the simplex.
    """
    truth = np.asarray(truth, dtype=np.float64)
    if truth.shape != posterior.weights.shape[1:]:
        raise TensorError(f"expected true weights of shape {posterior.weights.shape[1:]}, got {truth.shape}")
    if not np.allclose(truth.sum(1), 1, atol=1e-4):
        raise TensorError("expected true weights on the simplex, got rows that do not sum to 1")
    low, high = posterior.interval(probability)
    counted = truth > SMALLEST
    inside = (low <= truth) & (truth <= high) & counted
    hits, sizes = inside.sum(1), counted.sum(1)  # (prompt,)
    value = hits.sum() / sizes.sum()
    error = np.sqrt(np.sum((hits - value * sizes) ** 2)) / sizes.sum()
    return Coverage(float(value), float(error), int(sizes.sum()))


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
    """
    weights = None if truth is None else np.resize(np.asarray(truth), (max(count, len(truth)), truth.shape[1]))
    drawn, posterior = dispatcher.simulate(count if weights is None else len(weights), draws, seed, weights)
    return interval_coverage(posterior, drawn, probability)


def expected_calibration_error(
    probabilities: Float[np.ndarray, "prompt class"], labels: Int[np.ndarray, " prompt"], bins: int = 15
) -> float:
    """ECE of the top class: mean |accuracy − confidence| over equally filled bins of confidence.

    Args:
        probabilities: ``(N, classes)``.
        labels: ``(N,)`` true class.
        bins: number of bins, of equal counts.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
    return float(sum(abs(correct[p].mean() - confidence[p].mean()) * len(p) for p in parts if len(p)) / len(labels))


def brier_score(probabilities: Float[np.ndarray, "prompt class"], truth: Float[np.ndarray, "prompt class"]) -> float:
    """Mean squared distance between two points of the simplex, summed over classes; ``truth`` one-hot or weights."""
    return float(((np.asarray(probabilities) - np.asarray(truth)) ** 2).sum(axis=1).mean())
