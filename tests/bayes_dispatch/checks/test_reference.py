"""The NumPyro program against the Pyro program, and NUTS against posteriors known otherwise.

Laws: its density is Pyro's, every view has a twin; NUTS gives conjugate posteriors, posteriors by quadrature, the prior
without evidence, known mixtures, and what a trained guide gives; r-hat and ESS know chains.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from scipy import stats
from torch import Tensor

from bayes_dispatch.checks import reference
from bayes_dispatch.checks.reference import ReferencePosterior, conditional_posterior, joint_posterior, log_density
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import KINDS, floored
from bayes_dispatch.errors import ConfigError, MissingDependencyError, TensorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bayes_dispatch.dispatcher.estimator import Dispatcher

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


KIND_OF = {"hidden": "vectors", "counts": "counts", "surprise": "surprise", "keywords": "counts"}
KIND_OF |= {"embedding": "vectors", "classifier": "probabilities"}


def program(n_experts: int, **widths: int) -> DispatchModel:
    return DispatchModel(n_experts, tuple(KINDS[KIND_OF[name]](width, name) for name, width in widths.items()))


def draw_globals(model: DispatchModel, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.sample_globals()


def draw_prompts(model: DispatchModel, count: int, seed: int) -> Prompts:
    """Any evidence at all: the density is compared, not the fit."""
    rng = np.random.default_rng(seed)
    observed = {
        v.name: torch.as_tensor(
            rng.integers(0, 30, (count, v.width)) * 1.0
            if v.kind == "counts"
            else floored(torch.tensor(rng.dirichlet(np.full(v.width, 0.1), count)))
            if v.kind == "probabilities"
            else 3 * rng.standard_t(2, (count, v.width))
        )
        for v in model.views
    }
    missing = {v.name: torch.tensor(rng.random(count) < 0.3) for v in model.views}
    lengths = torch.tensor(np.where(rng.random(count) < 0.3, 0.0, rng.integers(1, 500, count)))
    totals = {v.name: observed[v.name].sum(-1) for v in model.views if v.kind == "counts"}
    return Prompts(lengths, totals, missing, observed)


def pyro_density(
    model: DispatchModel, prompts: Prompts, values: dict[str, Tensor], temper: Tensor, fixed: dict[str, Tensor] | None
) -> float:
    def joint() -> None:
        model.sample_prompts(model.sample_globals() if fixed is None else fixed, prompts, temper)

    return float(poutine.trace(poutine.condition(joint, values)).get_trace().log_prob_sum())


PROGRAMS = [
    (program(2, hidden=3, counts=4), 5),
    (program(3, surprise=2, classifier=3, keywords=4, embedding=2), 5),
    (replace(program(5, hidden=2), families=(0, 1, 0, 2, 1), prior=(1.0, 2.0, 3.0, 9.0, 0.5, 2.0)), 4),
]


@pytest.mark.parametrize(("model", "count"), PROGRAMS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    labelled=st.booleans(),
    mixed=st.booleans(),
    tempered=st.booleans(),
    free=st.booleans(),
    kappas=st.booleans(),
    sharp=st.sampled_from([0.05, 1.0, 30.0]),
)
def test_log_density_is_that_of_pyro(
    model: DispatchModel,
    count: int,
    seed: int,
    labelled: bool,
    mixed: bool,
    tempered: bool,
    free: bool,
    kappas: bool,
    sharp: float,
) -> None:
    """Any values, masks, labels, known mixtures and tempers, with globals free or fixed, from corners to the centre."""
    rng = np.random.default_rng(seed)
    prompts, sites = draw_prompts(model, count, seed), draw_globals(model, seed)
    k = model.n_experts
    if labelled:
        prompts = replace(prompts, labels=torch.tensor(rng.integers(-1, k, count)))
    if mixed:
        known = torch.tensor(rng.dirichlet(np.ones(k + 1), count))
        known[torch.tensor(rng.random(count) < 0.5)] = torch.nan
        prompts = replace(prompts, known=known)
    if kappas and not free:
        sites["kappa"] = torch.tensor(rng.uniform(0.2, 4.0, count))
    temper = torch.tensor(rng.uniform(0.3, 4.0, count)) if tempered else torch.ones(count)
    logs = np.log(np.maximum(rng.dirichlet(np.full(k + 1, sharp), count), 1e-12))
    weights = torch.tensor(logs).softmax(-1)
    values, fixed = ({**sites, "w": weights}, None) if free else ({"w": weights}, sites)
    expected = pyro_density(model, prompts, values, temper, fixed)
    assert np.isfinite(expected)
    assert log_density(model, prompts, values, temper, fixed) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_every_view_has_a_twin() -> None:
    """Every kind of view, with the same globals as in the Pyro program."""
    assert reference.TWINS.keys() == KINDS.keys()
    for kind, view in KINDS.items():
        for name in ("other", kind):
            model = DispatchModel(2, (view(3, name),))
            assert set(reference.TWINS[kind](3, name).globals) == draw_globals(model, 0).keys() - {"pi", "kappa"}


def test_log_density_wants_every_site() -> None:
    model, count = PROGRAMS[0]
    prompts, sites = draw_prompts(model, count, 0), draw_globals(model, 0)
    weights = torch.full((count, 3), 1 / 3)
    with pytest.raises(TensorError, match=r"expected values of the sites \['M', .*, got \['M'"):
        log_density(model, prompts, sites)
    with pytest.raises(TensorError, match=r"expected values of the sites \['w'\], got \['pi', 'w'\]"):
        log_density(model, prompts, {"w": weights, "pi": sites["pi"]}, given=sites)
    with pytest.raises(TensorError, match=r"expected prompts with observed views \['hidden', 'counts'\], got none for"):
        log_density(model, prompts.blank(), {**sites, "w": weights})


@pytest.mark.slow
def test_labels_are_conjugate() -> None:
    """Without views NUTS draws from Dirichlet(prior + one-hot label), from corners (κ = .2) to the centre (κ = 40).

    15 means and 15 variances at 5 Monte Carlo standard errors, and KS distances to the Beta marginals at 1.95/√ESS
    (each p = .001): false alarms in about 1 of 60 seeds, and the seed is fixed.
    """
    model = program(2)
    labels = torch.tensor([-1, 0, -1, 1, 0])
    kappa = torch.tensor([0.2, 0.2, 2.0, 2.0, 40.0])
    prompts = Prompts(torch.zeros(5), {}, {}, labels=labels)
    sites = {"pi": torch.tensor([0.5, 0.3, 0.2]), "kappa": kappa}
    found = conditional_posterior(model, prompts, NAMES[:2], sites, draws=500, chains=4, warmup=300, seed=1)
    assert found.converged.all()
    prior = model.prior_concentration(sites)
    alpha = (prior + torch.eye(3)[labels] * (labels >= 0).unsqueeze(-1)).numpy()
    assert found.weights.shape == (2000, 5, 3)
    assert found.experts == ("a", "b", "base")
    assert found.divergences.sum() <= 0.01 * found.weights.shape[0] * 5
    for prompt, a in enumerate(alpha):
        marginals = [stats.beta(x, a.sum() - x) for x in a]
        for k, marginal in enumerate(marginals):
            draws, ess = found.weights[:, prompt, k], found.ess[prompt, k]
            squares = (draws - marginal.mean()) ** 2
            assert abs(draws.mean() - marginal.mean()) < 5 * marginal.std() / np.sqrt(ess) + 1e-3
            assert abs(squares.mean() - marginal.var()) < 5 * squares.std() / np.sqrt(ess) + 1e-3
            grid = marginal.ppf(np.linspace(0.02, 0.98, 49))
            grid = grid[(grid > 1e-3) & (grid < 1 - 1e-3)]  # the floor of w acts below
            if len(grid):
                gap = np.abs((draws[:, None] <= grid).mean(0) - marginal.cdf(grid)).max()
                assert gap < 1.95 / np.sqrt(ess)


def test_errors() -> None:
    model, count = PROGRAMS[0]
    prompts, sites = draw_prompts(model, count, 0), draw_globals(model, 0)
    with pytest.raises(ConfigError, match="expected chains to be a whole number ≥ 1, got 0"):
        conditional_posterior(model, prompts, NAMES[:2], sites, draws=4, chains=0, warmup=1)
    with pytest.raises(ConfigError, match="expected 2 expert names, got 3"):
        joint_posterior(model, prompts, NAMES[:3])
    del sites["M"]
    with pytest.raises(TensorError, match=r"expected values of the globals \['M', "):
        conditional_posterior(model, prompts, NAMES[:2], sites)


def test_without_jax_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, reference.__name__)
    with pytest.raises(MissingDependencyError, match=r"expected jax and numpyro .* pip install 'bayes-dispatch\[refer"):
        importlib.import_module(reference.__name__)


@pytest.mark.slow
def test_evidence_by_quadrature() -> None:
    """Two components (one expert and base) and both views: the posterior of w by quadrature on a fine grid.

    Eight KS distances at 1.95/√ESS (each p = .001): false alarms in about 1 of 120 seeds, and the seed is fixed.
    """
    model = program(1, hidden=2, counts=3)
    count = 8
    sites = draw_globals(model, 3) | {"kappa": torch.linspace(0.5, 4.0, count)}
    prompts = draw_prompts(model, count, 3)
    shares = torch.linspace(0.0, 1.0, count).unsqueeze(-1)
    observed = {"hidden": shares * sites["M"] + 0.3, "counts": (40 * shares * sites["Phi"] + 3).round()}
    missing = {"hidden": prompts.missing["hidden"], "counts": ~prompts.missing["hidden"] & prompts.missing["counts"]}
    prompts = replace(prompts, observed=observed, totals={"counts": observed["counts"].sum(-1)}, missing=missing)
    temper = torch.linspace(0.5, 2.0, count)
    found = conditional_posterior(model, prompts, NAMES[:1], sites, draws=1000, warmup=500, seed=0, temper=temper)
    assert found.converged.all()
    nodes = np.linspace(-60.0, 60.0, 4001)  # of logit w
    w = torch.tensor(1 / (1 + np.exp(-nodes)))
    grid = torch.stack([w, torch.tensor(1 / (1 + np.exp(nodes)))], -1)
    for n in range(count):
        rows = prompts.select(torch.full((len(grid),), n))
        own = sites | {"kappa": sites["kappa"][n]}
        trace = poutine.trace(poutine.condition(model.sample_prompts, {"w": grid})).get_trace(own, rows, temper[n])
        trace.compute_log_prob()
        log_p = sum(trace.nodes[name]["log_prob"] for name in ("w", "hidden", "counts")).numpy()
        p = np.exp(log_p - log_p.max()) * (grid[:, 0] * grid[:, 1]).numpy()
        cdf = np.cumsum(p) / p.sum()
        draws = found.weights[:, n, 0]
        empirical = (draws[:, None] <= grid[:, 0].numpy()).mean(0)
        assert np.abs(empirical - cdf)[(grid > 1e-12).all(-1).numpy()].max() < 1.95 / np.sqrt(found.ess[n, 0])


@pytest.mark.slow
def test_joint_without_evidence_is_the_prior() -> None:
    """Globals and weights of the joint chains have the prior's means: 5 standard errors each, a fixed seed."""
    model = program(2, hidden=1)
    count = 3
    prompts = draw_prompts(model, count, 0)
    prompts = replace(prompts, missing={"hidden": torch.ones(count, dtype=torch.bool)})
    found = joint_posterior(model, prompts, NAMES[:2], draws=800, chains=4, warmup=400, seed=0)
    assert found.converged.all()
    error = 5 / np.sqrt(found.ess.min())
    prior = np.array([3.0, 3.0, 1.5]) / 7.5
    assert np.abs(found.globals["pi"].mean(0) - prior).max() < error * 0.17
    assert np.abs(np.log(found.globals["kappa"]).mean()) < error * 0.7
    assert np.abs(np.log(found.globals["s2"]).mean(0) + 3).max() < error
    assert np.abs(found.weights.mean(0) - (0.95 * prior + 0.05 / 3)).max() < error * 0.4
    assert found.globals["M"].shape == (3200, 2, 1)


