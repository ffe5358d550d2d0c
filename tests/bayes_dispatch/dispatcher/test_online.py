"""The serving prior is exact where it can be, and near the true posterior elsewhere. Streams can be cut, forgetting
decays to the start, order of experts does not matter, and no stream breaks its moments."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from bayes_dispatch.dispatcher.prior.moment_filter import (
    are_moments,
    dirichlet_moments,
    label_probability,
    update_moments,
)
from bayes_dispatch.dispatcher.prior.online import (
    PriorState,
    evidence_likelihood,
    feedback_likelihood,
    label_likelihood,
    observe,
    prior_state,
)
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.views import VectorsView
from bayes_dispatch.errors import ConfigError, TensorError

NAMES = ("a", "b", "c", "base")
INITIAL = np.array([3.0, 3.0, 3.0, 1.5])
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture
def state() -> PriorState:
    return prior_state(INITIAL, NAMES)


def likelihoods_of(seed: int, count: int = 6) -> np.ndarray:
    """Events of all kinds, from sharp to dull."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(0, rng.choice([0.3, 3.0, 30.0], (count, 1)), (count, 4)))


def test_floor_is_that_of_the_program() -> None:
    """Labels and weights have the same expected shares."""
    pi = np.random.default_rng(0).dirichlet(INITIAL)
    sites = {"pi": torch.as_tensor(pi), "kappa": torch.tensor(1.0, dtype=torch.float64)}
    expected = DispatchModel(3, (VectorsView(1),)).prior_concentration(sites).numpy()
    np.testing.assert_allclose(label_probability(pi), expected, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, size=st.sampled_from([0.1, 1.0, 1e3, 1e6]))
def test_sure_labels_are_counted(seed: int, size: float) -> None:
    """Without a floor a label adds one to its component, whatever came before."""
    rng = np.random.default_rng(seed)
    concentration, labels = size * rng.uniform(0.1, 3, 4), rng.integers(0, 4, 20)
    counted = observe(prior_state(concentration, NAMES), label_likelihood(labels, 4), floor=0.0)
    expected = concentration + np.bincount(labels, minlength=4)
    np.testing.assert_allclose(counted.concentration, expected, rtol=1e-11)
    np.testing.assert_allclose(counted.covariance, dirichlet_moments(expected)[1], rtol=1e-9)
    assert counted.events == 20


def test_a_label_tells_less_the_likelier_it_came_from_the_floor(state: PriorState) -> None:
    totals = [
        observe(state, label_likelihood(np.array([3]), 4), floor=floor).concentration.sum()
        for floor in (0.0, 1e-6, 0.05, 0.5)
    ]
    assert totals[0] - totals[1] < 1e-4
    assert (np.diff(totals) < 0).all()


@settings(max_examples=30, deadline=None)
@given(seed=seeds, size=st.sampled_from([1e-2, 1.0, 1e3]))
def test_one_event_has_the_moments_of_the_exact_posterior(seed: int, size: float) -> None:
    """Those of the mixture of Dirichlets, by the law of total covariance."""
    concentration, likelihood = size * np.random.default_rng(seed).uniform(0.2, 3, 4), likelihoods_of(seed, 1)[0]
    parts = np.append(0.95 * concentration / concentration.sum() * likelihood, 0.05 / 4 * likelihood.sum())
    parts /= parts.sum()
    means, covariances = dirichlet_moments(concentration + np.eye(5, 4))  # the last is the prior
    mean = parts @ means
    between = np.einsum("c,ci,cj->ij", parts, means - mean, means - mean)
    covariance = np.einsum("c,cij->ij", parts, covariances) + between
    found = observe(prior_state(concentration, NAMES), likelihood[None])
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-8, atol=1e-10 * np.trace(covariance))


