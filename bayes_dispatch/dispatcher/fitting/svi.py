"""Fitting the globals of the generative program by SVI, each prompt's weights beside them.

Nothing here touches Pyro's parameter store or the global random state: parameters live in modules, and
:func:`isolated` forks torch's generator from a seed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from tqdm.auto import tqdm

from bayes_dispatch.arguments import real, set_whole
from bayes_dispatch.arguments import seed as a_seed
from bayes_dispatch.dispatcher.fitting.local_guides import AmortisedDirichlet, LocalDirichlet
from bayes_dispatch.dispatcher.program.generative import MOSTLY, DispatchModel, label_informed_start
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.errors import ConfigError

__all__ = [
    "ALONE",
    "SOME",
    "FitReport",
    "GlobalsPosterior",
    "SVISettings",
    "constrained",
    "finite_loss",
    "fit_globals",
    "isolated",
]

WINDOW = 0.1  # of the steps; the last two windows tell whether the loss still falls
TOLERANCE = 0.02  # nats a prompt between them
DRIFT = 0.02  # sd of what a global may have moved by since an earlier fit, on the line
DRIFT_KNOWN = 0.5  # the same of an expert's own, where SOME prompts are known to be of it
SOME = 5  # fewer prompts may be odd ones
ALONE = threading.RLock()
UNCHECKED = dict.fromkeys(
    ("validate_distributions_pyro", "validate_distributions_torch", "validate_infer", "validate_poutine"), False
)


@dataclass(frozen=True)
class SVISettings:
    """Stochastic variational inference of the globals.

    Args:
        steps: optimiser steps of a round.
        learning_rate: at the start; a tenth of it at the end.
        batch_size: prompts in each step; all prompts when there are no more.
        rounds: at most so many rounds, each at half the learning rate of the one before, until the loss has converged.
        restarts: starts to fit from; the fit of the lowest final loss is kept. A fit that goes on from another has one.
        precision: of the whole fit, ``"float32"`` or ``"float64"``.
        conditional_steps: further steps at most, which make known weights likelier given the evidence; 0 for none.
    """

    steps: int = 200
    learning_rate: float = 0.1
    batch_size: int = 4096
    rounds: int = 2
    restarts: int = 1
    precision: Literal["float32", "float64"] = "float32"
    conditional_steps: int = 600

    def __post_init__(self) -> None:
        set_whole(self, steps=1, batch_size=1, rounds=1, restarts=1, conditional_steps=0)
        object.__setattr__(self, "learning_rate", real("learning_rate", self.learning_rate, 0, above=True))
        if self.precision not in ("float32", "float64"):
            raise ConfigError(f'expected precision "float32" or "float64", got {self.precision!r}')

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of ``precision``."""
        return torch.float64 if self.precision == "float64" else torch.float32


