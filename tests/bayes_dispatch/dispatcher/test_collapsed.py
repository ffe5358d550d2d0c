"""Globals with the weights integrated out: densities against quadrature and brute force, the posterior against NUTS."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy import integrate

from bayes_dispatch.checks.reference import joint_posterior
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.fitting.collapsed import _log_evidence, _propose, fit_collapsed, log_dirichlet
from bayes_dispatch.dispatcher.fitting.svi import GlobalsPosterior, SVISettings, isolated
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import DirichletMixtures
from bayes_dispatch.dispatcher.guide.guides import RESOLUTION
from bayes_dispatch.dispatcher.program.generative import floored
from bayes_dispatch.dispatcher.program.settings import Admixture, OneLabelMixture
from bayes_dispatch.errors import ConfigError

if TYPE_CHECKING:
    from tests.bayes_dispatch.conftest import Sample

EXPERTS = ("sort", "reverse", "add")


def test_a_dirichlet_where_all_weights_are_large() -> None:
    weights = torch.distributions.Dirichlet(torch.full((50, 4), 5.0, dtype=torch.float64)).sample()
    alpha = torch.tensor([0.3, 1.0, 2.0, 7.0], dtype=torch.float64)
    expected = torch.distributions.Dirichlet(alpha).log_prob(weights)
    torch.testing.assert_close(log_dirichlet(alpha, weights), expected)


@pytest.mark.parametrize("alpha", [(0.1, 0.4, 1.5), (0.5, 0.5, 0.5), (2.0, 1.0, 3.0)])
def test_small_weights_are_integrated_out(alpha: tuple[float, ...]) -> None:
    """∫ of the density over the first weight below the resolution, by quadrature in its logarithm."""
    concentration = torch.tensor(alpha, dtype=torch.float64)

    def density(log_first: float) -> float:
        first = np.exp(log_first)
        weights = torch.tensor([first, 0.3, 0.7 - first], dtype=torch.float64)
        return float(torch.distributions.Dirichlet(concentration).log_prob(weights).exp()) * first

    mass, _ = integrate.quad(density, np.log(RESOLUTION) - 40 / alpha[0], np.log(RESOLUTION), limit=500)
    found = log_dirichlet(concentration, torch.tensor([RESOLUTION / 3, 0.3, 0.7], dtype=torch.float64))
    assert float(found.exp()) == pytest.approx(mass, rel=3e-3)


def test_the_evidence_of_a_prompt_is_that_of_brute_force(
    fitted: "Dispatcher", make_sample: "Callable[..., Sample]"
) -> None:
    """400,000 draws from the prior of the weights; within 5 standard errors of both sums, and those below .1 nats."""
    some, state = make_sample(12, 3), fitted.state
    rows = torch.arange(12)
    prompts = replace(
        state.prompts(some.evidence),
        labels=torch.where(rows % 3 == 0, torch.from_numpy(some.labels), -1),
        known=torch.where((rows % 4 == 3)[:, None], torch.from_numpy(some.weights), torch.nan),
    )
    answer = state.answer(prompts, fitted.prior.mean)
    with isolated(0, torch.float64), torch.no_grad():
        sites = state.globals.to(torch.float64).center()
        runs = torch.stack(
            [_log_evidence(state.model, sites, prompts, *_propose(state.model, answer)) for _ in range(100)]
        )
        prior = state.model.weights_prior(sites)
        pieces = []
        for _ in range(100):
            weights = prior.sample((4_000, 12))
            values = sum(state.model.log_likelihood(sites, weights, prompts).values())
            assert isinstance(values, torch.Tensor)
            label = torch.distributions.Categorical(floored(weights)).log_prob(prompts.labels.clamp(min=0))
            pieces.append((values + torch.where(prompts.labels >= 0, label, 0.0)).logsumexp(0) - np.log(4_000))
        known = sum(state.model.log_likelihood(sites, prompts.known.nan_to_num(), prompts).values())
    given = (rows % 4 == 3).numpy()
    for parts in (runs, torch.stack(pieces)):
        assert float(_error(parts)[~given].max()) < 0.1
    ours, brute = _mean(runs), _mean(torch.stack(pieces))
    errors = np.hypot(_error(runs), _error(torch.stack(pieces)))
    assert (np.abs(ours - brute) < 5 * errors + 5e-3)[~given].all()
    np.testing.assert_allclose(runs[:, given], np.tile(np.asarray(known)[given], (100, 1)), rtol=1e-12)


def _mean(logs: torch.Tensor) -> np.ndarray:
    return (logs.logsumexp(0) - np.log(len(logs))).numpy()


def _error(logs: torch.Tensor) -> np.ndarray:
    """Standard error of the logarithm of the mean."""
    values = (logs - logs.max(0).values).exp()
    return (values.std(0) / values.mean(0) / len(logs) ** 0.5).numpy()


def test_correlated_draws_have_their_covariance() -> None:
    """20,000 draws of sites given in another order than that of their names: entries within .06 of sds near 1."""
    rng = np.random.default_rng(0)
    factor = torch.from_numpy(np.linalg.cholesky(np.cov(rng.normal(size=(5, 9)))))
    shapes = {"s2": torch.Size([2, 1]), "M": torch.Size([3])}
    mean = torch.arange(5.0, dtype=torch.float64)
    posterior = GlobalsPosterior.correlated(shapes, mean, factor)
    with isolated(0, torch.float64):
        drawn = [posterior.draw() for _ in range(20_000)]
    flat = np.stack([np.concatenate([each["s2"].log().numpy().ravel(), each["M"].numpy()]) for each in drawn])
    covariance = (factor @ factor.T).numpy()
    np.testing.assert_allclose(np.cov(flat.T), covariance, atol=0.06 * covariance.diagonal().max())
    np.testing.assert_allclose(flat.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(posterior.scales["M"] ** 2, covariance.diagonal()[2:])


def test_a_fit_with_collapsed_steps(sample: "Sample", settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """It has a covariance, a report of them, and is the same after saving; without them nothing of this is there."""
    given = settings(svi=20) | {"svi": SVISettings(steps=20, collapsed=6)}
    fitted = Dispatcher(EXPERTS, **given).fit(sample.evidence, sample.labels, sample.mixtures)
    count = sum(value.numel() for value in fitted.state.globals.locations.values())
    assert fitted.state.globals.factor is not None
    assert fitted.state.globals.factor.shape == (count, count)
    assert fitted.report.collapsed.shape == (6,)
    assert np.isfinite(fitted.report.collapsed).all()
    fitted.save(tmp_path / "saved")
    loaded = Dispatcher.load(tmp_path / "saved")
    assert loaded.svi == given["svi"]
    for ours, theirs in zip(fitted.state.draws, loaded.state.draws, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    ours, theirs = (each.posterior(sample.evidence, 8, resample=True).weights for each in (fitted, loaded))
    np.testing.assert_array_equal(ours, theirs)
    plain = Dispatcher(EXPERTS, **settings(svi=20)).fit(sample.evidence, sample.labels, sample.mixtures)
    assert plain.state.globals.factor is None
    assert len(plain.report.collapsed) == 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            Admixture(families={"x": ["sort", "reverse"]}),
            r"expected an admixture without families .*, got families of experts",
        ),
        (OneLabelMixture(), r"expected an admixture without families .*, got one label a prompt"),
    ],
)
def test_where_weights_cannot_be_integrated_out(
    program: Admixture,
    reason: str,
    sample: "Sample",
    settings: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are told so before anything is fitted."""
    monkeypatch.setattr("bayes_dispatch.dispatcher.fitting.pipeline.fit_globals", lambda *_: pytest.fail("SVI ran"))
    given = settings() | {"svi": SVISettings(steps=4, collapsed=3), "program": program}
    with pytest.raises(ConfigError, match=reason):
        Dispatcher(EXPERTS, **given).fit(sample.evidence, sample.labels)


