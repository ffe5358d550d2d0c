"""The serving prior: shares ``pi`` of K experts and base, updated by every event without refitting.

An event is what is learnt about the label of one prompt: a label, a reward for the expert that served, the prompt's own
posterior, or several of these. It enters as likelihoods ``L_k ∝ P(event | label = k)``, and mean and covariance of
``pi`` take it in as :mod:`bayes_dispatch.dispatcher.prior.moment_filter` says.

>>> state = prior_state(np.array([3.0, 3.0, 1.5]), ("sort", "reverse", "base"))
>>> observe(state, label_likelihood(np.array([1, 1, 0]), 3)).mean.round(2)
array([0.38, 0.47, 0.14])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from bayes_dispatch.arguments import fraction, number, real, shown, whole
from bayes_dispatch.dispatcher.arrays import Frozen, as_labels, as_points, as_values, short_repr
from bayes_dispatch.dispatcher.prior.moment_filter import (
    LABEL_FLOOR,
    are_moments,
    decay_moments,
    dirichlet_moments,
    label_probability,
    share_intervals,
    total_precision,
    update_moments,
)
from bayes_dispatch.errors import ConfigError, TensorError

__all__ = [
    "STATE_ARRAYS",
    "PriorState",
    "prior_state",
    "observe",
    "label_likelihood",
    "feedback_likelihood",
    "evidence_likelihood",
]

STATE_ARRAYS = ("mean", "covariance", "initial")  # of a state, as files keep it
RELIABILITY = 0.95
ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class PriorState(Frozen):
    """Mean and covariance of ``pi`` after some events; those of ``Dirichlet(initial)`` before the first.

    Args:
        mean: ``(K+1,)`` E[pi], positive and on the simplex, base last.
        covariance: ``(K+1, K+1)`` Cov(pi).
        initial: ``(K+1,)`` finite and positive; what forgetting decays to.
        names: K+1 distinct names in order; the last is ``"base"``.
        events: how many have been observed.

    Raises:
        ConfigError: a mean, covariance or concentration that no shares have, or of another size than names; a name
            twice, or another last name; no whole number of events.
    """

    mean: np.ndarray
    covariance: np.ndarray
    initial: np.ndarray
    names: tuple[str, ...]
    events: int
    __repr__ = short_repr

    def __post_init__(self) -> None:
        names = tuple(self.names)
        width = len(names)
        if width < 2 or len(set(names)) < width or names[-1] != "base":
            raise ConfigError(f'expected distinct names of experts and then "base", got {list(names)}')
        object.__setattr__(self, "events", whole("events", self.events, 0))
        object.__setattr__(self, "names", names)
        for field, shape in (("mean", (width,)), ("covariance", (width, width)), ("initial", (width,))):
            values = np.array(getattr(self, field), dtype=np.float64)
            if values.shape != shape or not np.isfinite(values).all():
                raise ConfigError(f"expected a finite {field} of shape {shape}, got shape {values.shape} or others")
            object.__setattr__(self, field, values)
        super().__post_init__()
        if not (self.initial > 0).all():
            raise ConfigError(f"expected initial concentrations > 0, got {self.initial.tolist()}")
        spread = np.trace(self.covariance)
        sums = np.abs(self.covariance.sum(0)).max()
        symmetric = (self.covariance == self.covariance.T).all()
        if not ((self.mean > 0).all() and abs(self.mean.sum() - 1) < ROUNDING):
            raise ConfigError(f"expected a mean on the simplex, got {self.mean.tolist()}")
        if not (symmetric and (np.diag(self.covariance) > 0).all() and sums < ROUNDING * spread):
            raise ConfigError("expected a symmetric covariance of positive variances whose rows sum to 0, got another")
        if not are_moments(self.mean, self.covariance):
            raise ConfigError("expected a covariance that shares of this mean can have, got another")

    @property
    def concentration(self) -> Float[np.ndarray, " component"]:
        """``(K+1,)`` of the Dirichlet with this mean and this sum of variances; ``initial`` before any event."""
        return self.mean * total_precision(self.mean, self.covariance)

    def interval(self, probability: float = 0.9) -> Float[np.ndarray, "2 component"]:
        """Equal-tailed intervals ``(2, K+1)`` of each share, from the Beta of its mean and variance.

        Raises:
            ConfigError: a probability outside 0 to 1.
        """
        return share_intervals(self.mean, self.covariance, fraction("a probability", probability))


def prior_state(initial: Float[np.ndarray, " component"], names: Sequence[str]) -> PriorState:
    """The state before the first event.

    Args:
        initial: ``(K+1,)`` concentration of the Dirichlet, finite and positive, base last.
        names: K+1 distinct names in order; the last is ``"base"``.

    Raises:
        ConfigError: concentrations that are not finite and positive, or of another number than names; a name twice, or
            another last name.
    """
    given = np.asarray(initial, dtype=np.float64)
    if given.shape != (len(names),) or not (np.isfinite(given) & (given > 0)).all():
        raise ConfigError(f"expected {len(names)} finite initial concentrations > 0, got {given.tolist()}")
    return PriorState(*dirichlet_moments(given), given, tuple(names), 0)


def observe(
    state: PriorState,
    likelihoods: Float[np.ndarray, "event component"],
    forgetting: float = 1.0,
    floor: float = LABEL_FLOOR,
) -> PriorState:
    """Update the prior by events, in their order.

    Args:
        state: before the events.
        likelihoods: ``(E, K+1)`` of each event under each label, up to a factor of its own. Those of independent
            sources multiply.
        forgetting: before every event ``a ← initial + forgetting · (a − initial)``; 1 forgets nothing, and γ lets
            at most about 1 / (1 − γ) events count.
        floor: share of labels that falls on all components alike.

    Returns:
        The state after them.

    Raises:
        TensorError: likelihoods of another width, not finite, negative, or 0 for every label.
        ConfigError: forgetting outside (0, 1], or a floor outside [0, 1).
    """
    given = np.asarray(likelihoods, dtype=np.float64)
    width = len(state.names)
    if given.ndim != 2 or given.shape[1] != width:
        raise TensorError(f"expected likelihoods of shape (E, {width}), got shape {given.shape}")
    if not (np.isfinite(given).all() and (given >= 0).all() and (given > 0).any(1).all()):
        raise TensorError("expected finite likelihoods ≥ 0, one of each event > 0, got others")
    forgetting = real("forgetting", forgetting, 0, 1, above=True)
    if not 0 <= floor < 1:
        raise ConfigError(f"expected a floor in [0, 1), got {floor}")
    mean, covariance = state.mean, state.covariance
    for row in given:
        if forgetting < 1:
            mean, covariance = decay_moments(mean, covariance, state.initial, forgetting)
        mean, covariance = update_moments(mean, covariance, row, floor)
    return replace(state, mean=mean, covariance=covariance, events=state.events + len(given))


def label_likelihood(labels: Int[np.ndarray, " event"], components: int) -> Float[np.ndarray, "event component"]:
    """Events whose label is known.

    Args:
        labels: ``(E,)`` from 0 to K; K is base. E ≥ 1.
        components: K+1.

    Returns:
        ``(E, K+1)``: 1 at the label, 0 elsewhere.

    Raises:
        TensorError: no labels, or labels out of range.
    """
    return np.eye(components)[as_labels(labels, None, components)]


def feedback_likelihood(
    served: Int[np.ndarray, " event"] | Float[np.ndarray, "event component"],
    reward: Float[np.ndarray, " event"],
    components: int,
    reliability: float = RELIABILITY,
) -> Float[np.ndarray, "event component"]:
    """Events whose served component was rewarded.

    A reward of 1 comes with probability ``reliability`` where the served component is the label, and with
    ``1 − reliability`` where it is not. A reward between 0 and 1 is virtual evidence, the probability that it would
    have been 1: ``L_k = r P(1 | k) + (1 − r) P(0 | k)`` (Pearl 1988, *Probabilistic Reasoning in Intelligent Systems*);
    ½ tells nothing.

    Of a blend, each component may have been what was rewarded, with its weight as the probability: the likelihood is
    the mean of the components' own. A blend of two halves then tells nothing of which of the two was right.

    Who serves may depend on all that was known before the prompt came. Where it depends on the prompt, multiply by
    :func:`evidence_likelihood` of that prompt: without it the prompts that a component gets are taken for ordinary
    ones, and the shares come out wrong, not only wide.

    Args:
        served: ``(E,)`` from 0 to K: the component that served; or ``(E, K+1)`` the weights of the blends that did.
            E ≥ 1.
        reward: ``(E,)`` in [0, 1].
        components: K+1.
        reliability: in (½, 1).

    Returns:
        ``(E, K+1)``.

    Raises:
        TensorError: served components out of range, weights off the simplex, rewards outside [0, 1] or NaN, or of
            another number.
        ConfigError: a reliability outside (½, 1).
    """
    if not 0.5 < number(reliability) < 1:
        raise ConfigError(f"expected a reliability between .5 and 1, got {shown(reliability)}")
    hit = as_points(served, "weights") if np.ndim(served) == 2 else label_likelihood(served, components)  # (E, K+1)
    if hit.shape[1] != components:
        raise TensorError(f"expected weights of {components} components, got {hit.shape[1]}")
    rewards = as_values(reward, "rewards", len(hit))[:, None]
    if rewards.min() < 0 or rewards.max() > 1:
        raise TensorError(f"expected rewards from 0 to 1, got {rewards.min():g} to {rewards.max():g}")
    success = hit * reliability + (1 - hit) * (1 - reliability)
    return rewards * success + (1 - rewards) * (1 - success)


def evidence_likelihood(
    mean: Float[np.ndarray, "event component"], pi: Float[np.ndarray, "*event component"], floor: float = LABEL_FLOOR
) -> Float[np.ndarray, "event component"]:
    """What the prompts themselves say about their labels.

    A label is drawn from the prompt's weights, so that E[w_k | x, pi] is its probability given the prompt, and
    ``P(x | label = k) ∝ E[w_k | x, pi] / P(label = k | pi)``: the prior under which the posterior was computed is taken
    out again. What remains depends on ``pi`` only through the shape of the prior of ``w``, and counts as constant.

    Args:
        mean: ``(E, K+1)`` posterior means of the prompts' weights. E ≥ 1.
        pi: ``(K+1,)`` the shares that they were computed under, or ``(E, K+1)`` those of each.
        floor: share of labels that falls on all components alike.

    Returns:
        ``(E, K+1)``, the largest of each event 1.

    Raises:
        TensorError: means or shares off the simplex, or whose shapes do not fit.
        ConfigError: a floor outside [0, 1).
    """
    means, shares = as_points(mean, "means"), as_points(np.atleast_2d(pi), "pi")
    if shares.shape not in ((1, means.shape[1]), means.shape):
        raise TensorError(f"expected pi of shape ({means.shape[1]},) or {means.shape}, got shape {np.shape(pi)}")
    likelihood = means / np.maximum(label_probability(shares, floor), np.finfo(np.float64).tiny)
    return likelihood / likelihood.max(axis=1, keepdims=True)
