"""Importance sampling: compiled densities against the Pyro program and SciPy, smoothing against arviz, weights against
exact posteriors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import DirichletMixtures
from bayes_dispatch.dispatcher.guide.encoding import Encoder
from bayes_dispatch.dispatcher.guide.importance import ImportanceSampler, draw_resampled
from bayes_dispatch.dispatcher.guide.importance_kernels import draw_weights, pareto_smooth, resample
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


@pytest.mark.parametrize("model", [FULL, TREE], ids=["every view", "families"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), temper=st.sampled_from([0.3, 1.0, 4.0]))
def test_ratios_are_those_of_the_program(model: DispatchModel, seed: int, temper: float) -> None:
    """Log ratio = Pyro's likelihood + prior, averaged over precisions, − SciPy's mixture, where no weight is small."""
    count, width, proposals = 4, model.n_experts + 1, 12
    prompts, answer = draw_prompts(model, count, seed), guess(count, width, seed)
    answer = replace(answer, concentration=answer.concentration + 3.0)  # keeps weights above the resolution
    sites = [draw_sites(model, seed + g) for g in range(3)]
    sampler = ImportanceSampler(model, sites, temper, KAPPA)
    shares, keys = np.random.default_rng(seed).dirichlet(np.ones(width)), np.arange(count, dtype=np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayes_dispatch.dispatcher.guide.importance.pareto_smooth", lambda ratios, k_hat: None)
        found = sampler(answer, prompts, shares, proposals, keys)
    kappas = np.exp(np.linspace(np.log(KAPPA[0]), np.log(KAPPA[1]), 17)[1::2])
    for p in range(proposals):
        weights = torch.tensor(found.proposals[:, p])
        prior = [
            model.weights_prior({"pi": torch.tensor(shares), "kappa": torch.tensor(kappa)}).log_prob(weights)
            for kappa in kappas
        ]
        expected = (
            torch.stack(prior).logsumexp(0) - np.log(len(kappas)) - torch.tensor(answer.log_prob(weights.numpy()))
        )
        for n in range(count):
            one = prompts.select(torch.tensor([n]))
            each = sites[(int(keys[n]) + p) % 3]
            expected[n] += sum(v.sum() for v in model.log_likelihood(each, weights[[n]], one, temper).values())
        np.testing.assert_allclose(found.log_weights[:, p], expected.numpy(), rtol=1e-8, atol=1e-7)


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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    draws=st.sampled_from([25, 96, 300, 1000]),
    tail=st.sampled_from([0.1, 0.4, 0.8, 2.0]),
    spread=st.booleans(),
)
def test_smoothing_is_that_of_arviz(seed: int, draws: int, tail: float, spread: bool) -> None:
    """Log weights and k-hat of ``az.psislw``, for light and heavy tails, with ties and without."""
    import arviz as az

    rng = np.random.default_rng(seed)
    ratios = stats.genpareto(tail).rvs((3, draws), random_state=rng)
    ratios = np.log(ratios + 0.1) if spread else np.minimum(ratios, 3.0)
    expected, k_hat = az.psislw(ratios.copy())
    got, found = ratios.copy(), np.empty(3)
    pareto_smooth(got, found)
    np.testing.assert_allclose(found, k_hat, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.sort(got), np.sort(expected), rtol=1e-6, atol=1e-6)  # ties in any order
    if spread:
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.exp(got).sum(1), 1, atol=1e-9)


def test_resampling_is_systematic_and_in_random_order() -> None:
    """Each proposal comes ``S·weight`` times, rounded up or down; neighbours are not alike."""
    rng = np.random.default_rng(0)
    proposals, weights = rng.dirichlet(np.ones(3), (5, 40)), rng.dirichlet(np.full(40, 0.5), 5)
    drawn = np.empty((64, 5, 3))
    resample(np.arange(5, dtype=np.uint64), proposals, np.log(weights), drawn)
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
        answer, prompts, shares, 40_000, np.arange(2, dtype=np.uint64)
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
    evenly = draw_resampled(found, 4_000, np.arange(2, dtype=np.uint64)).mean(0)
    np.testing.assert_allclose(evenly, mean, atol=5e-3)


def test_small_weights_do_not_spoil_the_ratios() -> None:
    """Where prior and proposal differ only in how small their small weights are, all ratios are near one another."""
    count, width, proposals = 3, 4, 2_000
    prior = np.full((1, width), 0.05)
    answer = DirichletMixtures(np.ones((count, 1)), np.full((count, 1, width), 0.1))
    weights, ratios = np.empty((count, proposals, width)), np.empty((count, proposals))
    families, top = np.zeros(0, np.int64), np.zeros((1, 0))
    keys = np.arange(count, dtype=np.uint64)
    draw_weights(keys, answer.shares, answer.concentration, np.ones(1), prior, families, top, weights, ratios)
    assert weights.min() < 1e-10
    assert np.ptp(ratios) < 4  # without the resolution it would be 60
    np.testing.assert_allclose(np.exp(ratios).mean(1), 1, atol=0.06)  # both are densities


def test_small_families_do_not_either() -> None:
    """With families, too: ratios stay bounded when a family of one, or of two, next to vanishes; both are densities."""
    width, proposals = 5, 20_000
    families, top = np.array([0, 1, 0, 2, 3]), np.array([[0.06, 0.05, 0.08, 0.04]])
    prior = np.array([[0.1, 0.2, 0.15, 0.2, 0.2]])
    weights, ratios = np.empty((1, proposals, width)), np.empty((1, proposals))
    concentration = np.full((1, 1, width), 0.08)
    arguments = (np.arange(1, dtype=np.uint64), np.ones((1, 1)), concentration, np.ones(1), prior, families, top)
    draw_weights(*arguments, weights, ratios)
    assert weights.min() < 1e-20
    assert np.ptp(ratios) < 6
    np.testing.assert_allclose(np.exp(ratios).mean(), 1, atol=0.1)


def test_a_prompts_proposals_are_its_own() -> None:
    prompts, sites = draw_prompts(FULL, 5, 1), [draw_sites(FULL, 1)]
    sampler, answer = ImportanceSampler(FULL, sites, 1.0, KAPPA), guess(5, K + 1, 1)
    shares, keys = np.full(K + 1, 0.25), np.arange(5, dtype=np.uint64)
    whole = sampler(answer, prompts, shares, 40, keys)
    rows = np.array([3, 0])
    some = DirichletMixtures(answer.shares[rows], answer.concentration[rows])
    alone = sampler(some, prompts.select(torch.from_numpy(rows)), shares, 40, keys[rows])
    for a, b in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(a[rows], b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayes_dispatch.dispatcher.guide.importance.MEMORY", 200)
        pieces = sampler(answer, prompts, shares, 40, keys)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)
