"""Importance sampling. Laws: ratios and the network's inputs are the program's densities; resampled draws have the
exact posterior; resampling is systematic; small weights bound the ratios; a prompt's proposals are its own."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.dispatcher.arviz_data import pareto_smoothed
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import DirichletMixtures, prompt_generators
from bayes_dispatch.dispatcher.guide.encoding import Encoder
from bayes_dispatch.dispatcher.guide.importance import ImportanceSampler, Weighted
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import CountsView, ProbabilitiesView, SurpriseView, VectorsView, floored

K = 3
KAPPA = (0.2, 4.0)
VIEWS = (VectorsView(2), CountsView(4), SurpriseView(2), ProbabilitiesView(3), VectorsView(20, "embedding"))
FULL = DispatchModel(K, VIEWS)
TREE = DispatchModel(4, (VectorsView(2),), families=(0, 1, 0, 1))


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_smoothing_keeps_the_largest_ratio_the_largest() -> None:
    """Whatever sign arviz wants, which changed at 1.0; and k-hat tells heavy tails."""
    ratios = np.random.default_rng(0).standard_t(5, (4, 400)) * np.array([0.1, 0.1, 8, 8])[:, None]
    log_weights, k_hat = pareto_smoothed(ratios)
    np.testing.assert_array_equal(log_weights[range(4), ratios.argmax(1)], log_weights.max(1))
    np.testing.assert_array_equal(log_weights.argmin(1), ratios.argmin(1))
    assert k_hat[:2].max() < 0.5 < 0.7 < k_hat[2:].min()


def draw_sites(model: DispatchModel, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.sample_globals()


def draw_prompts(model: DispatchModel, count: int, seed: int, largest: int = 90) -> Prompts:
    rng = np.random.default_rng(seed)
    observed = {}
    for view in model.views:
        if view.kind == "counts":
            observed[view.name] = torch.tensor(rng.integers(0, largest, (count, view.width)) * 1.0)
        elif view.kind == "probabilities":
            observed[view.name] = floored(torch.tensor(rng.dirichlet(np.full(view.width, 0.2), count)))
        else:
            observed[view.name] = torch.tensor(2 * rng.standard_t(2, (count, view.width)))
    missing = {view.name: torch.tensor(rng.random(count) < 0.2) for view in model.views}
    lengths = torch.tensor(np.where(rng.random(count) < 0.3, 0.0, rng.integers(1, 500, count)))
    totals = {view.name: observed[view.name].sum(-1) for view in model.views if view.kind == "counts"}
    return Prompts(lengths, totals, missing, observed)


def guess(count: int, width: int, seed: int) -> DirichletMixtures:
    rng = np.random.default_rng(seed)
    return DirichletMixtures(rng.dirichlet(np.ones(2), count), 0.02 + np.exp(rng.normal(0, 1, (count, 2, width))))


def test_draws_of_the_guide_stand_for_the_prior_by_their_ratios() -> None:
    """Their mean under these is the prior's. Five standard errors: one false alarm in a million for each weight."""
    answer = DirichletMixtures(np.array([[0.5, 0.5]]), np.array([[[2.0, 1.0, 0.5, 0.5], [0.3, 0.3, 0.6, 0.4]]]))
    draws, shares = answer.draw(40_000, prompt_generators(0, 1)).swapaxes(0, 1), np.array([0.4, 0.3, 0.2, 0.1])
    sampler = ImportanceSampler(FULL, [draw_sites(FULL, 0)], 1.0, (0.5, 3.0))
    ratios = np.exp(sampler.prior_ratios(answer, draws, shares))[0]
    prior = FULL.label_shares(shares)
    for values, expected in ((ratios, 1.0), *zip((ratios[:, None] * (draws[0] - prior)).T, np.zeros(4), strict=True)):
        assert abs(values.mean() - expected) < 5 * values.std() / 200
    assert abs(draws[0].mean(0) - prior).max() > 0.05


def test_ratios_of_resampled_draws_take_the_evidence_back() -> None:
    """Below the smoothed tail they are the inverse likelihoods, to a constant, whatever the guide."""
    prompts, answer, shares = draw_prompts(FULL, 3, 4), guess(3, 4, 5), np.array([0.4, 0.3, 0.2, 0.1])
    answer = replace(answer, concentration=answer.concentration + 3.0)  # keeps weights above the resolution
    sampler = ImportanceSampler(FULL, [draw_sites(FULL, 0)], 4.0, KAPPA)
    weighted = sampler(answer, prompts, shares, 400, prompt_generators(range(3), 3))
    draws, log_weights = weighted.draw(100, prompt_generators(range(3), 3))
    found = sampler.prior_ratios(answer, draws.swapaxes(0, 1), shares).T - log_weights
    likelihoods = weighted.log_ratios - sampler.prior_ratios(answer, weighted.proposals, shares)
    checked = 0
    for n in range(3):
        chosen = [int(np.flatnonzero((weighted.proposals[n] == draw).all(-1))[0]) for draw in draws[:, n]]
        below = weighted.log_ratios[n, chosen] < np.sort(weighted.log_ratios[n])[-100]
        left = (found[:, n] + likelihoods[n, chosen])[below]
        np.testing.assert_allclose(left, np.full(len(left), left[0] if len(left) else 0.0), rtol=0, atol=1e-9)
        checked += len(left)
    assert checked > 20


