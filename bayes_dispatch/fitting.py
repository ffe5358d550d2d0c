"""Fitting the globals of the generative program by SVI, each prompt's weights beside them.

Nothing here touches Pyro's parameter store or the global random state: parameters live in modules, and
:func:`isolated` forks torch's generator from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.distributions import biject_to, constraints
from tqdm.auto import tqdm

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.generative import DispatchModel, Prompts, label_informed_start
from bayes_dispatch.guides import LocalDirichlet

__all__ = [
    "GlobalsPosterior",
    "SVISettings",
    "fit_globals",
    "isolated",
]


@dataclass(frozen=True)
class SVISettings:
    """Stochastic variational inference of the globals.

    Args:
        steps: optimiser steps.
        learning_rate: at the start; a tenth of it at the end.
        batch_size: prompts in each step; all prompts when there are no more.
    """

    steps: int = 600
    learning_rate: float = 0.02
    batch_size: int = 1024

    def __post_init__(self) -> None:
        if self.steps < 1 or self.learning_rate <= 0 or self.batch_size < 1:
            raise ConfigError(f"expected positive steps, learning rate and batch size, got {self}")


@dataclass(frozen=True, eq=False)
class GlobalsPosterior:
    """Fitted globals: by site mean and sd of a diagonal normal in unconstrained coordinates.

    Args:
        locations: site → mean.
        scales: site → sd, of the same shape.
    """

    locations: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    def draw(self) -> dict[str, Tensor]:
        """One draw of every site, constrained, from torch's generator; by name, as a file knows no other order."""
        return {
            name: _constrain(name, loc + self.scales[name] * torch.randn_like(loc))
            for name, loc in sorted(self.locations.items())
        }

    def center(self) -> dict[str, Tensor]:
        """Every site at its variational median."""
        return {name: _constrain(name, loc) for name, loc in self.locations.items()}


SUPPORTS = {"pi": constraints.simplex, "Phi": constraints.simplex, "M": constraints.real}  # the others are positive


def _constrain(name: str, value: Tensor) -> Tensor:
    return biject_to(SUPPORTS.get(name, constraints.positive))(value)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run with torch's generator at ``seed`` and module-local Pyro parameters; leave global state as it was."""
    with torch.random.fork_rng(devices=[]), pyro.settings.context(module_local_params=True):
        torch.manual_seed(seed)
        yield


def fit_globals(
    model: DispatchModel, prompts: Prompts, settings: SVISettings, seed: int, progress: bool = False
) -> tuple[GlobalsPosterior, Float[np.ndarray, " step"]]:
    """Fit the program's globals to prompts by SVI, from a label-informed start.

    Args:
        model: the program.
        prompts: observed evidence, with labels and known weights where there are any.
        settings: optimiser settings.
        seed: of the start and of every draw.
        progress: show a bar.

    Returns:
        The globals' posterior, and the loss (negative ELBO) per prompt of each step.
    """
    start = label_informed_start(model, prompts)
    if len(prompts) > settings.batch_size:
        model = replace(model, batch_size=settings.batch_size)
    with isolated(seed):
        guide = _Guide(model, prompts, start)
        decay = 0.1 ** (1 / settings.steps)
        optimiser = ClippedAdam({"lr": settings.learning_rate, "lrd": decay, "clip_norm": 10.0})
        svi = SVI(model, guide, optimiser, Trace_ELBO())
        losses = []
        bar = tqdm(range(settings.steps), desc="globals (SVI)", disable=not progress)
        for step in bar:
            losses.append(svi.step(prompts) / len(prompts))
            if step % 50 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.2f}")
        normal = guide.globals
        locations = {name: getattr(normal.locs, name).detach().clone() for name in start}
        scales = {name: getattr(normal.scales, name).detach().clone() for name in start}
    return GlobalsPosterior(locations, scales), np.array(losses)


class _Guide(PyroModule):
    """Normals for the globals beside a Dirichlet for each prompt."""

    def __init__(self, model: DispatchModel, prompts: Prompts, start: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.globals = AutoNormal(model.sample_globals, init_loc_fn=init_to_value(values=dict(start)), init_scale=0.05)
        self.local = LocalDirichlet(prompts, model.n_experts + 1, model.batch_size)

    def forward(self, prompts: Prompts) -> None:
        self.globals()
        self.local(prompts)
