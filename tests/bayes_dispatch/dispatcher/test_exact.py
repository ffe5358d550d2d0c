"""The posterior by sums over sets. Laws: it is what drawing from the prior and weighing by the likelihood gives; its
densities are the program's; splitting goes on to the same answer; a prompt's answer and draws are its own."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

from bayes_dispatch.checks.sbc import posterior_ranks, rank_uniformity
from bayes_dispatch.dispatcher.exact import quadrature
from bayes_dispatch.dispatcher.exact.cells import Cells, prompt_generators
from bayes_dispatch.dispatcher.exact.densities import ViewDensity
from bayes_dispatch.dispatcher.exact.quadrature import Quadrature
from bayes_dispatch.dispatcher.exact.supports import SupportPrior
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import CountsView, ProbabilitiesView, SurpriseView, VectorsView, off_zero

K = 3
SHARES = np.array([0.4, 0.3, 0.2, 0.1])
VIEWS = (VectorsView(2), CountsView(4), SurpriseView(2), ProbabilitiesView(3), VectorsView(5, "embedding"))
FULL = DispatchModel(K, VIEWS)
TREE = DispatchModel(4, (VectorsView(2),), families=(0, 1, 0, 1))


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw_sites(model: DispatchModel, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.sample_globals()


def draw_prompts(model: DispatchModel, count: int, seed: int, largest: int = 9) -> Prompts:
    rng = np.random.default_rng(seed)
    observed = {}
    for view in model.views:
        if view.kind == "counts":
            observed[view.name] = torch.tensor(rng.integers(0, largest, (count, view.width)) * 1.0)
        elif view.kind == "probabilities":
            observed[view.name] = off_zero(torch.tensor(rng.dirichlet(np.full(view.width, 0.2), count)))
        else:
            observed[view.name] = torch.tensor(rng.normal(0, 0.5, (count, view.width)))
    missing = {view.name: torch.tensor(rng.random(count) < 0.2) for view in model.views}
    lengths = torch.tensor(np.where(rng.random(count) < 0.3, 0.0, rng.integers(1, 500, count)))
    totals = {view.name: observed[view.name].sum(-1) for view in model.views if view.kind == "counts"}
    return Prompts(lengths, totals, missing, observed)


def exact(model: DispatchModel, seed: int = 0, temper: float = 1.0, **settings: Any) -> Quadrature:
    """Under one value of the globals."""
    densities = ViewDensity.of_views(model.views, [draw_sites(model, seed)], temper)
    return Quadrature(densities, model.sizes, model.tree, **settings)


@pytest.mark.parametrize("tree", [None, (0, 1, 0, 1, 2)], ids=["plain", "families"])
def test_probabilities_of_sets_sum_to_one_and_are_those_of_draws(tree: tuple[int, ...] | None) -> None:
    """Every set of each size; 60,000 draws, by a χ² test that is false once in a thousand, at a fixed seed."""
    shares, sizes = np.array([0.3, 0.25, 0.2, 0.15, 0.1]), (0.5, 0.3, 0.2)
    prior = SupportPrior(sizes, shares, tree)
    sets = [np.array(list(combinations(range(5), size))) for size in (1, 2, 3)]
    chances = [np.exp(prior.log_prob(each)) for each in sets]
    np.testing.assert_allclose([each.sum() for each in chances], sizes)
    drawn = prior.draw(60_000, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.sum(1), 1)
    size = (drawn > 0).sum(1)[:, None]
    found = [((drawn[:, each] > 0).all(-1) & (size == each.shape[1])).sum(0) for each in sets]
    counted, expected = np.concatenate(found), 60_000 * np.concatenate(chances)
    assert counted.sum() == 60_000
    assert stats.chisquare(counted, expected).pvalue > 1e-3
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(0) - prior.mean) < 4 * error).all()
    inside = [chance @ np.eye(5)[each].mean(1) for each, chance in zip(sets, chances, strict=True)]
    np.testing.assert_allclose(prior.mean, np.sum(inside, axis=0))


def test_a_pair_is_as_often_of_one_family_as_of_two() -> None:
    prior = SupportPrior((0.0, 1.0, 0.0), np.full(5, 0.2), (0, 0, 1, 1, 2))
    pairs = np.array(list(combinations(range(5), 2)))
    related = np.array([[0, 1], [2, 3]])
    assert np.exp(prior.log_prob(related)).sum() == pytest.approx(0.5)
    assert np.exp(prior.log_prob(pairs)).sum() == pytest.approx(1.0)
    assert np.exp(SupportPrior((0.0, 1.0, 0.0), np.full(5, 0.2)).log_prob(related)).sum() == pytest.approx(0.2)


@pytest.mark.parametrize("model", [FULL, TREE], ids=["every view", "families"])
@pytest.mark.parametrize("temper", [0.5, 1.0, 3.0])
def test_densities_are_those_of_the_program(model: DispatchModel, temper: float) -> None:
    """At any weights of up to three components, missing views and unknown lengths among the prompts."""
    sites, prompts, rng = draw_sites(model, 3), draw_prompts(model, 6, 4), np.random.default_rng(5)
    densities = ViewDensity.of_views(model.views, [sites], temper)
    found = Quadrature(densities, model.sizes, model.tree)
    for row in range(6):
        supports = np.stack([rng.permutation(model.n_experts + 1)[:3] for _ in range(8)])
        own = rng.dirichlet(np.ones(3), 8)
        own[:3] = np.eye(3)
        weights = np.zeros((8, model.n_experts + 1))
        np.put_along_axis(weights, supports, own, 1)
        one = prompts.select(torch.tensor([row] * 8))
        expected = sum(model.log_likelihood(sites, torch.tensor(weights), one, temper).values())
        density = found.log_density(prompts.select(torch.tensor([row])), supports[None], own[None])[0]
        np.testing.assert_allclose(density, expected.numpy(), rtol=1e-9)


@pytest.mark.parametrize("model", [FULL, TREE], ids=["every view", "families"])
def test_it_is_the_posterior(model: DispatchModel) -> None:
    """Against 100,000 draws from the prior, weighed by their likelihoods: evidence, moments, and which is best.

    Within five standard errors of the weighed draws and the .01 that pieces of the simplex are wide; seeds are fixed.
    """
    prompts = draw_prompts(model, 4, 1)
    finder, width = exact(model, 2), model.n_experts + 1
    shares = SHARES if width == 4 else np.full(width, 1 / width)
    drawn = finder.prior(shares).draw(100_000, np.random.default_rng(0))
    supports = np.argsort(-drawn, axis=1)[:, :3]
    own = np.take_along_axis(drawn, supports, 1)
    answer = finder(prompts, shares)
    samples, _ = answer.draw(20_000, prompt_generators(0, 4))
    for row in range(4):
        density = finder.log_density(prompts.select(torch.tensor([row])), supports[None], own[None])[0]
        chance = np.exp(density - logsumexp(density))
        effective = 1 / (chance**2).sum()
        assert effective > 500
        evidence = logsumexp(density) - np.log(len(density))
        assert abs(answer.log_evidence[row] - evidence) < 5 / np.sqrt(effective) + 0.01
        mean = chance @ drawn
        spread = np.sqrt(chance @ (drawn - mean) ** 2)
        bound = 5 * spread / np.sqrt(effective) + 0.01
        assert (np.abs(answer.mean[row] - mean) < bound).all()
        assert (np.abs(samples[:, row].mean(0) - answer.mean[row]) < 5 * spread / np.sqrt(20_000) + 1e-3).all()
        assert (np.abs(samples[:, row].std(0) - spread) < bound).all()
        best = np.bincount(drawn.argmax(1), chance, width)
        assert (np.abs(answer.probability_best()[row] - best) < 5 * np.sqrt(best / effective) + 0.02).all()
        at = np.full((4, width), 0.3)
        assert (np.abs(answer.below(at)[row] - chance @ (drawn <= 0.3)) < 2.5 / np.sqrt(effective) + 0.01).all()


def test_simulated_probabilities_are_those_of_their_density() -> None:
    """Ranks of true weights among draws given probabilities that the program drew, many of them next to 0, are uniform:
    one false alarm in a thousand seeds, and the seed is fixed."""
    model = DispatchModel(K, (ProbabilitiesView(3),))
    sites = {"classifier_Phi": torch.eye(3) * 0.94 + 0.02, "classifier_base_Phi": torch.full((3,), 1 / 3)}
    sites |= {"classifier_conc": torch.tensor(3.0), "pi": torch.tensor(SHARES), "kappa": torch.tensor(1.0)}
    finder = Quadrature(ViewDensity.of_views(model.views, [sites], 1.0), model.sizes)
    truth = finder.prior(SHARES).draw(500, np.random.default_rng(0))
    missing = {"classifier": torch.zeros(500, dtype=torch.bool)}
    blank = Prompts(torch.zeros(500), {}, missing, known=torch.tensor(truth))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nodes: Any = poutine.trace(model.sample_prompts).get_trace(sites, blank).nodes
    prompts = replace(blank, known=None, observed={"classifier": nodes["classifier"]["value"]})
    drawn, _ = finder(prompts, SHARES).draw(63, prompt_generators(0, 500))
    names = ("a", "b", "c", "base")
    assert rank_uniformity(posterior_ranks(DispatchPosterior(drawn, names), truth), 63, names, 0.001).passed


def test_finer_pieces_change_next_to_nothing() -> None:
    prompts, finder = draw_prompts(FULL, 8, 6), exact(FULL, 2)
    coarse, fine = finder(prompts, SHARES), replace(finder, rounds=8)(prompts, SHARES)
    np.testing.assert_allclose(coarse.log_evidence, fine.log_evidence, atol=0.02)
    np.testing.assert_allclose(coarse.mean, fine.mean, atol=0.01)


def test_many_components_are_tried_beside_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With forty experts not all pairs are tried, and a prompt of two of them is found as if they were."""
    rng = np.random.default_rng(0)
    means = rng.normal(0, 1, (40, 6))
    model = DispatchModel(40, (VectorsView(6),))
    known = {"lt": torch.tensor(12.0), "xi": torch.tensor(0.01), "base_M": torch.zeros(6), "base_s2": torch.ones(6)}
    sites = {"M": torch.tensor(means), "s2": torch.full((40, 6), 0.02)} | known
    finder = Quadrature(ViewDensity.of_views(model.views, [sites], 1.0), model.sizes)
    pairs = np.stack([rng.choice(40, 2, replace=False) for _ in range(12)])
    seen = torch.tensor(0.4 * means[pairs[:, 0]] + 0.6 * means[pairs[:, 1]] + rng.normal(0, 0.1, (12, 6)))
    prompts = Prompts(torch.full((12,), 60.0), {}, {"hidden": torch.zeros(12, dtype=torch.bool)}, {"hidden": seen})
    shares = np.full(41, 1 / 41)
    some = finder(prompts, shares)
    monkeypatch.setattr(quadrature, "PAIRED", 41)
    every = Quadrature(finder.densities, model.sizes)(prompts, shares)
    np.testing.assert_allclose(some.log_evidence, every.log_evidence, atol=0.1)
    np.testing.assert_allclose(some.mean, every.mean, atol=0.05)
    assert (np.take_along_axis(some.mean, pairs, 1).sum(1) > 0.5).mean() > 0.7


