"""The filter is exact inference in a hidden Markov chain, compiled or not, for prompts that wait and for tokens of
any likelihood. Entropy splits into within and between particles."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.filtering import ParticleFilter, predictive
from bayes_dispatch.model.mambaformer.compiled.switch import tensors_only

seeds = st.integers(0, 2**31)


def random_particles(seed: int, prompts: int, count: int, switching: tuple[float, ...]) -> Particles:
    rng = np.random.default_rng(seed)
    weights, mass = rng.dirichlet(np.ones(4), size=(prompts, count)), rng.dirichlet(np.ones(count), size=prompts)
    return Particles(weights, mass, switching)


def enumerate_paths(likelihood: np.ndarray, target: np.ndarray, switching: float) -> tuple[np.ndarray, float]:
    """P(particle of the next token, tokens) and P(tokens), summing the joint over all T switches and paths by force.

    Before each token after the first, the document changes (with probability ``switching``) and then draws its particle
    anew from ``target``, or stays. ``likelihood`` is (T, S).
    """
    steps, count = likelihood.shape
    joint = np.zeros(count)
    for changes in itertools.product([False, True], repeat=steps):
        for path in itertools.product(range(count), repeat=steps + 1):
            p = target[path[0]]
            for t in range(steps):
                p *= likelihood[t, path[t]]
                p *= switching * target[path[t + 1]] if changes[t] else (1 - switching) * (path[t] == path[t + 1])
            joint[path[-1]] += p
    return joint, float(joint.sum())


@settings(max_examples=25, deadline=None)
@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.4]), min_size=1, max_size=3, unique=True).map(tuple),
)
def test_the_filter_enumerates_all_paths(seed: int, steps: int, count: int, switching: tuple[float, ...]) -> None:
    particles = random_particles(seed, 2, count, switching)
    likelihood = np.random.default_rng(seed + 1).uniform(0.01, 1, size=(2, steps, count))
    weights, evidence = ParticleFilter(particles), torch.zeros(2, dtype=torch.float64)
    for t in range(steps):
        step = torch.from_numpy(likelihood[:, t]).log()
        evidence += torch.logsumexp(weights.log_weights + step, 1)
        weights.update(step[..., None])
    for n in range(2):
        of_rates = (enumerate_paths(likelihood[n], particles.mass[n], rate) for rate in switching)
        joints, totals = zip(*of_rates, strict=True)
        total = np.mean(totals)  # each rate is as likely as another
        expected = np.mean(joints, axis=0) / total
        np.testing.assert_allclose(weights.log_weights[n].exp(), expected, atol=1e-12)
        np.testing.assert_allclose(weights.state.joint[n].logsumexp(1).exp(), totals / np.sum(totals), atol=1e-12)
        np.testing.assert_allclose(evidence[n].exp(), total, rtol=1e-10)
        np.testing.assert_allclose(weights.mean()[n], expected @ particles.weights[n], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(0, 9), st.sampled_from([(0.0,), (0.1,), (0.0, 0.3, 0.001)]))
def test_the_compiled_filter_is_that_of_tensors(
    seed: int, count: int, steps: int, switching: tuple[float, ...]
) -> None:
    """Any shapes and counts, particles of no mass, impossible tokens; in one go or token by token; NaN stays NaN."""
    rng = np.random.default_rng(seed)
    particles = random_particles(seed, 3, count, switching)
    particles.mass[0] = np.eye(count)[0]
    likelihood = torch.from_numpy(rng.normal(size=(3, count, steps)) * 10.0 ** rng.integers(-1, 3))
    likelihood[rng.random(likelihood.shape) < 0.05] = -torch.inf
    if seed % 5 == 0 and steps:
        likelihood[1, 0, rng.integers(steps)] = torch.nan
    counts = torch.from_numpy(rng.random((3, steps)) < 0.8)
    slow, fast, stepwise = (ParticleFilter(particles) for _ in range(3))
    with torch.no_grad():
        with tensors_only():
            expected = slow.update(likelihood, counts)
        found = fast.update(likelihood, counts)
        single = [stepwise.update(likelihood[..., [t]], counts[:, [t]])[:, 0] for t in range(steps)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(fast.state.joint, slow.state.joint, rtol=1e-12, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(fast.log_weights, slow.log_weights, rtol=1e-12, atol=1e-10, equal_nan=True)
    if steps:
        torch.testing.assert_close(torch.stack(single, 1), found, rtol=0, atol=0, equal_nan=True)


kinds_of_filters = st.tuples(st.integers(1, 5), st.sampled_from([(0.0,), (0.1,), (0.0, 0.3)]))


@settings(max_examples=40, deadline=None)
@given(seeds, st.lists(kinds_of_filters, min_size=2, max_size=3))
def test_joined_filters_stay_what_they_are(seed: int, kinds: list[tuple[int, tuple[float, ...]]]) -> None:
    """Of any numbers of particles and rates; and so does what is left of them when some have gone."""
    rng = np.random.default_rng(seed)
    alone = [ParticleFilter(random_particles(seed + n, 1, *kind)) for n, kind in enumerate(kinds)]
    joined = ParticleFilter.at(alone[0].state)
    for other in alone[1:]:
        joined.join(ParticleFilter.at(other.state))
    before = list(range(len(kinds)))
    for left in (before, [len(kinds) - 1, 0], [0]):
        width = max(kinds[n][0] for n in left)
        joined.select([before.index(n) for n in left], width)
        before = left
        likelihood = torch.from_numpy(rng.normal(size=(len(left), width, 3)))
        joined.update(likelihood)
        for place, n in enumerate(left):
            own, count = alone[n], kinds[n][0]
            own.update(likelihood[[place], :count])
            torch.testing.assert_close(joined.log_weights[place, :count], own.log_weights[0], rtol=0, atol=1e-12)
            assert bool((joined.log_weights[place, count:] == -torch.inf).all())
            np.testing.assert_allclose(joined.mean()[place], own.mean()[0], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(1, 300), st.sampled_from([torch.float32, torch.float64]))
def test_the_compiled_mixture_is_that_of_tensors(seed: int, count: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Particles of no weight, and probabilities that are too small for a sum of probabilities."""
    rng = np.random.default_rng(seed)
    v = rng.dirichlet(np.ones(count), size=2)
    v[0] = np.eye(count)[0]
    logits = torch.from_numpy(rng.normal(size=(2, count, vocabulary)) * 10.0 ** rng.integers(-1, 4)).to(dtype)
    log_p = logits.log_softmax(-1)
    if seed % 3 == 0:  # some tokens have no probability, under one particle or all
        log_p[:, rng.integers(count), 1:] = -torch.inf
        log_p[..., -1] = -torch.inf if vocabulary > 1 else 0.0
    if seed % 5 == 0:
        log_p[1, 0, 0] = torch.nan
    with torch.no_grad():
        found = predictive(torch.from_numpy(v).log(), log_p)
        with tensors_only():
            expected = predictive(torch.from_numpy(v).log(), log_p)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_prompts_that_read_nothing_keep_their_weights() -> None:
    particles = random_particles(0, 3, 4, (0.1, 0.3))
    weights = ParticleFilter(particles)
    before = weights.state.joint.clone()
    likelihood = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(0))
    weights.update(likelihood, torch.tensor([[True], [False], [True]]))
    kept = (weights.state.joint == before).all((1, 2))
    assert kept.tolist() == [False, True, False]