@dataclass(frozen=True, eq=False)
class GlobalsPosterior:
    """Fitted globals: a normal in unconstrained coordinates.

    Args:
        locations: site → mean.
        scales: site → sd, of the same shape.
    """

    locations: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    def to(self, dtype: torch.dtype) -> GlobalsPosterior:
        """The same in another floating-point type."""
        parts = ({name: value.to(dtype) for name, value in each.items()} for each in (self.locations, self.scales))
        return GlobalsPosterior(*parts)

    def draw(self, generator: torch.Generator | None = None, shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Draws ``(*shape, ·)`` of every site, constrained; by name, as a file knows no other order."""
        drawn = {}
        for name, loc in sorted(self.locations.items()):
            noise = torch.randn((*shape, *loc.shape), dtype=loc.dtype, device=loc.device, generator=generator)
            drawn[name] = constrained(name)(loc + self.scales[name] * noise)
        return drawn

    def center(self) -> dict[str, Tensor]:
        """Every site at its variational median."""
        return {name: constrained(name)(loc) for name, loc in self.locations.items()}


@dataclass(frozen=True, eq=False)
class FitReport:
    """How the fit of the globals went.

    Args:
        losses: ``(steps,)`` negative ELBO per prompt of each step, nats, of the fit that was kept.
        converged: whether the loss had stopped falling: by less than .02 nats a prompt, or twice the standard error,
            between the last two tenths of the last round.
        change: nats a prompt that it fell between them.
        final: final loss of every restart, nats a prompt.
        conditional: whether known weights moved the globals afterwards, as held-out prompts confirmed.
    """

    losses: np.ndarray
    converged: bool
    change: float
    final: tuple[float, ...]
    conditional: bool = False


SUPPORTS = {"pi": constraints.simplex, "Phi": constraints.simplex, "M": constraints.real, "a": constraints.real}


def constrained(name: str) -> Transform:
    """From the line to where a site's values lie."""
    return biject_to(SUPPORTS.get(name.rpartition("_")[2], constraints.positive))


@contextmanager
def isolated(seed: int, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Run alone, with torch's generator at ``seed``, a default dtype, gradients, and module-local Pyro parameters; on
    the CPU, whatever the default device.

    Global state is left as it was. But while it runs, default dtype and generator are those of the whole process: other
    threads that name no dtype or generator of their own get these, and move the seeded numbers by what they draw.

    All work with Pyro goes through here, one thread at a time: Pyro keeps one stack of handlers for the process. What
    Pyro validates is off: evidence is checked where it enters, and float32 shares of many classes sum to 1 ± 1e-5.
    """
    with (
        ALONE,
        torch.random.fork_rng(devices=[]),
        # where it is so anyway the context would only cost: a third of a fit, as it looks at every call of torch
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        pyro.settings.context(module_local_params=True, **UNCHECKED),
    ):
        before = torch.get_default_dtype()
        torch.default_generator.manual_seed(a_seed(seed))  # torch's own function seeds every accelerator, too
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def finite_loss(loss: float, step: int, rate: float) -> float:
    """The loss of a step.

    Raises:
        ConfigError: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise ConfigError(f"expected a learning rate at which the loss is finite, got {rate}: {loss} at step {step}")
    return loss


def fit_globals(
    model: DispatchModel,
    prompts: Prompts,
    settings: SVISettings,
    seed: int,
    progress: bool = False,
    before: GlobalsPosterior | None = None,
) -> tuple[GlobalsPosterior, FitReport]:
    """Fit the program's globals to prompts by SVI, from a label-informed start or from an earlier fit.

    What an earlier fit knows of them takes the place of the program's prior, wider, since they may have moved: an
    expert's own by any distance where some prompts are known to be of it (:data:`DRIFT_KNOWN`), all others by little
    (:data:`DRIFT`). So globals of which these prompts say nothing stay what they were.

    Args:
        model: the program.
        prompts: observed evidence of the settings' precision, with labels and known weights where there are any.
        settings: optimiser settings.
        seed: of the start and of every draw.
        progress: show a bar.
        before: of an earlier fit, which this one starts at, once.

    Returns:
        The globals' posterior, and how the fit went.
    """
    if before is not None:
        model = _Drifting(**vars(model), before=_widened(before, model, prompts))
    if len(prompts) > settings.batch_size:
        model = replace(model, batch_size=settings.batch_size)
    fits = []
    for restart in range(settings.restarts if before is None else 1):
        with isolated(seed + 7919 * restart, settings.dtype):
            values = label_informed_start(model, prompts) if before is None else before.locations
            if restart:
                values = {name: _jitter(name, value) for name, value in values.items()}
            fits.append(_fit(model, prompts, values, settings, progress))
    final = tuple(report.final[0] for _, report in fits)
    posterior, report = fits[int(np.argmin(final))]
    return posterior, replace(report, final=final)


def _fit(
    model: DispatchModel, prompts: Prompts, start: Mapping[str, Tensor], settings: SVISettings, progress: bool
) -> tuple[GlobalsPosterior, FitReport]:
    guide = _Guide(model, prompts, start)
    decay = 0.1 ** (1 / settings.steps)
    losses: list[float] = []
    change, converged = 0.0, False
    for turn in range(settings.rounds):
        rate = settings.learning_rate / 2**turn
        svi = SVI(model, guide, ClippedAdam({"lr": rate, "lrd": decay, "clip_norm": 10.0}), Trace_ELBO())
        bar = tqdm(range(settings.steps), desc="globals (SVI)", disable=None if progress else True)
        for step in bar:
            losses.append(finite_loss(svi.step(prompts) / len(prompts), len(losses), rate))
            if step % 50 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.2f}")
        change, converged = _converged(np.array(losses[-settings.steps :]))
        if converged:
            break
    normal = guide.globals
    found = ({name: getattr(each, name).detach().clone() for name in start} for each in (normal.locs, normal.scales))
    window = max(2, int(WINDOW * settings.steps))
    report = FitReport(np.array(losses), converged, change, (float(np.mean(losses[-window:])),))
    return GlobalsPosterior(*found), report


def _converged(losses: np.ndarray) -> tuple[float, bool]:
    """Fall of the loss between the last two windows, and whether it is none to speak of."""
    window = max(2, int(WINDOW * len(losses)))
    if len(losses) < 2 * window:
        return float("nan"), False
    before, after = losses[-2 * window : -window], losses[-window:]
    change = float(before.mean() - after.mean())
    error = float(np.sqrt((before.var(ddof=1) + after.var(ddof=1)) / window))
    return change, bool(change < max(TOLERANCE, 2 * error))


def _jitter(name: str, value: Tensor) -> Tensor:
    """Another start near one: noise in unconstrained coordinates."""
    free = constrained(name).inv(value)
    return constrained(name)(free + 0.2 * torch.randn_like(free))


@dataclass(frozen=True)
class _Drifting(DispatchModel):
    """The program with what an earlier fit found in the place of its priors of the globals, whose sites are on the
    line."""

    before: GlobalsPosterior = field(kw_only=True)

    def sample_globals(self) -> dict[str, Tensor]:
        found = {}
        for name, loc in sorted(self.before.locations.items()):
            normal = dist.Normal(loc, self.before.scales[name]).to_event(loc.dim())
            found[name] = constrained(name)(pyro.sample(name, normal))
        return found


def _widened(before: GlobalsPosterior, model: DispatchModel, prompts: Prompts) -> GlobalsPosterior:
    """What is known of the globals, since they may have moved: far, those of experts that some prompts are known of.

    Prompts of unknown weights do not tell an expert that has moved from another one: where those of an expert are gone,
    a wide prior would let it, or its neighbours, take what is left.
    """
    count = torch.zeros(model.n_experts, device="cpu")
    if prompts.labels is not None:
        count += torch.bincount(prompts.labels[prompts.labels >= 0].cpu(), minlength=model.n_experts)
    if prompts.known is not None:
        count += (prompts.known[:, :-1] > MOSTLY).sum(0).cpu()
    known = count >= SOME
    drift = torch.where(known, DRIFT_KNOWN, DRIFT).unsqueeze(-1)  # (K, 1)
    own = {view.site(name) for view in model.views for name in view.experts()}
    moved = {name: drift.to(scale) if name in own else DRIFT for name, scale in before.scales.items()}
    return replace(
        before, scales={name: (scale.square() + moved[name] ** 2).sqrt() for name, scale in before.scales.items()}
    )


class _Guide(PyroModule):
    """Normals for the globals beside a Dirichlet for each prompt; a network gives these where prompts are many."""

    def __init__(self, model: DispatchModel, prompts: Prompts, start: Mapping[str, Tensor]) -> None:
        super().__init__()
        values = {name: value.clone() for name, value in start.items()}  # they are trained in place
        self.globals = AutoNormal(model.sample_globals, init_loc_fn=init_to_value(values=values), init_scale=0.05)
        self.local: PyroModule
        if model.batch_size is None:
            self.local = LocalDirichlet(prompts, model.n_experts + 1)
        else:
            self.local = AmortisedDirichlet(model.views, prompts, model.n_experts + 1, model.batch_size)

    def forward(self, prompts: Prompts) -> None:
        self.globals()
        self.local(prompts)
