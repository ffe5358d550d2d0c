"""One event of a Dirichlet over the shares of experts and base: assumed density filtering.

Labels follow the floored shares, ``P(label = k | pi) = .95 pi_k + .05 / (K+1)``, and an event has likelihoods
``L_k ∝ P(event | label = k)``. Under ``pi ~ Dirichlet(a)`` the posterior after it is

    Σ_k c_k Dirichlet(a + e_k) + c_0 Dirichlet(a),   c_k ∝ .95 a_k / Σa · L_k,   c_0 ∝ .05 / (K+1) · ΣL

and what takes its place is the Dirichlet of the same mean that is nearest in KL(posterior ‖ Dirichlet): assumed
density filtering (Minka 2001, *A family of algorithms for approximate Bayesian inference*, §3.1). Where one component
remains it is exact: ``a + one_hot(label)``. Adding the ``c_k`` as if they were counts would claim more than an event
tells.

A Dirichlet has one precision for all components. Where some hardly ever serve, and rewards say little about them, it
understates their uncertainty: let each serve at times.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import digamma, zeta

from bayes_dispatch.errors import ConfigError

__all__ = ["FLOOR", "label_probability", "update_concentration"]

FLOOR = 0.05  # of the labels falls on all components alike, as in the generative model's prior of the weights
STEPS = 40  # of Newton's method at most; two or three do after most events
TOLERANCE = 1e-8  # of the last step, relative; what is left is its square
LARGE = 50.0


def label_probability(
    pi: Float[np.ndarray, "*batch component"], floor: float = FLOOR
) -> Float[np.ndarray, "*batch component"]:
    """``(…, K+1)`` P(label = k | pi) of shares ``(…, K+1)``: the floored shares.

    Raises:
        ConfigError: a floor outside [0, 1).
    """
    if not 0 <= floor < 1:
        raise ConfigError(f"expected a floor in [0, 1), got {floor}")
    return (1 - floor) * pi + floor / pi.shape[-1]


def update_concentration(
    concentration: Float[np.ndarray, "*batch component"],
    likelihood: Float[np.ndarray, "*batch component"],
    floor: float = FLOOR,
) -> Float[np.ndarray, "*batch component"]:
    """One event of each of several independent priors; :func:`~bayes_dispatch.online.observe` without its checks.

    The mean is the posterior's own. The precision ``s`` maximises the posterior's expected log density of
    ``Dirichlet(s m)``: it solves ``Σ_k m_k ψ(s m_k) − ψ(s) = Σ_k m_k E[log pi_k]``.

    Args:
        concentration: ``(…, K+1)`` before.
        likelihood: ``(…, K+1)`` of the event under each label.
        floor: share of labels that falls on all components alike.

    Returns:
        ``(…, K+1)`` after.
    """
    total = concentration.sum(-1, keepdims=True)
    before = concentration / total
    scaled = likelihood / likelihood.max(-1, keepdims=True)
    joint = (1 - floor) * before * scaled
    spilt = floor / before.shape[-1] * scaled.sum(-1, keepdims=True)
    evidence = joint.sum(-1, keepdims=True) + spilt
    added, kept = joint / evidence, spilt / evidence  # c_k and c_0
    change = (added / before - (1 - kept)) / (total + 1)
    mean = before * (1 + change)
    # Both sides of the equation less Σ m log m: what is left does not cancel, however many events there were.
    points = np.concatenate([mean, np.ones_like(total)], axis=-1)
    signed = np.concatenate([mean, -np.ones_like(total)], axis=-1)
    known = _remainders(np.concatenate([concentration, total], axis=-1))[0]
    target = (signed * known).sum(-1, keepdims=True)
    target += (added * change / total - mean * np.log1p(change)).sum(-1, keepdims=True)
    inverse = 1 / (total + 1 - kept)  # in which the equation is nearly linear
    for _ in range(STEPS):
        value, slope = _remainders(points / inverse)
        gap = (signed * value).sum(-1, keepdims=True) - target
        step = gap * inverse**2 / (signed * points * slope).sum(-1, keepdims=True)
        inverse = np.maximum(inverse + step, inverse / 4)
        if (np.abs(step) <= TOLERANCE * inverse).all():
            break
    return mean / inverse


def _remainders(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``ψ(x) − log x`` and ``ψ'(x) − 1 / x``, by their asymptotic series where the differences would cancel."""
    y = 1 / np.maximum(x, LARGE)
    square = y * y
    first = -y * (1 / 2 + y * (1 / 12 - square * (1 / 120 - square / 252)))
    second = square * (1 / 2 + y * (1 / 6 - square * (1 / 30 - square / 42)))
    small = x < LARGE
    return np.where(small, digamma(x) - np.log(x), first), np.where(small, zeta(2, x) - 1 / x, second)