@pytest.mark.parametrize("model", [FULL, TREE], ids=["every view", "families"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), temper=st.sampled_from([0.3, 1.0, 4.0]))
def test_ratios_are_those_of_the_program(model: DispatchModel, seed: int, temper: float) -> None:
    """Log ratio = Pyro's likelihood + prior, averaged over precisions, − SciPy's mixture, where no weight is small."""
    count, width, proposals = 4, model.n_experts + 1, 6
    prompts, answer = draw_prompts(model, count, seed), guess(count, width, seed)
    answer = replace(answer, concentration=answer.concentration + 3.0)  # keeps weights above the resolution
    sites = [draw_sites(model, seed + g) for g in range(3)]
    sampler = ImportanceSampler(model, sites, temper, KAPPA)
    shares = np.random.default_rng(seed).dirichlet(np.ones(width))
    found = sampler(answer, prompts, shares, proposals, prompt_generators(range(count), count))
    kappas = np.exp(np.linspace(np.log(KAPPA[0]), np.log(KAPPA[1]), 17)[1::2])
    turns: list[np.ndarray] = []
    for p in range(proposals):
        weights = torch.tensor(found.proposals[:, p])
        prior = [
            model.weights_prior({"pi": torch.tensor(shares), "kappa": torch.tensor(kappa)}).log_prob(weights)
            for kappa in kappas
        ]
        expected = (
            torch.stack(prior).logsumexp(0) - np.log(len(kappas)) - torch.tensor(answer.log_prob(weights.numpy()))
        )
        # Each prompt goes through the globals in turn, from one of its own choice.
        likely = torch.stack([sum(model.log_likelihood(each, weights, prompts, temper).values()) for each in sites])
        possible = (expected + likely).numpy()  # (globals, prompt)
        turns.append(np.abs(possible - found.log_ratios[:, p]).argmin(0))
        np.testing.assert_allclose(found.log_ratios[:, p], possible[turns[-1], range(count)], rtol=1e-8, atol=1e-7)
    told = ~torch.stack(list(prompts.missing.values())).all(0).numpy()  # where there is evidence, globals differ
    assert (np.diff(turns, axis=0)[:, told] % 3 == 1).all()


@pytest.mark.parametrize("model", [FULL, TREE], ids=["every view", "families"])
def test_densities_at_vertices(model: DispatchModel) -> None:
    """The network's inputs hold the program's densities at one-hot weights (the floor of w aside)."""
    prompts, sites = draw_prompts(model, 6, 3, largest=20), draw_sites(model, 3)
    encoder = Encoder(model, sites)
    inputs = encoder(prompts, 1.0, np.full(model.n_experts + 1, 1 / (model.n_experts + 1)))
    assert inputs.shape == (6, encoder.width)
    assert np.isfinite(inputs).all()
    width = model.n_experts + 1
    vertices = torch.eye(width).unsqueeze(1)
    logs = torch.stack(list(model.log_likelihood(sites, vertices, prompts).values())).sum(0).T.numpy()  # (N, K+1)
    np.testing.assert_allclose(
        np.sinh(inputs[:, -width - 1 : -1]), logs - logs.max(1, keepdims=True), rtol=1e-3, atol=0.02
    )
    over_base = logs[:, :-1].max(1) - logs[:, -1]
    np.testing.assert_allclose(np.sinh(inputs[:, -1]), over_base, rtol=1e-3, atol=0.02)


def test_smoothed_weights_are_normalised_and_tell_heavy_tails() -> None:
    """k-hat is near the tail's shape, by definition of the generalised Pareto distribution; .3 is five standard errors.

    The smoothing itself is arviz's.
    """
    rng = np.random.default_rng(0)
    for shape in (0.2, 1.5):
        tails = rng.uniform(size=(3, 4_000)) ** -shape  # Pareto of index 1 / shape
        found = Weighted(np.zeros((3, 4_000, 2)), np.log(tails))
        np.testing.assert_allclose(np.exp(found.log_weights).sum(1), 1, atol=1e-9)
        assert (np.abs(found.k_hat - shape) < 0.3).all()
        np.testing.assert_allclose(found.log_evidence, np.log(tails.mean(1)))


def test_resampling_is_systematic_and_in_random_order() -> None:
    """Each proposal comes ``S·weight`` times, rounded up or down; neighbours are not alike."""
    rng = np.random.default_rng(0)
    proposals, ratios = rng.dirichlet(np.ones(3), (5, 40)), np.log(rng.dirichlet(np.full(40, 0.5), 5))
    weighted = Weighted(proposals, ratios)
    (drawn, _), weights = weighted.draw(64, prompt_generators(range(5), 5)), np.exp(weighted.log_weights)
    for n in range(5):
        times = (drawn[:, n, None] == proposals[n]).all(-1).sum(0)  # (P,)
        assert times.sum() == 64
        assert (np.abs(times - 64 * weights[n]) < 1).all()
        first = (drawn[:, n, None] == proposals[n]).all(-1).argmax(1)
        assert np.abs(np.corrcoef(np.arange(64), first)[0, 1]) < 0.5


