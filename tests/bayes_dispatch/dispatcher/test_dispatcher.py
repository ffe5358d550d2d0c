"""The estimator's draws and probabilities agree, belong to each prompt alone, and follow the seed; no evidence is
uncertainty, simulations are of the program. Bad input is one clear line."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from bayes_dispatch.checks.coverage import simulated_coverage
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.simulation import simulate
from bayes_dispatch.dispatcher.fitting.svi import isolated
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.errors import BayesDispatchError, ConfigError, EvidenceError, NotFittedError, TensorError
from tests.bayes_dispatch.conftest import coarsely

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bayes_dispatch.conftest import Sample

ONE_LINE = r"^expected [^\n]*got [^\n]+$"


def test_draws(fitted: Dispatcher, fresh: "Sample") -> None:
    posterior = fitted.posterior(fresh.evidence, draws=7, seed=0)
    assert posterior.weights.shape == (7, 60, 4)
    assert posterior.experts == ("sort", "reverse", "add", "base")
    again, other = (fitted.posterior(fresh.evidence, draws=7, seed=seed).weights for seed in (0, 1))
    assert np.array_equal(posterior.weights, again)
    assert not np.array_equal(posterior.weights, other)


def test_a_prompt_depends_on_itself_only(fitted: Dispatcher, fresh: "Sample") -> None:
    """With a seed of its own, a prompt's draws are the same alone, in any batch, and at any place in it."""
    seeds = list(range(100, 160))
    whole = fitted.posterior(fresh.evidence, draws=4, seed=seeds).weights
    for rows in ([0], [41, 7, 5, 8, 19], list(range(59, -1, -1))):
        some = fitted.posterior(fresh.evidence.select(rows), draws=4, seed=[seeds[row] for row in rows]).weights
        np.testing.assert_allclose(some, whole[:, rows], atol=1e-12, rtol=0)
    probabilities = fitted.predict_proba(fresh.evidence)
    for row in (3, 5, 19):
        alone = fitted.predict_proba(fresh.evidence.select([row]))
        np.testing.assert_allclose(alone, probabilities[[row]], atol=1e-12)


def test_equal_seeds_on_equal_prompts(fitted: Dispatcher, fresh: "Sample") -> None:
    """One seed for all still gives each prompt a generator of its own; the same seed for two gives them the same."""
    twice = fresh.evidence.select([3, 3])
    a, b = fitted.posterior(twice, draws=4, seed=2).weights.swapaxes(0, 1)
    assert not np.array_equal(a, b)
    a, b = fitted.posterior(twice, draws=4, seed=[2, 2]).weights.swapaxes(0, 1)
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_probabilities_are_those_of_draws(fitted: Dispatcher, fresh: "Sample") -> None:
    """Within 5 standard errors of 4,000 draws, and what a sixteenth of the simplex may be off where two are largest."""
    probabilities = fitted.predict_proba(fresh.evidence)
    posterior = fitted.posterior(fresh.evidence, draws=4_000, seed=0)
    error = np.sqrt(probabilities * (1 - probabilities) / 4_000)
    assert (np.abs(posterior.probability_best - probabilities) < 5 * error + 0.02).all()
    np.testing.assert_allclose(posterior.mean, fitted.mean(fresh.evidence), atol=0.04)
    names = np.array(posterior.experts)
    assert np.array_equal(fitted.predict(fresh.evidence), names[probabilities.argmax(1)])


def test_missing_views(fitted: Dispatcher, fresh: "Sample") -> None:
    """A view that is missing for all prompts is a view that is not there; whatever is left is used."""
    views, lengths = fresh.evidence.views, np.full(60, 64)
    counts = Evidence({"counts": views["counts"]}, lengths)
    masked = Evidence(views, lengths, {"hidden": np.ones(60, bool)})
    assert np.array_equal(fitted.predict_proba(counts), fitted.predict_proba(masked))
    hidden = Evidence.from_array(views["hidden"])
    assert not np.allclose(fitted.predict_proba(hidden), fitted.predict_proba(counts), atol=0.05)
    assert np.array_equal(fitted.predict_proba(hidden), fitted.predict_proba(views["hidden"]))
    more = Evidence({**views, "smell": np.ones((60, 2))}, lengths)
    assert np.array_equal(fitted.predict_proba(more), fitted.predict_proba(Evidence(views, lengths)))


