"""What every blend promises: weights on the simplex, for each prompt alone, permuted with the experts. How particles
are drawn and weighed; blends that equal others; names and settings, and which are refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, UnknownNameError
from bayes_dispatch.experts.vectors import NAMES_OF_BLENDS
from bayes_dispatch.inference.two_pass.blends import (
    ALIASES,
    BLENDS,
    DEFAULT_BLEND,
    BestExpert,
    Blend,
    FixedWeights,
    PosteriorMean,
    PosteriorPredictive,
    RefinedMean,
    ThompsonSample,
    TopK,
    as_blend,
)

NAMES = ("a", "b", "c", "base")
EVERY: list[Blend] = [
    PosteriorMean(),
    TopK(1),
    TopK(2),
    TopK(4),
    BestExpert(),
    ThompsonSample(),
    PosteriorPredictive(),
    PosteriorPredictive(1),
    PosteriorPredictive(4),
    PosteriorPredictive(5),
    PosteriorPredictive(16),
    PosteriorPredictive(9, switching=(0.2,), flat=0.0, vertex_mass=0.0),
    PosteriorPredictive(merge=0.0),
]


def posterior(seed: int, prompts: int = 3, draws: int = 20, prior: bool = False) -> DispatchPosterior:
    """Dirichlet draws, sharp or flat, no two components alike; with what was known before the prompt, or without."""
    rng = np.random.default_rng(seed)
    alphas = rng.uniform(0.1, 5, size=(prompts, len(NAMES)))
    weights = np.stack([rng.dirichlet(alpha, size=draws) for alpha in alphas], axis=1)
    if not prior:
        return DispatchPosterior(weights, NAMES)
    before, ratios = rng.dirichlet(np.ones(len(NAMES)), prompts), rng.normal(0, 3, (draws, prompts))
    return DispatchPosterior(weights, NAMES, prior=before, log_ratios=ratios)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), prompts=st.integers(1, 4), prior=st.booleans())
@pytest.mark.parametrize("blend", EVERY, ids=repr)
def test_laws_of_every_blend(blend: Blend, seed: int, prompts: int, prior: bool) -> None:
    assert isinstance(blend, Blend)
    given_posterior = posterior(seed, prompts, prior=prior)
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
        if particles.target is not None:
            assert alone.target is not None
            np.testing.assert_allclose(particles.target.sum(-1), 1)
            np.testing.assert_allclose(alone.target[0], particles.target[i])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(4)))
@pytest.mark.parametrize("blend", [b for b in EVERY if not isinstance(b, PosteriorPredictive)], ids=repr)
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
        """Of fewer than four none is a vertex."""
        for draws in range(1, 4):
            particles = PosteriorPredictive(draws).particles(posterior(0))
            np.testing.assert_array_equal(particles.weights, posterior(0).weights[:draws].swapaxes(0, 1))
            np.testing.assert_allclose(particles.mass, 1 / draws)

    def test_many_particles_begin_with_the_vertices_and_the_mean(self) -> None:
        given_posterior = posterior(0)
        particles = PosteriorPredictive(9, vertex_mass=0.4, flat=0.2).particles(given_posterior)
        assert particles.mass.shape == (3, 9)
        for i in range(3):
            np.testing.assert_array_equal(particles.weights[i, :4], np.eye(4))
            np.testing.assert_allclose(particles.weights[i, 4], given_posterior.weights[:, i].mean(0))
            np.testing.assert_array_equal(particles.weights[i, 5:], given_posterior.weights[:4, i])
            mean = given_posterior.weights[:, i].mean(0)
            np.testing.assert_allclose(particles.mass[i, :4], 0.8 * 0.4 * mean + 0.2 / 4)
            np.testing.assert_allclose(particles.mass[i, 4:], 0.8 * 0.6 / 5)

    def test_three_particles_of_one_expert_are_its_vertices_and_the_mean(self) -> None:
        one = DispatchPosterior(np.random.default_rng(0).dirichlet([1.0, 1.0], (8, 2)), ("sort", "base"))
        weights = PosteriorPredictive(3).particles(one).weights
        np.testing.assert_allclose(weights, np.concatenate([np.tile(np.eye(2), (2, 1, 1)), one.mean[:, None]], 1))

    @pytest.mark.parametrize(
        ("experts", "rows", "vertices"),
        [(1, 16, 2), (8, 16, 9), (10, 16, 11), (18, 24, 19), (30, 32, 31), (60, 32, 16)],
    )
    def test_default_rows(self, experts: int, rows: int, vertices: int) -> None:
        """Every component has a vertex as long as 32 rows suffice; the same blend as that number's."""
        weights = np.random.default_rng(0).dirichlet(np.ones(experts + 1), (20, 2))
        many = DispatchPosterior(weights, (*(f"expert {k}" for k in range(experts)), "base"))
        for default, given_rows in (
            (PosteriorPredictive(), PosteriorPredictive(rows)),
            (RefinedMean(), RefinedMean(rows)),
        ):
            found, expected = default.particles(many), given_rows.particles(many)
            assert found.weights.shape[1] == rows
            assert ((found.weights == 1).any(-1).sum(1) == vertices).all()
            for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
                np.testing.assert_array_equal(one, other)
        if vertices == experts + 1:
            np.testing.assert_array_equal(found.weights[:, :vertices], np.tile(np.eye(vertices), (2, 1, 1)))

    @pytest.mark.parametrize("prior", [False, True])
    def test_half_of_too_few_particles_for_all_vertices_are_the_likeliest_ones(self, prior: bool) -> None:
        """Base and the experts of the largest posterior means, which share the mass that all vertices would have."""
        known = posterior(0, prior=prior)
        particles = PosteriorPredictive(4, vertex_mass=0.4, flat=0.2).particles(known)
        assert particles.mass.shape == (3, 4)
        np.testing.assert_allclose(particles.mass.sum(1), 1)
        np.testing.assert_allclose(particles.target.sum(1), 1)
        for i in range(3):
            best = int(known.mean[i, :-1].argmax())
            np.testing.assert_array_equal(particles.weights[i, :2], np.eye(4)[[best, 3]])
            np.testing.assert_allclose(particles.weights[i, 2], known.mean[i])
            np.testing.assert_array_equal(particles.weights[i, 3], known.weights[0, i])
            share = known.mean[i, [best, 3]] / known.mean[i, [best, 3]].sum()
            np.testing.assert_allclose(particles.target[i, :2], 0.8 * 0.4 * share + 0.2 / 2)
            if known.prior is not None:
                share = known.prior[i, [best, 3]] / known.prior[i, [best, 3]].sum()
            np.testing.assert_allclose(particles.mass[i, :2], 0.8 * 0.4 * share + 0.2 / 2)

    def test_the_prompt_is_not_counted_before_its_tokens_are(self) -> None:
        """Masses are those of the prior: of vertices its mean, of draws their ratios; features tell the target."""
        known = posterior(0, prior=True)
        assert known.prior is not None
        assert known.log_ratios is not None
        particles = PosteriorPredictive(9, vertex_mass=0.4, flat=0.2).particles(known)
        unread = PosteriorPredictive(9, vertex_mass=0.4, flat=0.2).particles(posterior(0))
        np.testing.assert_array_equal(particles.weights, unread.weights)
        np.testing.assert_allclose(particles.target, unread.mass)
        np.testing.assert_allclose(unread.target, unread.mass)
        np.testing.assert_allclose(particles.mass[:, :4], 0.8 * 0.4 * known.prior + 0.2 / 4)
        np.testing.assert_allclose(particles.mass[:, 4], 0.8 * 0.6 / 5)
        for i in range(3):
            ratios = np.exp(known.log_ratios[:4, i])
            ratios = np.minimum(ratios, 2 * ratios.mean())  # none above √4 times their mean
            np.testing.assert_allclose(particles.mass[i, 5:], 0.8 * 0.6 * 4 / 5 * ratios / ratios.sum())
        few = PosteriorPredictive(1).particles(known)
        np.testing.assert_allclose(few.mass, 1)

    def test_draws_of_single_experts_have_nothing_of_the_flat_part(self) -> None:
        """Where draws are one-hot, each vertex has a fourth of the flat part, once."""
        even = DispatchPosterior(np.eye(4)[np.arange(64) % 4][:, None], NAMES)
        particles = PosteriorPredictive(16, flat=0.4).particles(even)
        np.testing.assert_allclose(particles.mass[0, :4], 0.6 * 0.5 / 4 + 0.4 / 4)
        np.testing.assert_allclose(particles.mass[0, 4:], 0.6 * 0.5 / 12)

    def test_settings_travel_with_the_particles(self) -> None:
        particles = PosteriorPredictive(5, switching=(0.2, 0.01), merge=0.5).particles(posterior(0))
        assert (particles.switching, particles.merge) == ((0.2, 0.01), 0.5)
        assert PosteriorMean().particles(posterior(0)).switching == (0.0,)

    @pytest.mark.parametrize("draws", [2, 3, 6, 7, 20])
    def test_a_few_draws_are_all_taken(self, draws: int) -> None:
        """By default, beside each vertex and the mean; these have as much mass as beside more."""
        few = posterior(0, draws=draws)
        for prior in (False, True):
            particles = PosteriorPredictive().particles(posterior(0, draws=draws, prior=prior))
            assert particles.weights.shape == (3, min(16, 5 + draws), 4)
            np.testing.assert_array_equal(particles.weights[:, 5:], few.weights[:11].swapaxes(0, 1))
            np.testing.assert_allclose(particles.mass.sum(1), 1)
            np.testing.assert_allclose(particles.mass[:, :4].sum(1), 0.94 * 0.5 + 0.06)

    @pytest.mark.parametrize("blend", [PosteriorPredictive(), PosteriorPredictive(9), RefinedMean()], ids=repr)
    def test_a_single_draw_leaves_nothing_open(self, blend: Blend) -> None:
        known = posterior(0, draws=1)
        particles = blend.particles(known)
        np.testing.assert_array_equal(particles.weights, known.weights.swapaxes(0, 1))
        np.testing.assert_array_equal(particles.mass, np.ones((3, 1)))

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

    @pytest.mark.parametrize("weights", [1.0, [[0.5, 0.5]]])
    def test_of_another_shape(self, weights: Any, unchecked: None) -> None:
        with pytest.raises(ConfigError, match=r"expected weights \(K \+ 1,\), got shape \("):
            FixedWeights(weights)

    def test_another_number_of_components(self) -> None:
        with pytest.raises(ConfigError, match="expected 4 weights, got 2"):
            FixedWeights((0.5, 0.5)).particles(posterior(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "k to be a whole number ≥ 1, got 0"),
        (lambda: TopK(1.5), "k to be a whole number ≥ 1, got 1.5"),
        (lambda: TopK(5).particles(posterior(0)), "k of at most 4 components, got 5"),
        (lambda: RefinedMean(0), "draws to be a whole number ≥ 1, got 0"),
        (
            lambda: PosteriorPredictive(5, switching=(0.1, 1.0)),
            "a switching rate to be a finite number ≥ 0 and < 1, got 1.0",
        ),
        (lambda: PosteriorPredictive(5, switching=()), r"switching rates from 0 to 1, got \(\)"),
        (lambda: PosteriorPredictive(5, flat=1), "flat to be a finite number ≥ 0 and < 1, got 1"),
        (
            lambda: PosteriorPredictive(5, vertex_mass=float("nan")),
            "vertex_mass to be a finite number ≥ 0 and < 1, got nan",
        ),
        (lambda: PosteriorPredictive(5, merge=-1), "merge to be a finite number ≥ 0, got -1"),
    ],
)
def test_settings_out_of_range(make: Any, message: str, unchecked: None) -> None:
    assert TopK(np.int64(3)).name == "top_k(3)"  # type: ignore[arg-type]  # NumPy's numbers are numbers
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_name_gives_the_blend_that_has_it() -> None:
    for blend in (*EVERY, *(kind() for kind in BLENDS.values())):
        assert as_blend(blend) is blend
        assert as_blend(blend.name) == blend
    assert len({blend.name for blend in EVERY}) == len(EVERY)
    assert [kind().name.partition("(")[0] for kind in BLENDS.values()] == list(BLENDS)
    assert as_blend("predictive(4, merge=0.0)") == PosteriorPredictive(4, merge=0.0)
    named = (PosteriorPredictive(), PosteriorPredictive(merge=0.0), RefinedMean(), RefinedMean(16))
    assert [blend.name for blend in named] == [
        *("posterior_predictive", "posterior_predictive(merge=0.0)", "refined_mean", "refined_mean(16)")
    ]
    assert {*BLENDS, *ALIASES} == NAMES_OF_BLENDS  # so that no expert is called so
    assert {alias: as_blend(alias) for alias in ALIASES} == {
        "max": BestExpert(),
        "weighted_average": PosteriorMean(),
        "thompson": ThompsonSample(),
        "predictive": DEFAULT_BLEND,
    }


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("average", UnknownNameError, r"expected a blend of best_expert, .*, a, b, c, base, got 'average'"),
        ("top_k(1.5)", ConfigError, "k to be a whole number ≥ 1, got 1.5"),
        ("top_k(2, 3)", ConfigError, r"expected a blend written as top_k\(2\), got 'top_k\(2, 3\)'"),
        ("top_k(k=2, k=3)", ConfigError, r"expected a blend written as top_k\(2\), got 'top_k\(k=2, k=3\)'"),
        ("top_k(", ConfigError, "expected a blend written as"),
        ("top_k(2) + 1", ConfigError, "expected a blend written as"),
        (f"top_k({'-' * 5_000}1)", ConfigError, r"expected a blend written as top_k\(2\), got 'top_k\(-----"),
        (f"top_k({'-' * 200_000}1)", ConfigError, r"expected a blend written as top_k\(2\), got 'top_k\(-----"),
        ("max(k=exit())", ConfigError, "expected a blend written as best_expert"),
        (PosteriorMean, ConfigError, "expected a blend such as .*, or a name, got <class"),
    ],
)
def test_what_is_no_blend(name: Any, error: type[Exception], message: str, unchecked: None) -> None:
    with pytest.raises(error, match=message) as raised:
        as_blend(name, NAMES)
    assert len(str(raised.value)) < 250


def test_an_expert_of_a_former_name_is_itself() -> None:
    assert as_blend("max", ("max", "base")).name != "best_expert"
    with pytest.raises(ConfigError, match=r"expected a blend written as top_k\(2\), got 'top_k\(2\)\(3\)'"):
        as_blend("top_k(2)(3)")