def test_short_stream_against_importance_sampling() -> None:
    """Twelve events of all kinds: moments of the exact posterior, by 400,000 weighted draws of the prior.

    Means within .03 standard deviations, covariances within .05 variances; the sampling takes less than .01 of these.
    """
    rng = np.random.default_rng(0)
    events = np.concatenate(
        [
            label_likelihood(np.array([0, 0, 3, 1]), 4),
            feedback_likelihood(np.array([0, 1, 1, 2]), np.array([1.0, 0.0, 0.3, 0.9]), 4),
            np.exp(rng.normal(0, 1.5, (4, 4))),
        ]
    )
    draws = rng.dirichlet(INITIAL, 400_000)
    weights = np.prod(label_probability(draws) @ events.T, axis=1)
    weights /= weights.sum()
    mean = weights @ draws
    covariance = (weights[:, None] * (draws - mean)).T @ (draws - mean)
    spread = np.sqrt(np.diag(covariance))
    found = observe(prior_state(INITIAL, NAMES), events)
    assert (np.abs(found.mean - mean) < 0.03 * spread).all()
    assert (np.abs(found.covariance - covariance) < 0.05 * np.outer(spread, spread)).all()


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_permuting_experts_permutes_the_prior(seed: int) -> None:
    order = np.append(np.random.default_rng(seed).permutation(3), 3)
    initial, events = np.array([0.5, 3.0, 40.0, 1.5]), likelihoods_of(seed)
    ours = observe(prior_state(initial, NAMES), events, forgetting=0.9)
    theirs = observe(prior_state(initial[order], [NAMES[k] for k in order]), events[:, order], forgetting=0.9)
    np.testing.assert_allclose(theirs.concentration, ours.concentration[order], rtol=1e-9)
    np.testing.assert_allclose(theirs.interval(), ours.interval()[:, order], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_streams_are_independent_and_can_be_cut_anywhere(seed: int) -> None:
    """Several priors at once = one by one; events in two calls = in one; a likelihood's scale does not matter."""
    state, events = prior_state(INITIAL, NAMES), likelihoods_of(seed)
    whole = observe(state, events, 0.95)
    cut = observe(observe(state, events[:2], 0.95), events[2:], 0.95)
    np.testing.assert_array_equal(whole.concentration, cut.concentration)
    assert whole.events == cut.events == 6
    scales = np.exp(np.random.default_rng(seed).normal(0, 50, (6, 1)))
    np.testing.assert_allclose(observe(state, scales * events, 0.95).concentration, whole.concentration, rtol=1e-9)
    several = update_moments(*dirichlet_moments(np.tile(INITIAL, (6, 1))), events)
    for row, event in enumerate(events):
        for ours, theirs in zip(several, update_moments(*dirichlet_moments(INITIAL), event), strict=True):
            np.testing.assert_allclose(ours[row], theirs, rtol=1e-9, atol=1e-12)


def test_events_that_tell_nothing_change_nothing(state: PriorState) -> None:
    """Equal likelihoods, rewards of one half, no events, and a posterior that is its prior."""
    after = observe(state, likelihoods_of(1))
    for events in (
        np.full((50, 4), 0.3),
        feedback_likelihood(np.arange(4), np.full(4, 0.5), 4),
        np.zeros((0, 4)),
        evidence_likelihood(np.tile(label_probability(after.mean), (9, 1)), after.mean),
    ):
        np.testing.assert_allclose(observe(after, events).concentration, after.concentration, rtol=1e-9)


def test_forgetting_decays_to_the_initial_state(state: PriorState) -> None:
    """Geometrically under events that tell nothing; before, not after, an event that tells something."""
    after = observe(state, label_likelihood(np.full(100, 1), 4))
    dull = observe(after, np.ones((10, 4)), forgetting=0.9)
    np.testing.assert_allclose(dull.concentration - INITIAL, 0.9**10 * (after.concentration - INITIAL), rtol=1e-9)
    last = observe(after, label_likelihood(np.array([2]), 4), forgetting=1e-12, floor=0.0)
    np.testing.assert_allclose(last.concentration, INITIAL + np.eye(4)[2], rtol=1e-9)
    np.testing.assert_array_equal(last.initial, INITIAL)


def test_forgetting_follows_a_change(state: PriorState) -> None:
    labels = label_likelihood(np.repeat([0, 2], [400, 60]), 4)
    assert observe(state, labels).mean.argmax() == 0
    assert observe(state, labels, forgetting=0.95).mean.argmax() == 2


def test_graded_rewards_lie_between_the_extremes(state: PriorState) -> None:
    """The served component's share rises with the reward, from that of 0 to that of 1."""
    rewards = np.linspace(0, 1, 11)
    events = feedback_likelihood(np.full(11, 1), rewards, 4)
    shares = [observe(state, event[None]).mean[1] for event in events]
    assert (np.diff(shares) > 0).all()
    assert shares[5] == pytest.approx(state.mean[1])
    np.testing.assert_allclose(events[-1], [0.05, 0.95, 0.05, 0.05])
    np.testing.assert_allclose(events[0], [0.95, 0.05, 0.95, 0.95])
    reliable = feedback_likelihood(np.array([1]), np.array([1.0]), 4, reliability=0.999)
    assert observe(state, reliable).mean[1] > shares[-1]


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_evidence_takes_the_prior_out_again(seed: int) -> None:
    """The likelihood that made a posterior comes back from it, under one prior or one for each prompt."""
    rng = np.random.default_rng(seed)
    likelihood = np.exp(rng.normal(0, 2, (5, 4)))
    for pi in (rng.dirichlet(INITIAL), rng.dirichlet(INITIAL, 5)):
        joint = label_probability(pi) * likelihood
        found = evidence_likelihood(joint / joint.sum(1, keepdims=True), pi)
        np.testing.assert_allclose(found, likelihood / likelihood.max(1, keepdims=True), rtol=1e-9)


def test_intervals_are_those_of_the_marginals_before_any_event() -> None:
    state = prior_state(np.array([2.0, 5.0, 0.3, 1.0]), NAMES)
    marginals = beta(state.initial, 8.3 - state.initial)
    np.testing.assert_allclose(state.concentration, state.initial, rtol=1e-12)
    np.testing.assert_allclose(state.mean, marginals.mean(), rtol=1e-12)
    np.testing.assert_allclose(state.interval(0.8), marginals.ppf([[0.1], [0.9]]), rtol=1e-9)


def test_rewards_of_one_component_tell_little_about_the_others() -> None:
    """What no Dirichlet says: the served share is known well, how the rest is divided hardly better than before."""
    rewards = np.random.default_rng(0).permutation(np.repeat([1.0, 0.0], 200))
    state = prior_state(INITIAL, NAMES)
    after = observe(state, feedback_likelihood(np.zeros(400, int), rewards, 4))
    (before,), (left,) = (np.diff(s.interval(), axis=0) / (1 - s.mean[0]) for s in (state, after))
    assert left[0] < 0.4 * before[0]
    assert (left[1:] > 0.8 * before[1:]).all()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, forgetting=st.sampled_from([1.0, 0.9]))
