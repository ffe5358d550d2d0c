"""Training the amortised guide: simulations from the fitted program ("sleep"), with some real prompts of known weights.

First the network learns to invert the program at every noise temper τ (an input of its own); then held-out documents of
known mixture choose τ by the log score of their true weights; then training goes on at that τ, real prompts among the
simulated ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from bayes_dispatch.concatenations import RealPrompts, smooth
from bayes_dispatch.fitting import GlobalsPosterior, isolated
from bayes_dispatch.generative import DispatchModel, Prompts
from bayes_dispatch.guides import GuideSettings, MixtureGuide, encode, encoded_width

__all__ = ["Simulations", "choose_temper", "fit_guide", "simulate", "train_guide"]

DROPOUT = 0.06  # of each view in simulations
WARM_UP = 0.6  # of the steps come before τ is chosen


def fit_guide(
    model: DispatchModel,
    posterior: GlobalsPosterior,
    like: Prompts,
    real: RealPrompts,
    held_out: tuple[Prompts, Float[Tensor, "prompt weight"]],
    settings: GuideSettings,
    seed: int,
    progress: bool = False,
) -> tuple[MixtureGuide, float]:
    """Train a guide for the fitted program, and choose the noise temper.

    Args:
        model: the program.
        posterior: its globals.
        like: prompts whose lengths, totals and missing views simulations take.
        real: prompts of known weights (all of unknown weight: simulations only).
        held_out: documents of known mixture, with their weights, that the program was not fitted on; when there are
            none, concatenations of ``real`` pure prompts choose τ, and without those τ is 1.
        settings: network and training.
        seed: of all randomness.
        progress: show bars.

    Returns:
        The guide and τ.
    """
    pure, mixed = real.groups()
    source = real if len(pure) + len(mixed) else None
    warm = int(WARM_UP * settings.steps)
    bars = ("guide, every temper", "guide, chosen temper") if progress else (None, None)
    rate = settings.learning_rate
    with isolated(seed):
        widths = {view.name: view.width for view in model.views}
        guide = MixtureGuide(encoded_width(widths), model.n_experts + 1, settings)
        span = (min(settings.tempers), max(settings.tempers))
        simulations = simulate(model, posterior, like, settings.simulations, settings, span, DROPOUT)
        guide.standardise_by(simulations.inputs())
        train_guide(guide, simulations, None, 1.0, settings, warm, rate, bars[0])
        if not len(held_out[0]) and len(pure):
            held_out = real.concatenate(300)
        temper = choose_temper(guide, held_out[0], smooth(held_out[1]), settings.tempers) if len(held_out[0]) else 1.0
        simulations = simulate(model, posterior, like, settings.simulations, settings, (temper, temper), DROPOUT)
        train_guide(guide, simulations, source, temper, settings, settings.steps - warm, rate / 2, bars[1])
    return guide, temper


@dataclass(frozen=True, eq=False)
class Simulations:
    """Prompts drawn from the program, with the weights and noise tempers they were drawn at.

    Args:
        prompts: every view observed.
        weights: ``(N, K+1)``.
        tempers: ``(N,)``.
    """

    prompts: Prompts
    weights: Tensor
    tempers: Tensor

    def inputs(self) -> Float[Tensor, "prompt inputs"]:
        """The encoded evidence ``(N, I)``."""
        return encode(self.prompts, self.tempers)


def simulate(
    model: DispatchModel,
    posterior: GlobalsPosterior,
    like: Prompts,
    count: int,
    settings: GuideSettings,
    tempers: tuple[float, float],
    dropout: float = 0.0,
    weights: Float[Tensor, "prompt weight"] | None = None,
) -> Simulations:
    """Draw prompts from the fitted program with torch's generator.

    Args:
        model: the program.
        posterior: its globals.
        like: real prompts whose lengths, totals and missing views the simulated ones take (bootstrap).
        count: prompts to draw, spread evenly over ``settings.global_draws`` draws of the globals.
        settings: range of the prior precision, and number of global draws.
        tempers: range of τ, log-uniform.
        dropout: chance that a prompt lacks a view, or its length, that its real counterpart has.
        weights: ``(count, K+1)`` to draw evidence at; drawn from the prior by default.

    Returns:
        The simulated prompts.
    """
    low, high = np.log(settings.kappa)
    pieces = []
    for rows in torch.arange(count).chunk(min(settings.global_draws, count)):
        prompts = _drop(like.select(torch.randint(len(like), (len(rows),))), dropout)
        known = None if weights is None else weights[rows]
        sites = posterior.draw() | {"kappa": torch.exp(low + (high - low) * torch.rand(len(rows)))}
        tau = torch.exp(torch.empty(len(rows)).uniform_(*np.log(tempers)))
        blank = replace(prompts, known=known)
        with torch.no_grad():
            nodes: Any = poutine.trace(model.sample_prompts).get_trace(sites, blank, tau).nodes
        observed = {view.name: nodes[view.name]["value"] for view in model.views}
        drawn = nodes["w"]["value"] if known is None else known
        pieces.append((replace(prompts, observed=observed), drawn, tau))
    prompts, drawn, taus = zip(*pieces, strict=True)
    return Simulations(_stack(prompts), torch.cat(drawn), torch.cat(taus))


def train_guide(
    guide: MixtureGuide,
    simulations: Simulations,
    real: RealPrompts | None,
    temper: float,
    settings: GuideSettings,
    steps: int,
    learning_rate: float,
    progress: str | None = None,
) -> Float[np.ndarray, " step"]:
    """Train the guide in place: maximise ``log q(w | evidence)`` over simulated and some real prompts.

    Args:
        guide: the network; its standardisation is set.
        simulations: the training prompts.
        real: source of real prompts of known weights; ``None`` trains on simulations alone.
        temper: τ that real prompts are presented with.
        settings: batch sizes and shares.
        steps: optimiser steps.
        learning_rate: at the start, cosine to zero.
        progress: title of a bar; none by default.

    Returns:
        The loss of each step, nats per prompt.
    """
    inputs, targets = simulations.inputs(), simulations.weights
    optimiser = torch.optim.Adam(guide.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    n_real = round(settings.real_share * settings.batch_size) if real is not None else 0
    losses = []
    for _ in tqdm(range(steps), desc=progress, disable=progress is None):
        rows = torch.randint(len(targets), (settings.batch_size - n_real,))
        batch, weights = inputs[rows], targets[rows]
        if real is not None and n_real:
            prompts, known = real(n_real)
            batch = torch.cat([batch, encode(prompts, torch.full((n_real,), temper))])
            weights = torch.cat([weights, known])
        loss = -guide(batch).log_prob(weights.clamp(min=1e-13)).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


def choose_temper(guide: MixtureGuide, prompts: Prompts, weights: Tensor, tempers: tuple[float, ...]) -> float:
    """The τ under which held-out documents of known mixture are likeliest: largest mean ``log q(w | evidence, τ)``."""
    with torch.no_grad():
        scores = [
            float(guide(encode(prompts, torch.full((len(prompts),), tau))).log_prob(weights).mean()) for tau in tempers
        ]
    return tempers[int(np.argmax(scores))]


def _drop(prompts: Prompts, chance: float) -> Prompts:
    """Make views and lengths missing at random; nothing is observed yet."""
    missing = {name: mask | (torch.rand(len(prompts)) < chance) for name, mask in prompts.missing.items()}
    lengths = torch.where(torch.rand(len(prompts)) < chance, torch.zeros(()), prompts.lengths)
    return Prompts(lengths, prompts.totals, missing)


def _stack(parts: Sequence[Prompts]) -> Prompts:
    return Prompts(
        torch.cat([p.lengths for p in parts]),
        torch.cat([p.totals for p in parts]),
        {name: torch.cat([p.missing[name] for p in parts]) for name in parts[0].missing},
        {name: torch.cat([p.observed[name] for p in parts]) for name in parts[0].observed},
    )
