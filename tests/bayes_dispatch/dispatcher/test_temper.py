"""The temper that prompts of known weights choose: found where it is known, from a bounded number of them."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting import temper as module
from bayes_dispatch.dispatcher.fitting.simulation import simulate
from bayes_dispatch.dispatcher.fitting.svi import isolated
from bayes_dispatch.dispatcher.fitting.temper import KnownPrompts, choose_temper
from bayes_dispatch.errors import ConfigError

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
    """Within a factor of 1.4, from 150 pure and 150 mixed prompts at fixed seeds."""
    mixed, pure = known(fitted, 150, temper, 1), known(fitted, 150, temper, 2, pure=True)
    both = KnownPrompts(
        type(mixed.prompts).concatenate([mixed.prompts, pure.prompts]), np.concatenate([mixed.weights, pure.weights])
    )
    state = fitted.state
    found = choose_temper(state.quadrature, both, state.shares, np.random.default_rng(0), judged=150)
    assert temper / 1.4 < found < temper * 1.4


def test_new_prompts_choose_another_temper(fitted: "Dispatcher") -> None:
    """Wider noise is found on prompts that have it; fingerprint and calibration are new, the serving prior stays."""
    state, random = fitted.state, np.random.default_rng(5)
    drawn = np.concatenate([np.eye(4)[random.integers(3, size=150)], random.dirichlet(np.full(4, 0.5), 150)])
    with isolated(5):
        weights, globals_ = torch.tensor(drawn, dtype=torch.float32), state.globals.to(torch.float32)
        prompts = simulate(state.model, globals_, state.like, weights, 3.0)
    raw = {name: values.double().numpy() for name, values in prompts.observed.items()}
    for name, each in state.feature_maps.items():  # what would be mapped to these
        raw[name] = raw[name] @ np.linalg.pinv(each.projection) + each.center
    lengths, missing = prompts.lengths.numpy(), {name: mask.numpy() for name, mask in prompts.missing.items()}
    evidence = Evidence(raw, np.maximum(lengths, 1), missing | {"lengths": lengths == 0})
    new = fitted.retempered(evidence, mixtures=drawn)
    assert 2.0 < new.state.temper <= 4.0
    assert new.fingerprint != fitted.fingerprint
    assert new.prior is fitted.prior
    low, high = (np.diff(each.posterior(evidence, 200).interval(0.9), axis=0).mean() for each in (fitted, new))
    assert low < high


def test_so_many_known_prompts_choose_the_temper(fitted: "Dispatcher", fresh: "Sample") -> None:
    """75 pure and 75 mixed ones, at most: the cost of a fit does not grow with them. Few mixed ones are filled up by
    concatenations of pure ones; where nothing is known the temper is 1."""
    pure, mixed = known(fitted, 100, 1.0, 0, pure=True), known(fitted, 200, 1.0, 1)
    random = np.random.default_rng(0)
    rows = np.r_[:10]
    few = KnownPrompts(
        type(pure.prompts).concatenate([pure.prompts, mixed.prompts.select(torch.from_numpy(rows))]),
        np.concatenate([pure.weights, mixed.weights[rows]]),
    )
    for prompts, counts in ((mixed, (0, 75)), (pure, (75, 75)), (few, (75, 75))):
        chosen, weights = prompts.judged(random, 75)
        assert len(chosen) == len(weights) == sum(counts)
        assert int((weights.max(1) == 1).sum()) >= counts[0]
        np.testing.assert_allclose(weights.sum(1), 1)
    nothing = KnownPrompts(pure.prompts, np.full((100, 4), np.nan))
    assert choose_temper(fitted.state.quadrature, nothing, fitted.state.shares, random) == 1.0
    with pytest.raises(ConfigError, match="expected prompts of known weights, got none"):
        fitted.retempered(fresh.evidence)


def test_a_mixture_of_next_to_nothing_is_judged_by_its_largest(fitted: "Dispatcher") -> None:
    """Were every share small, each would be taken for none, and no temper could be told."""
    prompts = known(fitted, 60, 3.0, 4)
    spread = prompts.weights.copy()
    spread[0] = 0.25
    state = fitted.state
    tempers = []
    for small in (0.02, 0.3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SMALL", small)
            chosen = KnownPrompts(prompts.prompts, spread)
            tempers.append(choose_temper(state.quadrature, chosen, state.shares, np.random.default_rng(0)))
    assert min(tempers) > 1.2


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