def test_wild_streams_keep_moments_that_shares_can_have(seed: int, forgetting: float) -> None:
    """From initial concentrations between a thousandth and thousands, and events that contradict each other."""
    rng = np.random.default_rng(seed)
    state = prior_state(np.exp(rng.normal(0, 3, 4)), NAMES)
    for count in (1, 5, 40):
        state = observe(state, likelihoods_of(seed + count, count), forgetting)
        assert are_moments(state.mean, state.covariance)
        assert state.mean.sum() == pytest.approx(1, abs=1e-9)
        assert (state.concentration > 0).all()
        assert state.concentration.sum() < state.initial.sum() + 47
        lower, upper = state.interval()
        assert ((lower >= 0) & (lower <= upper) & (upper <= 1)).all()  # both underflow at concentrations near 0


def test_state_cannot_be_changed(state: PriorState) -> None:
    with pytest.raises(ValueError, match="read-only"):
        state.mean[0] = 9
    observe(state, likelihoods_of(0))
    np.testing.assert_array_equal(state.mean, INITIAL / 10.5)


def test_bad_input(unchecked: None, state: PriorState) -> None:
    for initial in ([1.0, 2.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, np.nan, 1.0], [1.0, 1.0, np.inf, 1.0]):
        with pytest.raises(ConfigError, match=r"^expected 4 finite initial concentrations > 0, got \["):
            prior_state(np.array(initial), NAMES)
    mean, covariance = state.mean, state.covariance
    skew = np.zeros((4, 4))
    skew[0, 1] = 1e-3
    apart = np.array([[1.0, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [0, 0, -1, 1]])
    for changes, message in (
        ({"mean": mean[:3]}, r"expected a finite mean of shape \(4,\)"),
        ({"covariance": covariance * np.nan}, r"expected a finite covariance of shape \(4, 4\)"),
        ({"initial": -INITIAL}, r"expected initial concentrations > 0, got \[-3\.0"),
        ({"mean": 2 * mean}, "expected a mean on the simplex, got"),
        ({"mean": np.array([0.0, 0.5, 0.25, 0.25])}, "expected a mean on the simplex, got"),
        ({"covariance": covariance + skew}, "expected a symmetric covariance"),
        ({"covariance": covariance + 1e-3}, "expected a symmetric covariance"),
        ({"covariance": -covariance}, "expected a symmetric covariance of positive variances"),
        ({"covariance": apart}, "expected a covariance that shares of this mean can have"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(state, **changes)
    for names in (("a", "a", "b", "base"), ("a", "b", "c", "d"), ("base",)):
        with pytest.raises(ConfigError, match='expected distinct names of experts and then "base", got'):
            replace(state, names=names)
    for events in (-1, 1.5):
        with pytest.raises(ConfigError, match="expected events to be a whole number ≥ 0, got"):
            replace(state, events=events)
    with pytest.raises(ConfigError, match="expected a probability between 0 and 1, got 1"):
        state.interval(1)
    with pytest.raises(TensorError, match=r"expected likelihoods of shape \(E, 4\), got shape \(2, 3\)"):
        observe(state, np.ones((2, 3)))
    for row in ([0.0, 0, 0, 0], [1, -1, 0, 0], [1, np.nan, 0, 0], [np.inf, 1, 0, 0]):
        with pytest.raises(TensorError, match="expected finite likelihoods ≥ 0, one of each event > 0, got others"):
            observe(state, np.array([row]))
    for forgetting in (0.0, 1.1, np.nan):
        with pytest.raises(ConfigError, match="expected forgetting to be a finite number > 0 and ≤ 1, got"):
            observe(state, np.ones((1, 4)), forgetting)
    with pytest.raises(ConfigError, match=r"expected a floor in \[0, 1\), got 1"):
        observe(state, np.ones((1, 4)), floor=1)
    with pytest.raises(ConfigError, match=r"expected a floor in \[0, 1\), got -1"):
        label_probability(INITIAL, -1)
    for labels in ([4], [-1]):
        with pytest.raises(TensorError, match="expected labels from 0 to 3, got"):
            label_likelihood(np.array(labels), 4)
    with pytest.raises(TensorError, match="expected at least 1 label, got none"):
        label_likelihood(np.zeros(0, int), 4)
    with pytest.raises(TensorError, match="expected 1 integer labels, got float64"):
        feedback_likelihood(np.array([1.0]), np.ones(1), 4)
    with pytest.raises(TensorError, match=r"expected rewards of shape \(2,\), got shape \(1,\)"):
        feedback_likelihood(np.array([1, 2]), np.ones(1), 4)
    with pytest.raises(TensorError, match="expected finite rewards, got 1 that are NaN or infinite"):
        feedback_likelihood(np.array([1, 2]), np.array([1, np.nan]), 4)
    for rewards in ([0.0, 1.1], [-0.1, 0.0]):
        with pytest.raises(TensorError, match="expected rewards from 0 to 1, got"):
            feedback_likelihood(np.array([1, 2]), np.array(rewards), 4)
    for reliability in (0.5, 1.0):
        with pytest.raises(ConfigError, match=r"expected a reliability between \.5 and 1, got"):
            feedback_likelihood(np.array([1]), np.ones(1), 4, reliability)
    with pytest.raises(TensorError, match=r"expected pi of shape \(4,\) or \(2, 4\), got shape \(3,\)"):
        evidence_likelihood(np.full((2, 4), 0.25), np.full(3, 1 / 3))
    with pytest.raises(TensorError, match="expected means on the simplex"):
        evidence_likelihood(np.ones((2, 4)), np.full(4, 0.25))


def test_a_blend_is_rewarded_for_all_its_components() -> None:
    """Of one component it is that component's own likelihood, bit for bit; of two halves, neither was right more."""
    rewards = np.array([1.0, 0.3, 0.0, 0.9])
    alone = feedback_likelihood(np.arange(4), rewards, 4)
    np.testing.assert_array_equal(feedback_likelihood(np.eye(4), rewards, 4), alone)
    halves = feedback_likelihood(np.array([[0.5, 0.5, 0, 0]]), np.ones(1), 4)[0]
    np.testing.assert_allclose(halves, [0.5, 0.5, 0.05, 0.05])
    for wrong in (np.array([[0.5, 0.6, 0, 0]]), np.array([[0.5, 0.5, 0]])):
        with pytest.raises(TensorError, match="expected weights"):
            feedback_likelihood(wrong, np.ones(1), 4)