def test_draws_and_answers_are_a_prompt_s_own() -> None:
    prompts, finder = draw_prompts(FULL, 5, 7), exact(FULL, 2)
    answer, alone = finder(prompts, SHARES), finder(prompts.select(torch.tensor([3])), SHARES)
    np.testing.assert_array_equal(answer.mean[3], alone.mean[0])
    drawn, ratios = answer.draw(50, prompt_generators([1, 2, 3, 4, 5], 5))
    own, own_ratios = alone.draw(50, prompt_generators([4], 1))
    np.testing.assert_array_equal(drawn[:, 3], own[:, 0])
    np.testing.assert_array_equal(ratios[:, 3], own_ratios[:, 0])
    joined = Cells.concatenate([alone, answer])
    np.testing.assert_array_equal(joined.mean, answer.mean[[3, 0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(joined.draw(50, prompt_generators([4], 1) * 6)[0][:, 0], own[:, 0])
    assert len(finder(prompts.select(torch.tensor([], dtype=torch.long)), SHARES)) == 0


def test_ratios_take_the_evidence_back() -> None:
    """Draws with their ratios stand for the prior: five standard errors, at a fixed seed."""
    prompts, finder = draw_prompts(FULL, 1, 8), exact(FULL, 2, temper=30.0)
    drawn, log_ratios = finder(prompts, SHARES).draw(60_000, prompt_generators(0, 1))
    ratios, prior = np.exp(log_ratios[:, 0]), finder.prior(SHARES).mean
    off = (ratios[:, None] * (drawn[:, 0] - prior)).T
    for values, expected in ((ratios, 1.0), *((each, 0.0) for each in off)):
        assert abs(values.mean() - expected) < 5 * values.std() / np.sqrt(len(values)) + 0.01


@pytest.mark.parametrize("length", [16.0, 60.0, 4000.0])
@pytest.mark.parametrize("at", [0.0, 0.6])
def test_uncertain_means_are_no_noise_of_tokens(length: float, at: float) -> None:
    """Under many draws of a mean, the density is the average of theirs within .25 nats, however long the prompt."""
    model = DispatchModel(2, (VectorsView(1),))
    known = {"s2": torch.full((2, 1), 0.05), "lt": torch.tensor(140.0), "xi": torch.tensor(0.01)}
    known |= {"base_M": torch.zeros(1), "base_s2": torch.ones(1)}
    drawn = 0.3 * torch.from_numpy(stats.norm.ppf((np.arange(400) + 0.5) / 400))
    sites = [known | {"M": torch.stack([mean, torch.tensor(5.0)])[:, None]} for mean in drawn]
    missing = {"hidden": torch.zeros(1, dtype=torch.bool)}
    prompts = Prompts(torch.tensor([length]), {}, missing, {"hidden": torch.tensor([[at]])})
    alone = np.zeros((1, 1, 1), dtype=np.int64), np.ones((1, 1, 1))

    def density(some: list[dict[str, Tensor]]) -> float:
        finder = Quadrature(ViewDensity.of_views(model.views, some, 1.0), model.sizes)
        return float(finder.log_density(prompts, *alone)[0, 0])

    average = logsumexp([density([each]) for each in sites]) - np.log(len(sites))
    assert density(sites) == pytest.approx(average, abs=0.25)


@pytest.mark.parametrize("at", [0.0, 0.4])
def test_errors_of_means_average_out_in_mixtures(at: float) -> None:
    """The fit's errors of two experts' means are independent: halves of both are as unsure as half of one's variance.

    Against the average density under draws of both, within .25 nats; a whole variance is .35 off.
    """
    model, rng = DispatchModel(2, (VectorsView(1),)), np.random.default_rng(0)
    known = {"s2": torch.full((2, 1), 0.05), "lt": torch.tensor(140.0), "xi": torch.tensor(0.01)}
    known |= {"base_M": torch.zeros(1), "base_s2": torch.ones(1)}
    errors = 0.3 * stats.norm.ppf((np.arange(400) + 0.5) / 400)
    drawn = torch.from_numpy(np.stack([errors, rng.permutation(errors)], 1)[..., None])
    sites = [known | {"M": means} for means in drawn]
    missing = {"hidden": torch.zeros(1, dtype=torch.bool)}
    prompts = Prompts(torch.tensor([4000.0]), {}, missing, {"hidden": torch.tensor([[at]])})

    def density(some: list[dict[str, Tensor]]) -> float:
        finder = Quadrature(ViewDensity.of_views(model.views, some, 1.0), model.sizes)
        return float(finder.log_density(prompts, np.array([[[0, 1]]]), np.full((1, 1, 2), 0.5))[0, 0])

    average = logsumexp([density([each]) for each in sites]) - np.log(len(sites))
    assert density(sites) == pytest.approx(average, abs=0.25)


def test_without_evidence_it_is_the_prior() -> None:
    """With more components than are tried together, too: sizes as the prior has them, and an evidence of 1. The mean
    is the prior's where all are tried, and no cell stands for many: so the coarse ones are not cut away."""
    for experts, families in ((8, None), (23, None), (50, None), (50, tuple(n // 5 for n in range(50)))):
        model = DispatchModel(experts, (VectorsView(2),), families=families)
        finder = exact(model, 1)
        blank = Prompts(torch.zeros(1), {}, {"hidden": torch.ones(1, dtype=torch.bool)}, {"hidden": torch.zeros(1, 2)})
        answer = finder(blank, np.full(experts + 1, 1 / (experts + 1)))
        sizes = np.bincount(answer.sizes[0], answer.mass[0], 4)[1:]
        np.testing.assert_allclose(sizes, model.sizes, atol=0.002)
        assert answer.log_evidence[0] == pytest.approx(0.0, abs=1e-6)
        np.testing.assert_allclose(answer.mean[0] * (experts + 1), 1, atol=0.002 if experts < 10 else 1.5)
        assert answer.mass[0][answer.sizes[0] > 1].max() < 0.01


@pytest.mark.parametrize(("experts", "noise"), [(8, 3.0), (11, 3.0), (23, 1.0), (18, 3.0)])
def test_cells_that_are_left_out_count_to_many(experts: int, noise: float) -> None:
    """Where evidence is weak, more cells matter than are kept. Those of three get no less than they had, and none of
    them all of it; the ratios of prior and posterior are those of the masses."""
    rng = np.random.default_rng(experts)
    known = {"lt": torch.tensor(1e-9), "xi": torch.tensor(0.01), "base_M": torch.zeros(22), "base_s2": torch.ones(22)}
    means = torch.tensor(rng.normal(0, 1, (experts, 22)))
    finder = Quadrature(
        ViewDensity.of_views(
            (VectorsView(22),), [{"M": means, "s2": torch.full((experts, 22), noise**2)} | known], 1.0
        ),
        (0.5, 0.35, 0.15),
    )
    seen = torch.tensor(rng.normal(0, noise, (6, 22)))
    prompts = Prompts(torch.full((6,), 50.0), {}, {"hidden": torch.zeros(6, dtype=torch.bool)}, {"hidden": seen})
    shares = np.full(experts + 1, 1 / (experts + 1))
    answer = finder(prompts, shares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quadrature, "KEPT", 10**6)
        patch.setattr(quadrature, "TAIL", 0.0)
        whole = finder(prompts, shares)
    np.testing.assert_allclose(answer.mean, whole.mean, atol=0.01)
    assert answer.mass.shape[1] < whole.mass.shape[1]
    for size in (1, 2, 3):
        own, all_of_it = (each.mass * (each.sizes == size) for each in (answer, whole))
        np.testing.assert_allclose(own.sum(1), all_of_it.sum(1), atol=1e-9)
        assert size == 1 or own.max() < 2 * all_of_it.max()
    if experts < 10:  # all sets are tried: ratios are those of the cells' masses under prior and posterior
        used = np.arange(3) < answer.sizes[..., None, None]
        volumes = np.abs(np.linalg.det(np.where(used & used.swapaxes(-1, -2), answer.corners, np.eye(3))))
        prior = finder.prior(shares)
        for size in (1, 2, 3):
            rows = (answer.sizes == size) & (answer.mass > 0)
            under = prior.log_prob(answer.supports[rows][:, :size]) + np.log(volumes[rows])
            np.testing.assert_allclose(under - np.log(answer.mass[rows]), answer.log_ratios[rows], atol=1e-6)


@pytest.mark.parametrize("sizes", [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_sizes_do_not_say_which_components_are_tried(sizes: tuple[float, ...]) -> None:
    """With forty experts, where one size alone can be, its sets are as likely beside each other as where all can be.

    Within .03: of triples that are many and alike, not all cells are kept.
    """
    rng, size = np.random.default_rng(0), sizes.index(1.0) + 1
    means = rng.normal(0, 1, (40, 8))
    known = {"lt": torch.tensor(12.0), "xi": torch.tensor(0.01), "base_M": torch.zeros(8), "base_s2": torch.ones(8)}
    sites = {"M": torch.tensor(means), "s2": torch.full((40, 8), 0.02)} | known
    densities = ViewDensity.of_views((VectorsView(8),), [sites], 1.0)
    sets = np.stack([rng.choice(40, size, replace=False) for _ in range(10)])
    seen = torch.tensor(means[sets].mean(1) + rng.normal(0, 0.1, (10, 8)))
    prompts = Prompts(torch.full((10,), 60.0), {}, {"hidden": torch.zeros(10, dtype=torch.bool)}, {"hidden": seen})
    shares = np.full(41, 1 / 41)
    one, every = Quadrature(densities, sizes)(prompts, shares), Quadrature(densities, (0.3, 0.3, 0.4))(prompts, shares)
    mass = every.mass * (every.sizes == size)
    own = replace(every, mass=mass / mass.sum(1, keepdims=True))
    np.testing.assert_allclose(one.mean, own.mean, atol=0.03)


@pytest.mark.parametrize("spread", [0.02, 0.005, 0.001])
def test_sharp_evidence_is_not_pruned_away(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs among five components, against splitting every cell as far: evidence within .05, and who shares it."""
    rng = np.random.default_rng(1)
    means = rng.normal(0, 1, (4, 8))
    known = {"lt": torch.tensor(12.0), "xi": torch.tensor(0.01), "base_M": torch.zeros(8), "base_s2": torch.ones(8)}
    sites = {"M": torch.tensor(means), "s2": torch.full((4, 8), spread)} | known
    model = DispatchModel(4, (VectorsView(8),))
    finder = Quadrature(ViewDensity.of_views(model.views, [sites], 1.0), model.sizes)
    share = rng.uniform(0.1, 0.9, (12, 1))
    centers = share * means[rng.integers(0, 2, 12)] + (1 - share) * means[rng.integers(2, 4, 12)]
    seen = torch.tensor(centers + rng.normal(0, spread**0.5, (12, 8)))
    prompts = Prompts(torch.full((12,), 60.0), {}, {"hidden": torch.zeros(12, dtype=torch.bool)}, {"hidden": seen})
    found = finder(prompts, np.full(5, 0.2))
    for name, value in (("SPLIT", 100_000), ("NEGLIGIBLE", 1e-300), ("KEPT", 100_000)):
        monkeypatch.setattr(quadrature, name, value)
    whole = finder(prompts, np.full(5, 0.2))
    np.testing.assert_allclose(found.log_evidence, whole.log_evidence, atol=0.05)
    for size in (1, 2, 3):
        share_of = [(each.mass * (each.sizes == size)).sum(1) for each in (found, whole)]
        np.testing.assert_allclose(*share_of, atol=0.05)


def test_what_is_far_from_everything_has_a_posterior() -> None:
    prompts = draw_prompts(DispatchModel(K, (VectorsView(2),)), 1, 3)
    prompts.observed["hidden"][:] = 1e200
    answer = exact(DispatchModel(K, (VectorsView(2),)), 2)(prompts, SHARES)
    assert np.isfinite(answer.log_evidence).all()
    np.testing.assert_allclose(answer.mean.sum(1), 1)


def test_the_distribution_function_of_cells_is_that_of_their_draws() -> None:
    """At six points of every component, by 3.3 standard errors: one false alarm in a thousand each, at a fixed seed."""
    answer = exact(FULL, 2)(draw_prompts(FULL, 2, 9), SHARES)
    drawn, _ = answer.draw(4_000, prompt_generators(0, 2))
    for point in (0.0, 0.01, 0.2, 0.5, 0.9, 1.0):
        found, expected = answer.below(np.full((2, 4), point)), (drawn <= point + 1e-12).mean(0)
        assert (np.abs(found - expected) < 3.3 * np.sqrt(0.25 / 4_000)).all()
    assert (answer.below(np.full((2, 4), -0.001)) == 0).all()
    np.testing.assert_allclose(answer.below(np.ones((2, 4))), 1)
