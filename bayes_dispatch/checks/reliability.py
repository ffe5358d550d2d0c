"""Scores and calibration of class probabilities such as ``predict_proba``: Brier, reliability, ECE.

scikit-learn has the rest (``log_loss``, ``top_k_accuracy_score``). Its Brier score takes labels alone, its calibration
curve one class and no errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from bayes_dispatch.arguments import SLACK, whole
from bayes_dispatch.dispatcher.arrays import as_flags, as_labels, as_points, as_values
from bayes_dispatch.errors import TensorError

__all__ = [
    "ReliabilityCurve",
    "brier_score",
    "confidence_curve",
    "expected_calibration_error",
    "reliability_curve",
]


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Confidence and accuracy of the top class in bins of confidence, from low to high.

    Attributes:
        counts: ``(bins,)`` prompts in each bin, at least one.
        confidence: ``(bins,)`` mean probability of the top class.
        accuracy: ``(bins,)`` share of prompts whose top class is right.
        standard_errors: ``(bins,)`` of the accuracy *if the system is calibrated*: ``sqrt(Σ c (1 − c)) / n`` over the
            confidences ``c`` of a bin. It is never 0 for being right n times out of n, as a binomial error would be.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    standard_errors: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean |accuracy − confidence| over prompts."""
        return float((np.abs(self.accuracy - self.confidence) * self.counts).sum() / self.counts.sum())

    @property
    def error_by_chance(self) -> float:
        """What the expected calibration error is on average if the system is calibrated: with few prompts, far from 0.

        The mean of |Normal(0, standard error)|, ``sqrt(2 / π)`` of it, over prompts: a little too small where a bin
        has few.
        """
        return float(np.sqrt(2 / np.pi) * (self.standard_errors * self.counts).sum() / self.counts.sum())


def brier_score(probabilities: Float[np.ndarray, "prompt class"], truth: Float[np.ndarray, "prompt class"]) -> float:
    """Mean squared distance between two points of the simplex, summed over classes (Brier 1950); less is better.

    Args:
        probabilities: ``(N, classes)``.
        truth: ``(N, classes)``, one-hot labels or true weights.

    Returns:
        The score, from 0 to 2.

    Raises:
        TensorError: rows off the simplex, or arrays of two shapes.
    """
    given, wanted = as_points(probabilities, "probabilities"), as_points(truth, "truth")
    if given.shape != wanted.shape:
        raise TensorError(f"expected truth of shape {given.shape}, got {wanted.shape}")
    return float(((given - wanted) ** 2).sum(axis=1).mean())


def reliability_curve(
    probabilities: Float[np.ndarray, "prompt class"], labels: Int[np.ndarray, " prompt"], bins: int = 15
) -> ReliabilityCurve:
    """Reliability of the top class over equally filled bins.

    As in Nguyen & O'Connor 2015, with the consistency errors of Bröcker & Smith 2007. Equal confidences share a
    bin, so that the order of the prompts does not matter.

    Args:
        probabilities: ``(N, classes)``.
        labels: ``(N,)`` true class.
        bins: number of bins; fewer come back where prompts are fewer or confidences equal.

    Returns:
        The curve.

    Raises:
        TensorError: rows off the simplex, or other labels than N classes.
        ConfigError: fewer than one bin.
    """
    given = as_points(probabilities, "probabilities")
    correct = given.argmax(axis=1) == as_labels(labels, *given.shape)
    return confidence_curve(given.max(axis=1), correct, bins)


def confidence_curve(
    confidence: Float[np.ndarray, " choice"], correct: Bool[np.ndarray, " choice"], bins: int = 15
) -> ReliabilityCurve:
    """Reliability of choices of which only the confidence is kept, such as the most probable byte of each place.

    Args:
        confidence: ``(N,)`` probability that was given to each choice.
        correct: ``(N,)`` whether it was right.
        bins: as in :func:`reliability_curve`.

    Returns:
        The curve.

    Raises:
        TensorError: arrays of other lengths, or confidences outside 0 to 1.
        ConfigError: fewer than one bin.
    """
    confidence = as_values(confidence, "confidences")
    correct = as_flags(correct, "what is correct", len(confidence))
    if confidence.min() < 0 or confidence.max() > 1 + SLACK:
        raise TensorError(f"expected confidences in 0 … 1, got {confidence.min():.4g} to {confidence.max():.4g}")
    bins = whole("bins", bins, 1)
    order = np.argsort(confidence, kind="stable")
    confidence, correct = confidence[order], correct[order]
    even = [part[0] for part in np.array_split(np.arange(len(order)), bins) if len(part)]
    starts = np.unique(np.searchsorted(confidence, confidence[even]))  # ties go up into the bin that begins with them
    counts = np.diff([*starts, len(order)])
    variance = np.maximum(confidence * (1 - confidence), 0)  # a rounded 1 may exceed it
    return ReliabilityCurve(
        counts,
        np.add.reduceat(confidence, starts) / counts,
        np.add.reduceat(correct.astype(np.float64), starts) / counts,
        np.sqrt(np.add.reduceat(variance, starts)) / counts,
    )


def expected_calibration_error(
    probabilities: Float[np.ndarray, "prompt class"], labels: Int[np.ndarray, " prompt"], bins: int = 15
) -> float:
    """ECE of the top class: mean |accuracy − confidence| over the bins of :func:`reliability_curve`.

    Args:
        probabilities: ``(N, classes)``.
        labels: ``(N,)`` true class.
        bins: number of bins, of equal counts but for equal confidences.

    Returns:
        The error, from 0 to 1.

    Raises:
        TensorError: rows off the simplex, or other labels than N classes.
        ConfigError: fewer than one bin.
    """
    return reliability_curve(probabilities, labels, bins).expected_calibration_error
