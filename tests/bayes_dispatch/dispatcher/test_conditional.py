"""The globals that known weights tell: likelier weights where the program is not true, and little else where it is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.exact.quadrature import Quadrature
from bayes_dispatch.dispatcher.fitting import conditional, pipeline
from bayes_dispatch.dispatcher.fitting.conditional import fit_conditionally
from bayes_dispatch.dispatcher.fitting.simulation import simulate
from bayes_dispatch.dispatcher.fitting.svi import GlobalsPosterior, SVISettings, isolated
from bayes_dispatch.dispatcher.fitting.temper import KnownPrompts
from bayes_dispatch.dispatcher.program.settings import Admixture

if TYPE_CHECKING:
    from tests.bayes_dispatch.conftest import Sample

STEPS = SVISettings(conditional_steps=60)


def simulated(fitted: Dispatcher, count: int, seed: int, moved: float = 0.0) -> KnownPrompts:
    """Prompts of known weights, drawn from the program under its prior, its means ``moved``."""
    state = fitted.state
    means = state.globals.locations["M"]
    noise = torch.randn(means.shape, generator=torch.Generator().manual_seed(seed))
    other = replace(state.globals, locations={**state.globals.locations, "M": means + moved * noise})
    weights = state.quadrature.prior(state.shares).draw(count, np.random.default_rng(seed))
    with isolated(seed):
        prompts = simulate(
            state.model, other.to(torch.float32), state.like, torch.tensor(weights).float(), state.temper
        )
    return KnownPrompts(prompts.to(torch.float64), weights)


def test_draws_give_the_density_of_the_evidence(fitted: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of importance ratios beside quadrature: within four standard errors and what cells are off by (.05), for
    each of 60 prompts but one; one in three hundred such tests would fail."""
    monkeypatch.setattr(conditional, "POOL", 2000)
    state, known = fitted.state, simulated(fitted, 60, 5)
    draws = conditional._Draws.of(state, known.prompts, known.weights, np.random.default_rng(0))
    supports, shares = draws.supports.astype(np.int64), draws.shares.astype(np.float64)
    terms = state.quadrature.log_density(known.prompts, supports, shares) + draws.log_ratios
    ratios = np.exp(terms - state.answer(known.prompts, state.shares).log_evidence[:, None])
    errors = ratios.std(1) / np.sqrt(ratios.shape[1])
    assert (abs(ratios.mean(1) - 1) > 4 * errors + 0.05).sum() <= 1
    assert abs(np.median(ratios.mean(1)) - 1) < 0.02


def test_known_weights_are_weighed_as_draws_are(fitted: Dispatcher) -> None:
    """A draw has the ratio that it would have if it were the known weights."""
    state, known = fitted.state, simulated(fitted, 20, 6)
    draws = conditional._Draws.of(state, known.prompts, known.weights, np.random.default_rng(0))
    one = np.zeros((20, 4))
    np.put_along_axis(one, draws.supports[:, 100].astype(np.int64), draws.shares[:, 100].astype(np.float64), 1)
    again = conditional._Draws.of(state, known.prompts, one / one.sum(1, keepdims=True), np.random.default_rng(0))
    np.testing.assert_allclose(again.of_known, draws.log_ratios[:, 100], rtol=1e-4, atol=1e-4)


def repeated(count: int, seed: int) -> tuple[Evidence, np.ndarray]:
    """Two experts that one number tells apart, not well, and a second view that repeats it."""
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=count)
    hidden = random.normal(size=(count, 1)) + labels[:, None]
    return Evidence({"once": hidden, "twice": hidden}, np.full(count, 50)), labels


def test_labels_are_likelier_where_the_program_is_not_true() -> None:
    """On prompts that no fit has seen, by .05 nats of each label at least, where views are no two measurements."""
    program = Admixture(views={"once": "vectors", "twice": "vectors"}, temper=1.0)
    (train, labels), (fresh, wanted) = repeated(600, 0), repeated(2000, 1)
    scores = []
    for steps in (0, 200):
        svi = SVISettings(60, rounds=1, conditional_steps=steps)
        dispatcher = Dispatcher(("low", "high"), program=program, svi=svi, features=FeatureSettings(folds=2))
        chances = dispatcher.fit(train, labels).predict_proba(fresh)
        scores.append(np.log(chances[np.arange(len(wanted)), wanted]).mean())
    assert scores[1] > scores[0] + 0.05, scores


