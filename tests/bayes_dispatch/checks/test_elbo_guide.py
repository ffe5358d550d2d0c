"""The ELBO-trained guide: its gradient is that of the ELBO, and it is a dispatcher's posterior from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.checks.elbo_guide import ELBOGuide, ELBOSettings, _log_draws, fit_elbo_guide
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.program.settings import OneLabelMixture
from bayes_dispatch.errors import ConfigError, NotFittedError, TensorError

if TYPE_CHECKING:
    from tests.bayes_dispatch.conftest import Sample

SHORT = ELBOSettings(steps=150, batch_size=64, learning_rate=5e-3)


@pytest.fixture(scope="module")
def guide(fitted: Dispatcher, sample: Sample) -> ELBOGuide:
    return fit_elbo_guide(fitted, sample.evidence, SHORT)


def test_training_raises_the_elbo_and_finds_the_experts(guide: ELBOGuide, fresh: Sample) -> None:
    assert guide.losses.shape == (SHORT.steps,)
    assert guide.losses[-30:].mean() < guide.losses[:30].mean() - 3
    pure = fresh.labels >= 0
    assert (guide.predict_proba(fresh.evidence)[pure].argmax(1) == fresh.labels[pure]).mean() > 0.8  # chance is .33


def test_it_answers_like_a_dispatcher(guide: ELBOGuide, fitted: Dispatcher, fresh: Sample) -> None:
    ours, theirs = guide.posterior(fresh.evidence, 400, seed=3), fitted.posterior(fresh.evidence, 400, seed=3)
    assert ours.weights.shape == theirs.weights.shape
    assert ours.experts == theirs.experts
    mixtures = guide.mixtures_of(fresh.evidence)
    assert mixtures.concentration.shape == (len(fresh.evidence), 1, 4)
    assert np.abs(ours.mean - mixtures.mean).max() < 4.5 * 0.5 / 20  # sd at most .5, 400 draws; 240 means, below .2%
    np.testing.assert_allclose(guide.predict_proba(fresh.evidence).sum(1), 1)
    assert np.isfinite(guide.weigh(fresh.evidence, 30).log_evidence).all()


def test_draws_depend_on_the_seed_of_each_prompt_alone(guide: ELBOGuide, fresh: Sample) -> None:
    every = guide.posterior(fresh.evidence, 8, seed=0).weights
    np.testing.assert_array_equal(every, guide.posterior(fresh.evidence, 8, seed=0).weights)
    assert (every != guide.posterior(fresh.evidence, 8, seed=1).weights).any()
    three = fresh.evidence.select([4, 2, 0])
    alone = guide.posterior(three.select([1]), 8, seed=[7]).weights
    np.testing.assert_allclose(guide.posterior(three, 8, seed=[5, 7, 9]).weights[:, [1]], alone, rtol=1e-9)


def test_training_is_a_function_of_its_seed(fitted: Dispatcher, sample: Sample) -> None:
    state, short = torch.get_rng_state(), ELBOSettings(steps=3)
    losses = [fit_elbo_guide(fitted, sample.evidence, short, seed).losses for seed in (0, 0, 1)]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert (losses[0] != losses[2]).any()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


def test_draws_are_dirichlet_down_to_the_smallest_concentrations() -> None:
    """Means of log weights are digamma(a) − digamma(a_0); 4.5 standard errors of 6 means: false alarms below 1e-4."""
    torch.manual_seed(0)
    alpha = torch.tensor([[0.02, 0.5, 2.0], [3.0, 40.0, 0.1]], dtype=torch.float64)
    logs = _log_draws(alpha, 20_000)
    expected = alpha.digamma() - alpha.sum(-1, keepdim=True).digamma()
    error = logs.std(0) / len(logs) ** 0.5
    assert ((logs.mean(0) - expected).abs() < 4.5 * error).all()
    np.testing.assert_allclose(logs.exp().sum(-1), 1, rtol=1e-12)


def test_gradients_pass_through_draws() -> None:
    """The gradient of E[log w] is known: trigamma(a) on the diagonal, − trigamma(a_0)."""
    torch.manual_seed(0)
    alpha = torch.tensor([[0.5, 1.0, 4.0]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(_log_draws(alpha, 200_000)[..., 0].mean(), alpha)
    total = torch.polygamma(1, alpha.detach().sum())
    expected = torch.tensor([[float(torch.polygamma(1, torch.tensor(0.5))), 0.0, 0.0]]) - total
    assert (found - expected).abs().max() < 0.06  # standard errors below .012


def test_what_cannot_be_trained_is_refused(fitted: Dispatcher, guide: ELBOGuide, sample: Sample) -> None:
    with pytest.raises(ConfigError, match=r"expected positive steps, .* got"):
        ELBOSettings(draws=0)
    with pytest.raises(NotFittedError):
        fit_elbo_guide(Dispatcher(["a", "b"]), sample.evidence)
    with pytest.raises(ConfigError, match="expected at least two prompts and an admixture, got 1 for Admixture"):
        fit_elbo_guide(fitted, sample.evidence.select([0]))
    with pytest.raises(TensorError, match="expected 6 features"):
        fit_elbo_guide(fitted, Evidence.from_array(np.zeros((3, 5))))
    with pytest.raises(ConfigError, match="expected at least 1 draw, got 0"):
        guide.posterior(sample.evidence, 0)
    with pytest.raises(ConfigError, match="expected one seed, or one for each of 160 prompts, got 2"):
        guide.posterior(sample.evidence, 2, seed=[1, 2])
    with pytest.raises(ConfigError, match="expected at least 25 proposals, got 24"):
        guide.weigh(sample.evidence, 24)


def test_the_one_label_program_needs_no_guide(sample: Sample, settings: Callable[..., dict[str, Any]]) -> None:
    exact = Dispatcher(("sort", "reverse", "add"), program=OneLabelMixture(), **settings())
    exact.fit(sample.evidence, sample.labels, sample.mixtures)
    with pytest.raises(ConfigError, match="admixture, got 160 for OneLabelMixture"):
        fit_elbo_guide(exact, sample.evidence)