def test_no_evidence_is_uncertainty(fitted: Dispatcher, fresh: "Sample") -> None:
    """A prompt that lacks every view is less certain than one that has them."""
    views = fresh.evidence.views
    nothing = Evidence(views, missing={name: np.ones(60, bool) for name in views})
    assert fitted.predict_proba(nothing).max() < 0.8
    pure = fresh.labels >= 0
    assert fitted.posterior(nothing).entropy.mean() > fitted.posterior(fresh.evidence).entropy[pure].mean()


def test_programs_of_other_sizes_are_other_dispatchers(fitted: Dispatcher) -> None:
    """A gate or a prior that belongs to one is refused by the other."""
    state = fitted.state
    other = replace(state, model=replace(state.model, sizes=(1.0, 0.0, 0.0)))
    assert other.fingerprint != state.fingerprint


def test_no_prompts(fitted: Dispatcher) -> None:
    empty = Evidence({"hidden": np.zeros((0, 6))})
    assert fitted.posterior(empty, draws=3).weights.shape == (3, 0, 4)
    assert fitted.predict_proba(empty).shape == (0, 4)


def test_simulations(fitted: Dispatcher) -> None:
    """As many as asked for, on the simplex, repeatable, at given weights where given."""
    truth, posterior = fitted.simulate(23, draws=5, seed=1)
    np.testing.assert_allclose(truth.sum(1), 1, atol=1e-5)
    assert posterior.weights.shape == (5, 23, 4)
    assert np.array_equal(fitted.simulate(23, draws=5, seed=1)[0], truth)
    assert not np.array_equal(fitted.simulate(23, draws=5, seed=2)[0], truth)
    given = np.eye(4)[np.arange(300) % 3]
    truth, posterior = fitted.simulate(300, draws=32, seed=1, weights=given)
    assert np.array_equal(truth, given)
    assert (posterior.mean.argmax(1) == np.arange(300) % 3).mean() > 0.8


def test_a_vague_prompt_costs_its_own_memory(fitted: Dispatcher, fresh: "Sample") -> None:
    """What is kept of each prompt is what was asked: 120 more sharp ones beside a vague one, whose posterior
    has tens of kilobytes, take less than three each."""
    vague = Evidence({"hidden": np.zeros((1, 6))}, missing={"hidden": np.ones(1, bool)})
    sharp = fresh.evidence.select(np.flatnonzero(fresh.weights.max(1) == 1)[:40])
    few, many = (Evidence.concatenate([vague, *[sharp] * times]) for times in (2, 5))
    fitted = coarsely(fitted, rounds=1)
    gate = Gate.calibrate(fitted, few)

    def draws(evidence: Evidence) -> np.ndarray:
        return fitted.posterior(evidence, draws=2).weights

    asked = (fitted.predict_proba, fitted.mean, fitted.log_evidence, partial(gate.p_values, fitted), draws)
    for call in asked:
        peaks = []
        for evidence in (few, many):
            tracemalloc.start()
            call(evidence)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] - peaks[0] < 120 * 3 * 1024


def test_simulated_prompts_are_independent(fitted: Dispatcher) -> None:
    """Each has globals of its own: where an expert's mean is as good as unknown, no two prompts of it are alike.

    What ranks are held against, and standard errors of simulated coverage, take them for independent.
    """
    state = fitted.state
    scales = {name: 100.0 + 0 * each if name == "M" else each for name, each in state.globals.scales.items()}
    with isolated(0):
        prompts = simulate(state.model, replace(state.globals, scales=scales), state.like, torch.eye(4)[[0] * 80], 1.0)
    hidden = prompts.observed["hidden"]
    apart = (hidden[:, None] - hidden).norm(dim=-1) + 1e3 * torch.eye(80)
    assert apart.min(1).values.median() > 10
    one = state.globals.draw(torch.Generator().manual_seed(0))
    some = state.globals.draw(torch.Generator().manual_seed(0), (5,))
    assert {name: (5, *each.shape) for name, each in one.items()} == {name: each.shape for name, each in some.items()}


@pytest.mark.parametrize("call", ["posterior", "predict_proba", "predict", "simulate", "save"])
def test_unfitted(call: str, tmp_path: "Path") -> None:
    argument = {"simulate": 3, "save": tmp_path / "new"}.get(call, np.ones((2, 3)))
    dispatcher = Dispatcher(["a", "b"])
    assert not dispatcher.fitted
    with pytest.raises(NotFittedError, match=ONE_LINE):
        getattr(dispatcher, call)(argument)
    assert not (tmp_path / "new").exists()


def test_scikit_learns_clone_has_the_settings_alone(fitted: Dispatcher) -> None:
    """It shares nothing that a fit would change."""
    cloned = clone(fitted)
    assert type(cloned) is Dispatcher
    settings = ("experts", "random_state", "svi", "features", "program")
    assert [getattr(cloned, name) for name in settings] == [getattr(fitted, name) for name in settings]
    assert fitted.fitted
    assert not cloned.fitted


