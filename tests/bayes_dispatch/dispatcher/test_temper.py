"""The temper that prompts of known weights choose: found where it is known, from a bounded number of them."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from bayes_dispatch.dispatcher.fitting.simulation import simulate
from bayes_dispatch.dispatcher.fitting.svi import isolated
from bayes_dispatch.dispatcher.fitting.temper import KnownPrompts, choose_temper

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from tests.bayes_dispatch.conftest import Sample


def known(fitted: "Dispatcher", count: int, temper: float, seed: int, pure: bool = False) -> KnownPrompts:
    """Prompts of known weights, drawn from the program at a noise temper."""
    state, random = fitted.state, np.random.default_rng(seed)
    drawn = np.eye(4)[random.integers(4, size=count)] if pure else random.dirichlet(np.full(4, 0.5), count)
    with isolated(seed):
        prompts = simulate(
            state.model, state.globals.to(torch.float32), state.like, torch.tensor(drawn, dtype=torch.float32), temper
        )
    return KnownPrompts(prompts.to(torch.float64), drawn)


@pytest.mark.parametrize("temper", [1.0, 1.6, 2.5])
def test_the_temper_of_simulated_prompts_is_found(fitted: "Dispatcher", temper: float) -> None:
    """Within a factor of 1.4, from 150 mixed prompts at fixed seeds."""
    mixed, pure = known(fitted, 150, temper, 1), known(fitted, 150, temper, 2, pure=True)
    both = KnownPrompts(
        type(mixed.prompts).concatenate([mixed.prompts, pure.prompts]), np.concatenate([mixed.weights, pure.weights])
    )
    state = fitted.state
    found = choose_temper(state.quadrature, both, np.random.default_rng(0), judged=150)
    assert temper / 1.4 < found < temper * 1.4


def test_few_known_prompts_leave_the_temper_as_it_is(fitted: "Dispatcher", sample: "Sample") -> None:
    """Of evidence that has drifted, one label among hundreds would choose it by one prompt."""
    other = fitted._of(fitted._served, replace(fitted.state, temper=3.5), None)
    other.svi = replace(other.svi, steps=4)
    labels = np.where(np.arange(len(sample.labels)) < 29, sample.labels.clip(min=0), -1)
    assert other.recalibrate(sample.evidence, labels).state.temper == 3.5
    assert other.recalibrate(sample.evidence, sample.labels, sample.mixtures).state.temper < 3.5


def test_so_many_known_prompts_choose_the_temper(fitted: "Dispatcher") -> None:
    """75 mixed ones, at most: the cost of a fit does not grow with them. Few are filled up by concatenations of pure
    ones; where nothing is known the temper is 1."""
    pure, mixed = known(fitted, 100, 1.0, 0, pure=True), known(fitted, 200, 1.0, 1)
    random = np.random.default_rng(0)
    few = KnownPrompts(
        type(pure.prompts).concatenate([pure.prompts, mixed.prompts.select(torch.arange(10))]),
        np.concatenate([pure.weights, mixed.weights[:10]]),
    )
    for prompts in (mixed, pure, few):
        chosen, weights = prompts.judged(random, 75)
        assert len(chosen) == len(weights) == 75
        np.testing.assert_allclose(weights.sum(1), 1)
    assert (weights.max(1) < 1).sum() >= 10
    nothing = KnownPrompts(pure.prompts, np.full((100, 4), np.nan))
    assert choose_temper(fitted.state.quadrature, nothing, random) == 1.0


def test_concatenations_are_means_by_length_and_sums_of_counts(fitted: "Dispatcher") -> None:
    pure = known(fitted, 40, 1.0, 3, pure=True)
    joined, weights = pure.concatenate(30, np.random.default_rng(0))
    assert (joined.lengths <= pure.prompts.lengths.max()).all()
    np.testing.assert_allclose(weights.sum(1), 1)
    for view in fitted.state.model.views:
        if view.kind == "counts":
            np.testing.assert_allclose(joined.observed[view.name].sum(1), joined.totals[view.name])
        else:
            low, high = (getattr(pure.prompts.observed[view.name], end)(0).values for end in ("min", "max"))
            assert (joined.observed[view.name] >= low - 1e-9).all()
            assert (joined.observed[view.name] <= high + 1e-9).all()
