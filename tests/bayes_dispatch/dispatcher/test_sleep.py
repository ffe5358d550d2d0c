"""The temper that known mixtures choose: found where it is known, and from a bounded number of them."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

from bayes_dispatch.dispatcher.fitting import sleep
from bayes_dispatch.dispatcher.fitting.sleep import RealPrompts, fit_guide, simulate
from bayes_dispatch.dispatcher.fitting.svi import isolated
from bayes_dispatch.dispatcher.guide.guides import GuideSettings

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.estimator import Dispatcher

WIDE = (0.4, 5.0)


def mixtures(fitted: "Dispatcher", count: int, temper: float, seed: int) -> RealPrompts:
    """Prompts of known weights, drawn from the program at a noise temper."""
    state = fitted.state
    with isolated(seed):
        globals_ = state.globals.to(torch.float32)
        weights = torch.distributions.Dirichlet(torch.full((4,), 0.5)).sample((count,))
        drawn = simulate(state.model, globals_, state.like, count, state.settings, (temper, temper), 0.0, weights)
    return RealPrompts(drawn.prompts, weights)


def test_so_many_known_mixtures_choose_the_temper(fitted: "Dispatcher", monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them up to a limit, and as many drawn of more: the cost of a fit does not grow with them."""
    judged = []

    def watched(*arguments: Any) -> float:
        judged.append(len(arguments[4]))
        return choose(*arguments)

    choose = sleep.choose_temper
    monkeypatch.setattr(sleep, "choose_temper", watched)
    monkeypatch.setattr(sleep, "JUDGED", 150)
    settings = GuideSettings(hidden=8, simulations=40, global_draws=2, steps=4, batch_size=40)
    state = fitted.state
    for count in (120, 150, 400):
        real = mixtures(fitted, count, 1.0, seed=0)
        fit_guide(state.model, state.globals.to(torch.float32), state.like, real, settings, 0)
    assert judged == [120, 150, 150]


@pytest.mark.slow
@pytest.mark.parametrize("temper", [0.7, 2.5])
def test_the_temper_of_simulated_mixtures_is_found(fitted: "Dispatcher", temper: float) -> None:
    """Within a factor of 1.4, from 1,500 mixtures at fixed seeds."""
    real, state = mixtures(fitted, 1_500, temper, seed=1), fitted.state
    settings = GuideSettings(hidden=64, simulations=20_000, global_draws=8, steps=1_500, tempers=WIDE)
    _, found = fit_guide(state.model, state.globals.to(torch.float32), state.like, real, settings, 0)
    assert temper / 1.4 < found < temper * 1.4
