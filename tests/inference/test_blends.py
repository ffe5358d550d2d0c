"""What every blend promises, and what each is for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, UnknownNameError
from bayes_dispatch.inference.two_pass.blends import (
    BLENDS,
    BestExpert,
    Blend,
    FixedWeights,
    PosteriorMean,
    PosteriorPredictive,
    RefinedMean,
    ThompsonSample,
    TopK,
    blend_by_name,
)

NAMES = ("a", "b", "c", "base")
EVERY: list[Blend] = [
    PosteriorMean(),
    TopK(1),
    TopK(2),
    TopK(4),
    BestExpert(),
    ThompsonSample(),
    PosteriorPredictive(1),
    PosteriorPredictive(4),
    PosteriorPredictive(5),
    PosteriorPredictive(16),
    PosteriorPredictive(9, switching=(0.2,), flat=0.0, vertex_mass=0.0),
]


def posterior(seed: int, prompts: int = 3, draws: int = 20) -> DispatchPosterior:
    """Dirichlet draws, sharp or flat, no two components alike."""
    rng = np.random.default_rng(seed)
    alphas = rng.uniform(0.1, 5, size=(prompts, len(NAMES)))
    return DispatchPosterior(np.stack([rng.dirichlet(alpha, size=draws) for alpha in alphas], axis=1), NAMES)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), prompts=st.integers(1, 4))
@pytest.mark.parametrize("blend", EVERY, ids=repr)
def test_laws_of_every_blend(blend: Blend, seed: int, prompts: int) -> None:
    assert isinstance(blend, Blend)
    given_posterior = posterior(seed, prompts)
    particles = blend.particles(given_posterior)
    assert particles.weights.shape == (*particles.mass.shape, len(NAMES))
    assert len(particles.weights) == prompts
    assert (particles.weights >= 0).all()
    assert (particles.mass >= 0).all()
    np.testing.assert_allclose(particles.weights.sum(-1), 1)
    np.testing.assert_allclose(particles.mass.sum(-1), 1)
    for i in range(prompts):  # each prompt alone
        alone = blend.particles(given_posterior.select([i]))
        np.testing.assert_allclose(alone.weights[0], particles.weights[i])
        np.testing.assert_allclose(alone.mass[0], particles.mass[i])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(4)))
@pytest.mark.parametrize("blend", [b for b in EVERY if b.name != "predictive"], ids=repr)
def test_permuting_the_experts_permutes_the_weights(blend: Blend, seed: int, order: list[int]) -> None:
    given_posterior = posterior(seed)
    permuted = DispatchPosterior(given_posterior.weights[..., order], tuple(NAMES[k] for k in order))
    expected = blend.particles(given_posterior).weights[..., order]
    np.testing.assert_allclose(blend.particles(permuted).weights, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_relations_between_blends(seed: int) -> None:
    given_posterior = posterior(seed)

    def weights(blend: Blend) -> np.ndarray:
        return blend.particles(given_posterior).weights[:, 0]

    np.testing.assert_allclose(weights(PosteriorMean()), given_posterior.weights.mean(0))
    np.testing.assert_allclose(weights(TopK(4)), weights(PosteriorMean()))
    np.testing.assert_allclose(weights(TopK(1)), weights(BestExpert()))
    np.testing.assert_allclose(weights(ThompsonSample()), given_posterior.weights[0])
    np.testing.assert_allclose(weights(PosteriorPredictive(1)), weights(ThompsonSample()))
    best = weights(BestExpert())
    assert (best.max(1) == 1).all()
    assert (best.argmax(1) == given_posterior.mean.argmax(1)).all()
    for k in (2, 3):
        for got, mean in zip(weights(TopK(k)), given_posterior.mean, strict=True):
            largest = sorted(mean)[-k:]
            expected = [value / sum(largest) if value in largest else 0 for value in mean]
            np.testing.assert_allclose(got, expected)


class TestPosteriorPredictive:
    def test_few_particles_are_draws_of_equal_mass(self) -> None:
        """Up to K + 1 there is no room for the vertices."""
        for draws in range(1, 5):
            particles = PosteriorPredictive(draws).particles(posterior(0))
            np.testing.assert_array_equal(particles.weights, posterior(0).weights[:draws].swapaxes(0, 1))
            np.testing.assert_allclose(particles.mass, 1 / draws)

    def test_many_particles_begin_with_the_vertices_and_the_mean(self) -> None:
        given_posterior = posterior(0)
        particles = PosteriorPredictive(9, vertex_mass=0.4).particles(given_posterior)
        assert particles.mass.shape == (3, 9)
        for i in range(3):
            np.testing.assert_array_equal(particles.weights[i, :4], np.eye(4))
            np.testing.assert_allclose(particles.weights[i, 4], given_posterior.weights[:, i].mean(0))
            np.testing.assert_array_equal(particles.weights[i, 5:], given_posterior.weights[:4, i])
            np.testing.assert_allclose(particles.mass[i, :4], 0.4 * given_posterior.weights[:, i].mean(0))
            np.testing.assert_allclose(particles.mass[i, 4:], 0.6 / 5)

    def test_settings_travel_with_the_particles(self) -> None:
        particles = PosteriorPredictive(5, switching=(0.2, 0.01), flat=0.3).particles(posterior(0))
        assert (particles.switching, particles.flat) == ((0.2, 0.01), 0.3)
        assert PosteriorMean().particles(posterior(0)).switching == (0.0,)

    def test_too_few_draws(self) -> None:
        with pytest.raises(ConfigError, match="expected a posterior of at least 25 draws, got 20"):
            PosteriorPredictive(30).particles(posterior(0))


class TestFixedWeights:
    def test_the_same_for_every_prompt(self) -> None:
        particles = FixedWeights((0.25, 0.75, 0.0, 0.0)).particles(posterior(0))
        np.testing.assert_array_equal(particles.weights, np.tile([0.25, 0.75, 0.0, 0.0], (3, 1, 1)))

    def test_a_vertex_has_the_name_of_its_component(self) -> None:
        blend = FixedWeights.vertex(NAMES, "base")
        assert (blend.name, blend.weights) == ("base", (0.0, 0.0, 0.0, 1.0))
        with pytest.raises(UnknownNameError, match="expected a component of a, b, c, base, got 'd'"):
            FixedWeights.vertex(NAMES, "d")

    @pytest.mark.parametrize("weights", [(), (0.5, 0.6), (-0.5, 1.5), (float("nan"), 1.0), (float("nan"),)])
    def test_off_the_simplex(self, weights: tuple[float, ...]) -> None:
        with pytest.raises(ConfigError, match=r"expected .*weights.* got"):
            FixedWeights(weights)

    def test_another_number_of_components(self) -> None:
        with pytest.raises(ConfigError, match="expected 4 weights, got 2"):
            FixedWeights((0.5, 0.5)).particles(posterior(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "k of at least 1, got 0"),
        (lambda: TopK(5).particles(posterior(0)), "k of at most 4 components, got 5"),
        (lambda: PosteriorPredictive(0), "at least 1 particle, got 0"),
        (lambda: PosteriorPredictive(5, switching=(0.1, 1.0)), r"switching rates in \[0, 1\), got \(0.1, 1.0\)"),
        (lambda: PosteriorPredictive(5, switching=()), r"switching rates in \[0, 1\), got \(\)"),
        (lambda: PosteriorPredictive(5, flat=-0.1), r"flat in \[0, 1\), got -0.1"),
        (lambda: PosteriorPredictive(5, vertex_mass=float("nan")), r"vertex_mass in \[0, 1\), got nan"),
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_names_of_the_command_line() -> None:
    assert set(BLENDS) == {"weighted_average", "top_k", "max", "thompson", "predictive", "refined_mean"}
    assert blend_by_name("weighted_average") == PosteriorMean()
    assert blend_by_name("top_k", top_k=3) == TopK(3)
    assert blend_by_name("max", top_k=3, draws=7) == BestExpert()
    assert blend_by_name("thompson") == ThompsonSample()
    assert blend_by_name("predictive", draws=7) == PosteriorPredictive(7)
    assert blend_by_name("refined_mean", draws=7) == RefinedMean(7)
    assert all(blend_by_name(name).name == name for name in BLENDS)
    with pytest.raises(UnknownNameError, match=r"expected a blending mode of weighted_average, .*, got 'average'"):
        blend_by_name("average")