@pytest.mark.slow
def test_joint_follows_known_mixtures() -> None:
    """Known rows keep their weights; the others' chains agree with the labels that they carry."""
    model = program(2, hidden=2)
    rng = np.random.default_rng(0)
    weights = np.where(np.arange(16)[:, None] % 4 == 3, rng.dirichlet(np.ones(3), 16), np.eye(3)[np.arange(16) % 2])
    hidden = weights @ np.array([[2.0, 0.0], [-2.0, 1.0], [0.0, 0.0]]) + 0.2 * rng.normal(size=(16, 2))
    mixed = np.arange(16) % 4 == 3
    prompts = Prompts(
        torch.full((16,), 50.0),
        {},
        {"hidden": torch.zeros(16, dtype=torch.bool)},
        {"hidden": torch.tensor(hidden)},
        torch.tensor(np.where(mixed, -1, np.arange(16) % 2)),
        torch.tensor(np.where(mixed[:, None], weights, np.nan)),
    )
    found = joint_posterior(model, prompts, NAMES[:2], draws=500, chains=4, warmup=300, seed=0)
    np.testing.assert_allclose(found.weights[:, mixed], np.broadcast_to(weights[mixed], (2000, 4, 3)))
    assert np.isnan(found.r_hat[mixed]).all()
    assert found.converged.all()
    assert (found.mean[~mixed].argmax(1) == np.arange(16)[~mixed] % 2).all()
    np.testing.assert_allclose(found.globals["M"].mean(0), [[2.0, 0.0], [-2.0, 1.0]], atol=0.5)