def test_too_many_globals_and_steps_below_0(
    fitted: "Dispatcher", fresh: "Sample", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayes_dispatch.dispatcher.fitting.collapsed.MOST", 10)
    state = fitted.state
    prompts = state.prompts(fresh.evidence)
    answer = state.answer(prompts, fitted.prior.mean)
    assert isinstance(answer, DirichletMixtures)
    with pytest.raises(ConfigError, match="expected at most 10 numbers of globals for collapsed steps, got"):
        fit_collapsed(state.model, state.globals, prompts, answer, SVISettings(collapsed=3), 0)
    with pytest.raises(ConfigError, match="expected collapsed steps ≥ 0, got -1"):
        SVISettings(collapsed=-1)


@pytest.mark.slow
def test_shares_and_precision_are_those_of_nuts(fitted: "Dispatcher", make_sample: "Callable[..., Sample]") -> None:
    """Means of log pi and log kappa within .6 of NUTS's sds, and sds within a factor of 1.6, where SVI alone has half.

    Fixed seeds; between seeds of the fit the means move by .1 sds or so.
    """
    few = make_sample(20, 5)
    svi = SVISettings(steps=400, collapsed=500)
    again = replace(fitted, svi=svi)
    again._state, again._prior = fitted.state, fitted.prior
    state = again.recalibrate(few.evidence, few.labels).state
    prompts = replace(state.prompts(few.evidence), labels=torch.from_numpy(few.labels))
    with isolated(0, torch.float64):
        nuts = joint_posterior(state.model, prompts, EXPERTS, 200, 4, 150, 0)
        drawn = [state.globals.to(torch.float64).draw() for _ in range(2_000)]
    for name in ("pi", "kappa"):
        ours = np.log(np.stack([each[name].numpy() for each in drawn]))
        theirs = np.log(nuts.globals[name])
        off = np.abs(ours.mean(0) - theirs.mean(0)) / theirs.std(0)
        ratio = ours.std(0) / theirs.std(0)
        assert off.max() < 0.6, name
        assert 1 / 1.6 < ratio.min() <= ratio.max() < 1.6, name