def test_a_particle_of_no_mass_stays_out() -> None:
    """Log weights of −∞ harm nothing."""
    mass = np.array([[0.0, 0.5, 0.5]])
    likelihood = torch.tensor([[0.0, -5.0, -6.0]])
    for switching in ((0.0,), (0.0, 0.1)):
        weights = ParticleFilter(Particles(np.eye(3)[None], mass, switching))
        for _ in range(3):
            weights.update(likelihood[..., None])
        masses = weights.log_weights.exp()[0]
        assert masses.isfinite().all()
        assert float(masses.sum()) == pytest.approx(1)
        assert float(masses[0]) == 0
        assert predictive(weights.log_weights, torch.randn(1, 3, 5).log_softmax(-1)).entropy.isfinite().all()


@pytest.mark.parametrize("context", [nullcontext, tensors_only])
def test_a_token_that_no_particle_can_say_is_no_evidence(context: Callable[[], AbstractContextManager[None]]) -> None:
    with torch.no_grad(), context():
        for switching in ((0.0,), (0.0, 0.1)):
            one, other = (ParticleFilter(random_particles(0, 1, 3, switching)) for _ in range(2))
            said = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0))
            impossible = torch.full((1, 3, 1), -torch.inf)
            one.update(said)
            other.update(torch.cat([said[..., :1], impossible, said[..., 1:]], 2))
            torch.testing.assert_close(other.state.joint, one.state.joint, rtol=0, atol=0)