def test_weighted_proposals_have_the_exact_posterior() -> None:
    """Two experts' labels and one view: mean weights within 5 standard errors of quadrature on a fine grid; seed fixed.

    Six means, false alarm < 1e-5. The prior's precision is averaged over the same eight values.
    """
    model = DispatchModel(2, (VectorsView(1),))
    sites = {"M": torch.tensor([[1.0], [-1.0]]), "s2": torch.tensor([[0.2], [0.1]]), "lt": torch.tensor(12.0)}
    sites |= {"pi": torch.tensor([0.5, 0.3, 0.2]), "kappa": torch.tensor(1.0)}
    prompts = Prompts(
        torch.tensor([50.0, 10.0]), {}, {"hidden": torch.zeros(2, dtype=torch.bool)},
        {"hidden": torch.tensor([[0.4], [-1.5]])},
    )  # fmt: skip
    shares, kappa = np.array([0.5, 0.3, 0.2]), (1.0, 4.0)
    answer = DirichletMixtures(np.ones((2, 1)), np.full((2, 1, 3), 0.3))
    found = ImportanceSampler(model, [sites], 1.0, kappa)(
        answer, prompts, shares, 40_000, prompt_generators(range(2), 2)
    )
    weights = np.exp(found.log_weights)[..., None]
    mean = (weights * found.proposals).sum(1)
    error = np.sqrt((weights**2 * (found.proposals - mean[:, None]) ** 2).sum(1))
    # The exact mean, by importance sampling from the prior itself: another proposal, another code path.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact, other = np.zeros((2, 3)), np.zeros((2, 3))
        for n in range(2):
            kappas = np.exp(np.linspace(np.log(kappa[0]), np.log(kappa[1]), 17)[1::2])
            drawn = torch.cat(
                [model.weights_prior({**sites, "kappa": torch.tensor(k)}).sample(torch.Size([20_000])) for k in kappas]
            )
            one = prompts.select(torch.tensor([n]))
            logs = model.log_likelihood(sites, drawn.unsqueeze(1), one)["hidden"].squeeze(-1)
            v = torch.softmax(logs, 0).unsqueeze(-1)
            exact[n] = (v * drawn).sum(0).numpy()
            other[n] = (v**2 * (drawn - torch.tensor(exact[n])) ** 2).sum(0).sqrt().numpy()
    assert (np.abs(mean - exact) < 5 * np.sqrt(error**2 + other**2)).all()
    assert np.abs(exact[0] - exact[1]).max() > 0.2
    evenly = found.draw(4_000, prompt_generators(range(2), 2))[0].mean(0)
    np.testing.assert_allclose(evenly, mean, atol=5e-3)


@pytest.mark.parametrize("families", [None, (0, 1, 0, 2)], ids=["no families", "families"])
def test_small_weights_do_not_spoil_the_ratios(families: tuple[int, ...] | None) -> None:
    """Where prior and proposal differ only in how small their small weights are, all ratios are near one another, also
    where a family of one, or of two, next to vanishes; both are densities, so the mean of their ratio is 1."""
    width, model = 5, DispatchModel(4, (), families=families)
    answer = DirichletMixtures(np.ones((1, 1)), np.full((1, 1, width), 0.08))
    sampler = ImportanceSampler(model, [draw_sites(model, 0)], 1.0, (0.23, 0.23 + 1e-9))
    nothing = Prompts(torch.zeros(1), {}, {})
    found = sampler(answer, nothing, np.full(width, 0.2), 20_000, prompt_generators(0, 1))
    assert found.proposals.min() < 1e-20
    assert np.ptp(found.log_ratios) < 6  # without the resolution it would be 60
    np.testing.assert_allclose(np.exp(found.log_evidence), 1, atol=0.1)


def test_a_prompts_proposals_are_its_own() -> None:
    prompts, sites = draw_prompts(FULL, 5, 1), [draw_sites(FULL, 1)]
    sampler, answer = ImportanceSampler(FULL, sites, 1.0, KAPPA), guess(5, K + 1, 1)
    shares, seeds = np.full(K + 1, 0.25), [5, 6, 7, 8, 9]

    def parts(found: Weighted) -> tuple[np.ndarray, ...]:
        return found.proposals, found.log_ratios, found.log_weights

    whole = parts(sampler(answer, prompts, shares, 40, prompt_generators(seeds, 5)))
    rows = np.array([3, 0])
    some = DirichletMixtures(answer.shares[rows], answer.concentration[rows])
    own = prompt_generators([8, 5], 2)
    for a, b in zip(whole, parts(sampler(some, prompts.select(torch.from_numpy(rows)), shares, 40, own)), strict=True):
        np.testing.assert_allclose(a[rows], b, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayes_dispatch.dispatcher.guide.importance.MEMORY", 200)
        pieces = parts(sampler(answer, prompts, shares, 40, prompt_generators(seeds, 5)))
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
