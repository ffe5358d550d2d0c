"""The NumPyro program against the Pyro program, and NUTS against posteriors known otherwise.

Laws: its density is Pyro's, every view has a twin; NUTS gives what weighted draws of the served prior give, what is
served, and jointly with the globals the prior without evidence, and known mixtures; r-hat and ESS know chains.
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
from bayes_dispatch.checks.reference.twin import TWINS
from bayes_dispatch.dispatcher.exact.cells import prompt_generators
from bayes_dispatch.dispatcher.exact.densities import ViewDensity
from bayes_dispatch.dispatcher.exact.supports import SupportPrior
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import KINDS, off_zero
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
            else off_zero(torch.tensor(rng.dirichlet(np.full(v.width, 0.1), count)))
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
@settings(max_examples=10, deadline=None, derandomize=True)
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
    assert TWINS.keys() == KINDS.keys()
    for kind, view in KINDS.items():
        for name in ("other", kind):
            model = DispatchModel(2, (view(3, name),))
            assert set(TWINS[kind](3, name).globals) == draw_globals(model, 0).keys() - {"pi", "kappa"}


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
@pytest.mark.parametrize(("families", "seed"), [(None, 3), ((0, 0, 1), 4)])
def test_nuts_is_the_prior_weighted_by_evidence(families: tuple[int, ...] | None, seed: int) -> None:
    """Prompts without evidence, with a label alone, and with views, of one to three components, at several τ.

    A million draws of the served prior, with the likelihoods of the Pyro program as weights, share nothing with the
    twin. Four Kolmogorov–Smirnov distances of each of eight prompts, at 1.95 √(1/ESS + 1/ESS of both) (each p = .001,
    and less where weights are exactly 0): false alarms in at most 1 of 30 seeds, and the seed is fixed.
    """
    model = replace(program(3, hidden=2, counts=4, surprise=2), families=families, sizes=(0.4, 0.35, 0.25))
    sites = draw_globals(model, seed) | {"pi": torch.tensor([0.4, 0.2, 0.3, 0.1])}
    pure, rng = np.eye(4), np.random.default_rng(seed)
    truth = np.array([pure[0], pure[1], pure[2], pure[3], pure[:2].mean(0), [0.1, 0.0, 0.9, 0], [0.3, 0.3, 0.4, 0]])
    truth, count = np.concatenate([truth, [[0.0, 0.2, 0.3, 0.5]]]), 8
    lengths, temper = torch.tensor(rng.integers(5, 60, count) * 1.0), torch.linspace(0.5, 2.0, count)
    none = torch.arange(count) < 2
    blank = Prompts(lengths, {"counts": lengths}, {view.name: none for view in model.views}, known=torch.tensor(truth))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nodes = poutine.trace(model.sample_prompts).get_trace(sites, blank, temper).nodes
    observed = {view.name: nodes[view.name]["value"] for view in model.views}
    prompts = replace(blank, observed=observed, known=None, labels=torch.tensor([-1, 2, *[-1] * 6]))
    found = conditional_posterior(model, prompts, NAMES[:3], sites, 1000, 4, 500, seed, temper)
    assert found.converged.all()
    assert found.weights.shape == (4000, count, 4)
    assert found.experts == (*NAMES[:3], "base")
    assert found.divergences.sum() <= 0.01 * found.weights[..., 0].size
    shares = model.label_shares(sites["pi"]).numpy()
    draws = torch.tensor(SupportPrior(model.sizes, shares, model.tree).draw(1_000_000, rng))
    grid = np.concatenate([[0.0, 1e-3, 1e-2], np.linspace(0.02, 0.98, 49), [0.99, 0.999]])
    for n in range(count):
        one = prompts.select(torch.tensor([n]))
        by_view = model.log_likelihood(sites, draws.unsqueeze(1), one, temper[n])
        weights = sum(by_view.values())[:, 0].softmax(0).numpy()
        if n == 1:
            weights = draws[:, 2].numpy() / float(draws[:, 2].sum())
        effective = 1 / np.square(weights).sum()
        assert effective > 5_000
        for k in range(4):
            places = np.searchsorted(grid, draws[:, k].numpy())
            expected = np.bincount(places, weights, len(grid) + 1).cumsum()[:-1]
            drawn = (found.weights[:, n, k, None] <= grid).mean(0)
            ess = np.nan_to_num(found.ess[n, k], nan=4000.0)
            assert np.abs(drawn - expected).max() < 1.95 * np.sqrt(1 / ess + 1 / effective)


def test_errors() -> None:
    model, count = PROGRAMS[0]
    prompts, sites = draw_prompts(model, count, 0), draw_globals(model, 0)
    with pytest.raises(ConfigError, match="expected chains to be a whole number ≥ 1, got 0"):
        conditional_posterior(model, prompts, NAMES[:2], sites, draws=4, chains=0, warmup=1)
    with pytest.raises(ConfigError, match="expected 2 expert names, got 3"):
        joint_posterior(model, prompts, NAMES[:3])
    many = program(29)
    with pytest.raises(ConfigError, match="expected at most 4096 sets of components to sum over, got 4525 of 30"):
        conditional_posterior(many, Prompts(torch.ones(1), {}, {}), [f"{k}" for k in range(29)], draw_globals(many, 0))
    del sites["M"]
    with pytest.raises(TensorError, match=r"expected values of the globals \['M', "):
        conditional_posterior(model, prompts, NAMES[:2], sites)


def test_without_jax_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, reference.__name__)
    with pytest.raises(
        MissingDependencyError, match=r"^expected the extra reference \(pip install '\.\[reference\]'.* got no jax$"
    ):
        importlib.import_module(reference.__name__)


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
    assert np.abs(np.log(found.globals["xi"]).mean() + 4) < error
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
def test_the_served_posterior_is_near_nuts(fitted: Dispatcher, make_sample: Callable[..., object]) -> None:
    """Mean Kolmogorov–Smirnov distances above those of NUTS to itself, and means, with the globals at their medians.

    Under the very same globals only the quadrature's cells differ, 1/64 of an edge long. Served posteriors sum the
    globals up over their own posterior, which is wider.
    """
    torch.set_default_dtype(torch.float32)
    evidence = make_sample(12, 1).evidence  # type: ignore[attr-defined]
    nuts = reference.reference_posterior(fitted, evidence, seed=0)
    kept = np.flatnonzero(nuts.converged)
    assert len(kept) >= 0.9 * len(evidence)
    state, names = fitted.state, nuts.experts
    densities = ViewDensity.of_views(state.model.views, [state.globals.center()], state.temper)
    exact = replace(state.quadrature, densities=densities)(state.prompts(evidence), state.labels(fitted.prior.mean))
    same = DispatchPosterior(exact.draw(2000, prompt_generators(0, len(evidence)))[0], names)
    served, nuts = fitted.posterior(evidence, draws=2000, seed=0).select(kept), nuts.select(kept)

    def distance(weights: np.ndarray, others: np.ndarray) -> float:
        pair = (np.clip(each, 1e-3, 1 - 1e-3) for each in (weights, others))
        return float(stats.ks_2samp(*pair, axis=0, method="asymp").statistic.mean())

    first, second = nuts.weights[:2000], nuts.weights[2000:]
    floor = distance(first, second)
    assert floor < 0.04
    assert distance(same.select(kept).weights, first) - floor < 0.01
    assert distance(served.weights, first) - floor < 0.05
    assert np.abs(exact.mean[kept] - nuts.mean).max() < 0.02
    assert np.abs(served.mean - nuts.mean).mean() < 0.02


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


def test_nuts_of_several_runs() -> None:
    """Each prompt keeps what is known of its chains; draws of globals are those of one run, or none."""
    weights = np.random.default_rng(0).dirichlet([0.5, 1, 2], (7, 4))
    drawn = {"pi": np.ones((7, 3))}
    first, second = (
        ReferencePosterior(
            weights, ("a", "b", "base"), divergences=np.arange(4) + n, steps=np.full(4, n), globals=drawn
        )
        for n in (10, 20)
    )
    joined = ReferencePosterior.concatenate([first.select([0, 1]), second])
    assert joined.divergences.tolist() == [10, 11, 20, 21, 22, 23]
    assert joined.steps.tolist() == [10, 10, 20, 20, 20, 20]
    assert joined.globals is drawn
    assert not ReferencePosterior.concatenate([first, replace(second, globals={"pi": np.zeros((7, 3))})]).globals
    assert not len(ReferencePosterior.concatenate([first, replace(second, steps=np.zeros(0))]).steps)
    with pytest.raises(TensorError, match=r"expected posteriors of one class, .*, got"):
        DispatchPosterior.concatenate([first])


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