def test_what_held_out_prompts_do_not_confirm_is_not_taken(fitted: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts of the program itself there is nothing to learn, and steps of such a size lead astray."""
    monkeypatch.setattr(conditional, "RATE", 3.0)
    monkeypatch.setattr(conditional, "STRAY", 100.0)
    state = fitted.state
    assert fit_conditionally(state, simulated(fitted, 200, 1), STEPS, 0) is state.globals


def same(first: GlobalsPosterior, second: GlobalsPosterior, name: str) -> np.ndarray:
    """By row of a global, whether it is the same."""
    return (first.locations[name] == second.locations[name]).flatten(1).all(1).numpy()


def test_components_that_no_prompt_is_known_of_stay(fitted: Dispatcher) -> None:
    state, known = fitted.state, simulated(fitted, 400, 3, moved=0.5)
    rows = np.flatnonzero(known.weights[:, [1, 3]].sum(1) == 0)
    some = KnownPrompts(known.prompts.select(torch.from_numpy(rows)), known.weights[rows])
    found = fit_conditionally(state, some, STEPS, 0)
    for name in ("M", "s2", "Phi"):
        np.testing.assert_array_equal(same(state.globals, found, name), [False, True, False])
        assert torch.equal(state.globals.locations[f"base_{name}"], found.locations[f"base_{name}"])
    for name in ("pi", "kappa"):
        assert torch.equal(state.globals.locations[name], found.locations[name])
    assert all(torch.equal(found.scales[name], scale) for name, scale in state.globals.scales.items())


def test_a_seed_gives_the_same_globals(fitted: Dispatcher) -> None:
    known, few = simulated(fitted, 60, 4, moved=0.5), SVISettings(conditional_steps=10)
    first, again, other = (fit_conditionally(fitted.state, known, few, seed) for seed in (0, 0, 1))
    assert all(torch.equal(value, again.locations[name]) for name, value in first.locations.items())
    assert not torch.equal(first.locations["M"], other.locations["M"])


@pytest.mark.parametrize(("known", "copies"), [(29, 1), (29, 2), (30, 1)])
def test_few_known_prompts_move_nothing(
    sample: Sample, settings: Any, known: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than thirty of them, however often they are there."""
    labels = np.where(np.cumsum(sample.labels >= 0) <= known, sample.labels, -1)
    rows = np.repeat(np.arange(len(labels)), copies)
    evidence, labels = sample.evidence.select(rows), labels[rows]
    given = settings(svi=10)
    given["svi"] = replace(given["svi"], conditional_steps=20)
    moved = Dispatcher(("sort", "reverse", "add"), **given).fit(evidence, labels)
    given["svi"] = replace(given["svi"], conditional_steps=0)
    left = Dispatcher(("sort", "reverse", "add"), **given).fit(evidence, labels)
    pairs = [(moved.state.globals.locations[name], left.state.globals.locations[name]) for name in ("M", "Phi")]
    assert all(torch.equal(*pair) for pair in pairs) == (known < 30)
    assert moved.report.conditional == (known == 30)


@pytest.mark.parametrize("moves", [True, False])
def test_the_temper_is_that_of_the_globals_that_are_served(
    sample: Sample, settings: Any, monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    """Where known weights move the globals it is chosen once more, under these."""
    asked = []

    def choose(quadrature: Quadrature, *_: object) -> float:
        asked.append(quadrature)
        return 1.0 + len(asked)

    monkeypatch.setattr(pipeline, "choose_temper", choose)
    if not moves:
        monkeypatch.setattr(pipeline, "fit_conditionally", lambda fitted, *_: fitted.globals)
    given = settings(svi=10)
    given["svi"] = replace(given["svi"], conditional_steps=20)
    found = Dispatcher(("sort", "reverse", "add"), **given).fit(sample.evidence, sample.labels, sample.mixtures)
    assert found.report.conditional == moves
    assert found.state.temper == (3.0 if moves else 2.0) == 1.0 + len(asked)
    for served, of_choice in zip(found.state.quadrature.densities, asked[-1].densities, strict=True):
        np.testing.assert_array_equal(served.columns, of_choice.columns)
    given["program"] = Admixture(temper=1.7)
    fixed = Dispatcher(("sort", "reverse", "add"), **given).fit(sample.evidence, sample.labels, sample.mixtures)
    assert fixed.state.temper == 1.7
    assert len(asked) == (2 if moves else 1)


@pytest.mark.parametrize("copies", [[1] * 40, [3] * 40, [1] * 39 + [900], [900] + [1] * 39, [9000] * 30])
def test_copies_of_a_prompt_are_held_out_together(fitted: Dispatcher, copies: list[int]) -> None:
    which = np.random.default_rng(0).permutation(np.repeat(np.arange(len(copies)), copies))
    one = simulated(fitted, 1, 0)
    known = KnownPrompts(one.prompts, np.repeat(one.weights, len(which), 0), which)
    rows, held = conditional._parted(known, np.random.default_rng(0))
    judged, learnt = set(which[rows[:held]].tolist()), set(which[rows[held:]].tolist())
    assert judged
    assert learnt
    assert not judged & learnt