def test_very_unlikely_tokens_do_not_underflow() -> None:
    weights = ParticleFilter(random_particles(0, 1, 3, (0.0,)))
    for _ in range(100):
        weights.update(torch.tensor([[[-900.0], [-1000.0], [-1000.0]]]))
    np.testing.assert_allclose(weights.log_weights.exp(), [[1, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("context", [nullcontext, tensors_only])
def test_a_token_of_no_probability_adds_nothing(context: Callable[[], AbstractContextManager[None]]) -> None:
    """Uncertainty is that of the other tokens alone; the token may have some under another particle."""
    v = torch.tensor([[0.3, 0.7]]).double().log()
    some = torch.tensor([[[0.2, 0.8], [0.5, 0.5]]]).double()
    apart = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).double()
    with torch.no_grad(), context():
        for p in (some, some[:, :1], apart):
            weights = v if p.shape[1] == 2 else torch.zeros(1, 1).double()
            masked = torch.nn.functional.pad(p, (0, 1)).log()
            found, expected = predictive(weights, masked), predictive(weights, p.clamp(min=1e-300).log())
            assert float(found.log_probabilities[0, -1]) == -torch.inf
            for ours, theirs in zip(found[1:], expected[1:], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(2, 7))
def test_entropy_splits_into_within_and_between(seed: int, count: int, vocabulary: int) -> None:
    rng = np.random.default_rng(seed)
    v, p = rng.dirichlet(np.ones(count), size=2), rng.dirichlet(np.full(vocabulary, 0.5), size=(2, count))
    got = predictive(torch.from_numpy(v).log(), torch.from_numpy(p).clamp(min=1e-300).log())
    joint = v[..., None] * p  # P(particle, token)
    token = joint.sum(1)

    def entropy(q: np.ndarray) -> np.ndarray:
        return -(q * np.log(np.maximum(q, 1e-300))).reshape(2, -1).sum(1)

    np.testing.assert_allclose(got.log_probabilities.exp(), token, atol=1e-12)
    np.testing.assert_allclose(got.log_probabilities.exp().sum(1), 1)
    np.testing.assert_allclose(got.entropy, entropy(token), atol=1e-10)
    np.testing.assert_allclose(got.mutual_information, entropy(token) + entropy(v) - entropy(joint), atol=1e-10)
    assert (got.mutual_information >= 0).all()
    assert (got.mutual_information.numpy() <= np.minimum(entropy(v), entropy(token)) + 1e-12).all()


def test_particles_that_agree_have_nothing_to_tell() -> None:
    p = torch.randn(2, 1, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1).expand(-1, 5, -1)
    got = predictive(torch.full((2, 5), 0.2, dtype=torch.float64).log(), p)
    np.testing.assert_allclose(got.mutual_information, 0, atol=1e-12)
    torch.testing.assert_close(got.log_probabilities, p[:, 0].double(), rtol=0, atol=1e-6)


def test_particles_that_contradict_tell_all() -> None:
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).clamp(min=1e-30).log()
    got = predictive(torch.tensor([[0.5, 0.5]]).log().double(), p)
    np.testing.assert_allclose(got.mutual_information, np.log(2), atol=1e-9)
