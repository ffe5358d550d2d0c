"""Serving only prompts that the system is sure of: risk against coverage, and a threshold with a guarantee."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.stats import beta, binom

from bayes_dispatch.arguments import fraction, whole
from bayes_dispatch.dispatcher.arrays import as_flags, as_values, short_repr
from bayes_dispatch.errors import ConfigError, TensorError

__all__ = ["Abstention", "RiskCoverage", "abstention_threshold", "risk_coverage"]


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Selective risk when the n most confident of N prompts are served, for n = 1 … N.

    Attributes:
        coverage: ``(N,)`` n / N.
        risk: ``(N,)`` mean loss of those served; expected over the order of equal confidences.
        confidence: ``(N,)`` the least confidence served.
        oracle_risk: ``(N,)`` the same if prompts were served in order of their loss: the least possible.
    """

    coverage: np.ndarray
    risk: np.ndarray
    confidence: np.ndarray
    oracle_risk: np.ndarray
    __repr__ = short_repr

    @property
    def aurc(self) -> float:
        """Area under the curve: mean selective risk over n; less is better."""
        return float(self.risk.mean())

    @property
    def excess_aurc(self) -> float:
        """AURC above the oracle's: what is lost by the order of confidences alone, at these losses."""
        return float((self.risk - self.oracle_risk).mean())


@dataclass(frozen=True)
class Abstention:
    """A certified rule: serve a prompt if its confidence is at least ``threshold``, abstain otherwise.

    Attributes:
        threshold: least confidence served.
        risk: what the risk of served prompts stays within, with probability at least 1 − ``delta``.
        delta: probability, at most, that the held-out split misled us.
        count: prompts of the held-out split. served: how many of them reach the threshold.
        errors: how many of these were wrong.
        upper_bound: exact (Clopper–Pearson) bound on the risk at the level that certified it, at most ``risk``.
    """

    threshold: float
    risk: float
    delta: float
    count: int
    served: int
    errors: int
    upper_bound: float

    @property
    def coverage(self) -> float:
        """Share of the held-out prompts that are served."""
        return self.served / self.count

    def serves(self, confidence: Float[np.ndarray, " prompt"]) -> Bool[np.ndarray, " prompt"]:
        """``(N,)`` which prompts to answer, given their confidences."""
        return np.asarray(confidence) >= self.threshold


def risk_coverage(confidence: Float[np.ndarray, " prompt"], losses: Shaped[np.ndarray, " prompt"]) -> RiskCoverage:
    """The risk–coverage curve (El-Yaniv & Wiener 2010), with AURC and its excess (Geifman, Uziel & El-Yaniv 2019).

    The oracle's curve is that of these losses in ascending order, exactly, not its limit for many prompts.

    Args:
        confidence: ``(N,)``, more is surer.
        losses: ``(N,)``, such as 1 for a wrong answer and 0 for a right one, or any finite loss.

    Returns:
        The curve.

    Raises:
        TensorError: no prompts, other lengths, or numbers that are not finite.
    """
    confidence = as_values(confidence, "confidences")
    losses = as_values(losses, "losses", len(confidence))
    served = np.arange(1, len(losses) + 1)
    order = np.argsort(-confidence, kind="stable")
    _, group, sizes = np.unique(-confidence[order], return_inverse=True, return_counts=True)
    tied = np.bincount(group, losses[order]) / sizes  # mean loss of equal confidences
    return RiskCoverage(
        served / len(losses),
        tied[group].cumsum() / served,
        confidence[order],
        np.sort(losses).cumsum() / served,
    )


def abstention_threshold(
    confidence: Float[np.ndarray, " prompt"],
    errors: Shaped[np.ndarray, " prompt"],
    risk: float,
    delta: float = 0.1,
    thresholds: Sequence[float] | Float[np.ndarray, " threshold"] | None = None,
    starts: int = 3,
) -> Abstention | None:
    """The least confidence to answer at, so that answers are wrong at a chosen rate at most.

    **Guarantee.** Let the held-out prompts be independent draws from the distribution of the prompts to come, used
    neither for fitting nor for choosing any other argument, and R(t) the probability that a prompt of confidence ≥ t is
    answered wrongly. Then the threshold t that comes back has R(t) ≤ ``risk`` with probability at least 1 − ``delta``
    over the held-out split, for every such distribution and every N; to return ``None`` (serve nothing) counts as
    keeping it. R(t) is an average over served prompts, not a bound for each of them.

    It is Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052). Of n served at a threshold fixed in advance, the
    wrong ones are Binomial(n, R(t)), so "R(t) > risk" has an exact test. The tests run from high to low thresholds in a
    fixed sequence that ends where one does not reject, and that is begun anew at ``starts`` places, since few prompts
    reach the first thresholds. Each start has an equal share of ``delta``; a sequence that reaches the next start goes
    on with the sum (the fallback procedure, Wiens 2003). Any false rejection has probability ``delta`` at most.

    Args:
        confidence: ``(N,)`` on the held-out split, more is surer.
        errors: ``(N,)`` whether each answer is wrong.
        risk: the chosen rate of wrong answers among served ones.
        delta: probability, at most, with which the rate may be exceeded.
        thresholds: candidates in descending order; by default 60 from 1 − ``risk``/4 to 0, evenly in the logarithm of
            1 − threshold, for confidences that are probabilities.
        starts: how many of the candidates begin a sequence, evenly spaced from the first on. Fewer have larger shares
            of ``delta``, but fail where few prompts reach the first.

    Returns:
        The certified rule that serves most, or ``None`` where no candidate can be certified.

    Raises:
        TensorError: no prompts, other lengths, confidences that are not finite, or errors that are not booleans.
        ConfigError: risk or delta outside 0 to 1, thresholds that do not descend, or fewer than one start.
    """
    confidence = as_values(confidence, "confidences")
    wrong = as_flags(errors, "errors", len(confidence))
    risk, delta = fraction("risk", risk), fraction("delta", delta)
    candidates = _candidates(risk, thresholds)
    starts = min(whole("starts", starts, 1), len(candidates))
    shares = np.zeros(len(candidates))
    shares[np.arange(starts) * len(candidates) // starts] = delta / starts
    order = np.argsort(-confidence)
    served = np.searchsorted(-confidence[order], -candidates, side="right")  # (J,) how many reach each threshold
    failed = np.concatenate([[0], wrong[order].cumsum()])[served]  # (J,)
    p_values = np.where(served > 0, binom.cdf(failed, np.maximum(served, 1), risk), 1.0)
    best, level = None, 0.0
    for index, (p_value, share) in enumerate(zip(p_values, shares, strict=True)):
        level += share
        if p_value <= level and level > 0:
            best = index, level
        else:
            level = 0.0
    if best is None:
        return None
    index, level = best
    errors_served, count = int(failed[index]), int(served[index])
    bound = float(beta.ppf(1 - level, errors_served + 1, count - errors_served))
    return Abstention(float(candidates[index]), risk, delta, len(confidence), count, errors_served, bound)


def _candidates(risk: float, thresholds: Sequence[float] | np.ndarray | None) -> np.ndarray:
    if thresholds is None:  # a calibrated system's risk at threshold t is 1 − t at most
        return 1 - np.geomspace(risk / 4, 1, 60)
    try:
        candidates = as_values(thresholds, "thresholds")
    except TensorError as error:
        raise ConfigError(str(error)) from None
    if not (np.diff(candidates) < 0).all():
        raise ConfigError(f"expected {len(candidates)} thresholds in descending order, got them in another")
    return candidates