@pytest.mark.parametrize(
    "arguments",
    [(["a"],), ([],), (["a", "a"],), (["a", "base"],), ("abc",), (3,), ([3, 4],), (["a", "b"], -1), (["a", "b"], 1.5)],
    ids=lambda a: str(a),
)
@pytest.mark.usefixtures("unchecked")
def test_bad_dispatchers(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=ONE_LINE):
        Dispatcher(*arguments)


def test_bad_questions(fitted: Dispatcher, fresh: "Sample") -> None:
    for draws in (0, -3):
        with pytest.raises(ConfigError, match=f"expected draws to be a whole number ≥ 1, got {draws}"):
            fitted.posterior(fresh.evidence, draws=draws)
    with pytest.raises(ConfigError, match="one for each of 60 prompts, got 2"):
        fitted.posterior(fresh.evidence, seed=[1, 2])
    for seed in (-1, [*range(59), -7]):
        with pytest.raises(ConfigError, match=r"expected .*seed to be a whole number .*got -"):
            fitted.posterior(fresh.evidence, seed=seed)
    with pytest.raises(TensorError, match="expected 6 features in the hidden view, got 5"):
        fitted.predict_proba(np.ones((2, 5)))
    with pytest.raises(TensorError, match="expected view 'counts' of width 5, got 4"):
        fitted.predict_proba(Evidence({"counts": np.ones((2, 4))}))
    with pytest.raises(EvidenceError, match=r"expected at least one of the views .* got \['smell'\]"):
        fitted.predict_proba(Evidence({"smell": np.ones((2, 4))}))
    with pytest.raises(EvidenceError, match=r"expected finite numbers in 'hidden', .*got nan"):
        fitted.predict_proba(np.full((2, 6), np.nan))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("array", [np.ones(6), np.ones((2, 6, 1)), np.array([["a"] * 6]), np.full((1, 6), None)])
def test_bad_arrays(fitted: Dispatcher, array: np.ndarray) -> None:
    with pytest.raises(EvidenceError, match=ONE_LINE):
        fitted.predict_proba(array)


RAGGED = [[1], [1, 2]]
CALLS: list[Callable[[Dispatcher], object]] = [
    *(lambda d, labels=labels: d.update(labels) for labels in (1, "a", None, RAGGED, [[1]], [], [10**400])),
    lambda d: d.feedback(3, 1),
    lambda d: d.feedback([["sort"]], 1),
    lambda d: d.feedback(["nosuch", 3], [1, 1]),
    *(lambda d, served=served: d.feedback(served, [1.0]) for served in ([3], [[0.5, [0.5]]], np.full((1, 1, 4), 0.25))),
    lambda d: d.feedback(["sort", np.eye(4)[0]], [1, 1]),
    lambda d: d.feedback([[1, 0, 0, 0], "sort"], [1, 1]),
    *(lambda d, reward=reward: d.feedback("sort", reward) for reward in ("x", RAGGED, 10**400, None)),
    lambda d: d.feedback("sort", 1, reliability="a"),
    lambda d: d.prior.interval("a"),
    *(lambda d, y=y: Dispatcher(["a", "b"]).fit(np.eye(2), y) for y in ("a", RAGGED, ["a", "c"], [10**400, 0], 1)),
    *(lambda d, w=w: Dispatcher(["a", "b"]).fit(np.eye(2), None, w) for w in ("abc", RAGGED, [[10**400, 0, 0]] * 2)),
    *(lambda d, count=count: d.simulate(count) for count in (0, -1, 1.5, "a")),
    *(lambda d, w=w: d.simulate(2, weights=w) for w in ("a", RAGGED, np.eye(4)[:1], 2 * np.eye(4)[:2], np.eye(3)[:2])),
    lambda d: d.simulate(1, weights=[[2, -1, 0, 0]]),
    lambda d: d.simulate(1, draws=0),
    *(lambda d, w=w: simulated_coverage(d, w) for w in ("a", RAGGED, [], np.eye(4) - 1e-3, np.eye(3))),
    *(lambda d, levels=levels: simulated_coverage(d, levels=levels) for levels in (3, "a", ["a"], [0.5, None])),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_what_is_of_another_kind_is_refused_in_a_line(fitted: Dispatcher, call: Callable[[Dispatcher], object]) -> None:
    before = fitted.prior
    with pytest.raises(BayesDispatchError, match=ONE_LINE):
        call(fitted)
    assert fitted.prior is before
