"""Mean and covariance of the shares of experts and base, carried through uncertain events.

Labels follow the floored shares, ``P(label = k | pi) = .95 pi_k + .05 / (K+1)``, and an event has likelihoods
``L_k ∝ P(event | label = k)``: together ``P(event | pi) = l · pi`` with ``l = .95 L + .05 / (K+1) ΣL``. Under
``pi ~ Dirichlet(a)`` the posterior after it is

    Σ_k c_k Dirichlet(a + e_k) + c_0 Dirichlet(a),   c_k ∝ .95 a_k / Σa · L_k,   c_0 ∝ .05 / (K+1) · ΣL

and for any distribution of mean ``m``, covariance ``C`` and third central moments ``T``, with ``g = C l / (l · m)``,

    m ← m + g      C ← C + T l / (l · m) − g gᵀ

exactly. Keeping only the first two moments is assumed density filtering (Minka 2001, *A family of algorithms for
approximate Bayesian inference*, §3.1); T is taken to be ``2 Σ_k s_k² / (s_k + 1) · C_k ⊗ C_k ⊗ C_k / m_k²`` with
``s_k = m_k (1 − m_k) / C_kk``, as it is for every Dirichlet. Hence an event moves a Dirichlet to the moments of the
mixture above, and to those of ``Dirichlet(a + one_hot(label))`` where one component remains. Adding the ``c_k`` as if
they were counts would claim more than an event tells, and going back to a Dirichlet after each event, which has one
precision for all, more about components that rarely serve than is known.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import betaincinv

from bayes_dispatch.errors import ConfigError

__all__ = [
    "LABEL_FLOOR",
    "label_probability",
    "dirichlet_moments",
    "total_precision",
    "update_moments",
    "decay_moments",
    "share_intervals",
    "are_moments",
]

LABEL_FLOOR = 0.05  # of the labels falls on all components alike, as in the generative model's prior of the weights
TOLERANCE = 1e-9


def label_probability(
    pi: Float[np.ndarray, "*batch component"], floor: float = LABEL_FLOOR
) -> Float[np.ndarray, "*batch component"]:
    """``(…, K+1)`` P(label = k | pi) of shares ``(…, K+1)``: the floored shares.

    Raises:
        ConfigError: a floor outside [0, 1).
    """
    if not 0 <= floor < 1:
        raise ConfigError(f"expected a floor in [0, 1), got {floor}")
    return (1 - floor) * pi + floor / pi.shape[-1]


def dirichlet_moments(
    concentration: Float[np.ndarray, "*batch component"],
) -> tuple[Float[np.ndarray, "*batch component"], Float[np.ndarray, "*batch component component"]]:
    """Mean ``(…, K+1)`` and covariance ``(…, K+1, K+1)`` of Dirichlets."""
    total = concentration.sum(-1, keepdims=True)
    mean = concentration / total
    return mean, _spread(mean) / (total[..., None] + 1)


def total_precision(
    mean: Float[np.ndarray, "*batch component"], covariance: Float[np.ndarray, "*batch component component"]
) -> Float[np.ndarray, "*batch 1"]:
    """``(…, 1)`` Σa of the Dirichlet with this mean and this sum of variances."""
    return (mean * (1 - mean)).sum(-1, keepdims=True) / _trace(covariance) - 1


def update_moments(
    mean: Float[np.ndarray, "*batch component"],
    covariance: Float[np.ndarray, "*batch component component"],
    likelihood: Float[np.ndarray, "*batch component"],
    floor: float = LABEL_FLOOR,
) -> tuple[Float[np.ndarray, "*batch component"], Float[np.ndarray, "*batch component component"]]:
    """One event of each of several independent streams.

    Args:
        mean: ``(…, K+1)`` before.
        covariance: ``(…, K+1, K+1)`` before.
        likelihood: ``(…, K+1)`` of the event under each label, up to a factor; one of them > 0.
        floor: share of labels that falls on all components alike.

    Returns:
        Mean and covariance after.
    """
    scaled = likelihood / likelihood.max(-1, keepdims=True)
    slope = (1 - floor) * scaled + floor / mean.shape[-1] * scaled.sum(-1, keepdims=True)
    gain = (covariance @ slope[..., None])[..., 0] / (slope * mean).sum(-1, keepdims=True)
    precision = mean * (1 - mean) / np.diagonal(covariance, axis1=-2, axis2=-1)
    columns = covariance / mean[..., None, :]
    third = 2 * (columns * (gain * precision**2 / (precision + 1))[..., None, :]) @ columns.swapaxes(-1, -2)
    found = covariance + third - _outer(gain)
    after = mean + gain
    return after, _repair(after, found, total_precision(mean, covariance) + 1)


def decay_moments(
    mean: Float[np.ndarray, "*batch component"],
    covariance: Float[np.ndarray, "*batch component component"],
    initial: Float[np.ndarray, " component"],
    forgetting: float,
) -> tuple[Float[np.ndarray, "*batch component"], Float[np.ndarray, "*batch component component"]]:
    """Moments after ``a ← initial + forgetting · (a − initial)``.

    The matrix ``A (A + 1) C + A m mᵀ``, A the total precision, has the concentration ``A m`` as sums of its rows and is
    ``diag(a)`` for a Dirichlet: it decays to ``diag(initial)``.
    """
    total = total_precision(mean, covariance)[..., None]
    matrix = total * ((total + 1) * covariance + _outer(mean))
    matrix = np.diag(initial) + forgetting * (matrix - np.diag(initial))
    concentration = matrix.sum(-1)
    total = concentration.sum(-1, keepdims=True)
    mean = concentration / total
    found = (matrix / total[..., None] - _outer(mean)) / (total[..., None] + 1)
    return mean, _repair(mean, found, total)


def share_intervals(
    mean: Float[np.ndarray, "*batch component"],
    covariance: Float[np.ndarray, "*batch component component"],
    probability: float,
) -> Float[np.ndarray, "2 *batch component"]:
    """Equal-tailed intervals ``(2, …, K+1)`` of each share, from the Beta of its mean and variance."""
    precision = mean * (1 - mean) / np.diagonal(covariance, axis1=-2, axis2=-1) - 1
    above = mean * precision, (1 - mean) * precision
    return np.stack([betaincinv(*above, (1 - probability) / 2), betaincinv(*above, (1 + probability) / 2)])


def are_moments(
    mean: Float[np.ndarray, "*batch component"], covariance: Float[np.ndarray, "*batch component component"]
) -> Bool[np.ndarray, "*batch"]:
    """``(…)`` whether no E[pi_j pi_k] and no variance of a combination of shares is negative, up to rounding."""
    moments = covariance + _outer(mean)
    lowest = np.linalg.eigvalsh(covariance)[..., :1]
    return np.asarray((moments.min((-1, -2)) >= 0) & (lowest >= -TOLERANCE * _trace(covariance))[..., 0])


def _repair(mean: np.ndarray, covariance: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The covariance, or where no shares have it, that of a Dirichlet of like spread and at most this precision."""
    covariance = (covariance + covariance.swapaxes(-1, -2)) / 2
    fine = are_moments(mean, covariance)
    if fine.all():
        return covariance
    total = np.clip(total_precision(mean, covariance), most / 2, most)
    total = np.where(_trace(covariance) > 0, total, most)
    return np.where(fine[..., None, None], covariance, _spread(mean) / (total[..., None] + 1))


def _outer(vector: np.ndarray) -> np.ndarray:
    return vector[..., :, None] * vector[..., None, :]


def _spread(mean: np.ndarray) -> np.ndarray:
    """``diag(m) − m mᵀ``"""
    return mean[..., None] * np.eye(mean.shape[-1]) - _outer(mean)


def _trace(matrix: np.ndarray) -> np.ndarray:
    return np.trace(matrix, axis1=-2, axis2=-1)[..., None]