@pytest.mark.slow
def test_the_guide_is_near_nuts(trained: Dispatcher, make_sample: Callable[..., object]) -> None:
    """The guide of a small dispatcher against NUTS with the globals at their medians: KS above its floor, and means."""
    torch.set_default_dtype(torch.float32)
    evidence = make_sample(12, 1).evidence  # type: ignore[attr-defined]
    found = reference.reference_posterior(trained, evidence, seed=0)
    kept = np.flatnonzero(found.converged)
    assert len(kept) >= 0.9 * len(evidence)
    guide, found = trained.posterior(evidence, draws=800, seed=0).select(kept), found.select(kept)
    (ours, first, second) = (
        np.clip(w, 1e-3, 1 - 1e-3) for w in (guide.weights, found.weights[:2000], found.weights[2000:])
    )
    distance, floor = (stats.ks_2samp(a, first, axis=0, method="asymp").statistic.mean() for a in (ours, second))
    assert distance - floor < 0.15
    assert np.abs(guide.mean - found.mean).mean() < 0.08


def test_posteriors_know_their_chains() -> None:
    """r-hat sees chains that differ, and is NaN for a weight that is known."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet([2.0, 3.0], (4 * 100, 3))
    weights[:100, 1] = rng.dirichlet([30.0, 3.0], 100)
    weights[:, 2] = [0.25, 0.75]
    found = ReferencePosterior(weights, ("a", "base"), chains=4)
    assert isinstance(found, DispatchPosterior)
    assert found.r_hat[0] == pytest.approx([1, 1], abs=0.02)
    assert (found.r_hat[1] > 1.2).all()
    assert np.isnan(found.r_hat[2]).all()
    assert (found.ess[0] > 200).all()
    assert (found.ess[1] < 50).all()
    assert found.select([2, 0]).r_hat.tolist()[1] == found.r_hat[0].tolist()
    shown = found.to_arviz()["posterior"]["weights"]
    assert shown.dims == ("chain", "draw", "prompt", "expert")
    np.testing.assert_array_equal(shown.values[2], weights[200:300])


def test_converged_is_r_hat_and_ess() -> None:
    """Both bounds, against arviz's own figures of each weight; what is below a thousandth, or known, does not count."""
    import arviz as az

    rng = np.random.default_rng(0)
    draws = np.zeros((4, 500, 7))
    noise = rng.normal(size=draws.shape)
    slow = np.zeros_like(noise)
    for step in range(1, 500):
        slow[:, step] = 0.9 * slow[:, step - 1] + noise[:, step]
    draws = np.stack([0.5 + 0.05 * each for each in (noise, slow)])[[0, 1, 0, 0, 0, 0, 0], ..., 0].transpose(1, 2, 0)
    draws[0, :, 2] += 0.05  # one chain is elsewhere
    draws[:, :, 3] = 0.3  # known
    draws[:, :, 4] = 10.0 ** -np.array([5, 9, 20, 4])[:, None]  # no blend can tell
    draws[:, :, 5] = np.array([0.2, 0.2, 0.6, 0.2])[:, None]  # chains that never move
    draws[1:, :, 6] = 0.5  # one alone moves
    weights = np.clip(draws, 0, 1).reshape(2000, 7)
    found = ReferencePosterior(np.stack([weights, 1 - weights], -1), ("a", "base"), chains=4)
    for prompt in (0, 1, 2):
        of_prompt = found.weights.reshape(4, 500, 7, 2)[:, :, prompt, 0]
        assert found.r_hat[prompt, 0] == pytest.approx(az.rhat(of_prompt, method="rank"))
        assert found.ess[prompt, 0] == pytest.approx(az.ess(of_prompt, method="bulk"))
    assert found.ess[1, 0] < 400 < found.ess[0, 0]
    assert found.r_hat[2, 0] > 1.01 > found.r_hat[0, 0]
    assert found.converged.tolist() == [True, False, False, True, True, False, False]
    alone = replace(found, chains=1)
    assert alone.converged.tolist() == [False, False, False, True, True, False, False]
