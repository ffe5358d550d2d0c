"""Training the amortised guide: simulations from the fitted program ("sleep"), with some real prompts of known weights.

First the network learns to invert the program at every noise temper τ (an input of its own); then documents of known
mixture choose τ by how often intervals cover their weights; then training goes on at that τ, real prompts among the
simulated ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from bayes_dispatch.dispatcher.fitting.svi import GlobalsPosterior, finite, isolated
from bayes_dispatch.dispatcher.guide.encoding import Encoder
from bayes_dispatch.dispatcher.guide.guides import GuideSettings, MixtureGuide
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts

__all__ = ["RealPrompts", "Simulations", "choose_temper", "fit_guide", "simulate", "train_guide"]

DROPOUT = 0.06  # of each view in simulations
WARM_UP = 0.4  # of the steps come before τ is chosen
JUDGED = 2_000  # known mixtures, at most, that choose it


def fit_guide(
    model: DispatchModel,
    posterior: GlobalsPosterior,
    like: Prompts,
    real: RealPrompts,
    settings: GuideSettings,
    seed: int,
    progress: bool = False,
) -> tuple[MixtureGuide, float]:
    """Train a guide for the fitted program, and choose the noise temper.

    Args:
        model: the program.
        posterior: its globals.
        like: prompts whose lengths, totals and missing views simulations take.
        real: prompts of known weights, with features as noisy as those of new prompts. Its mixtures choose τ (from 100
            on, 2,000 drawn of more), else concatenations of its pure prompts; without those τ is 1. It may know no
            weights at all.
        settings: network and training.
        seed: of all randomness.
        progress: show bars.

    Returns:
        The guide and τ.
    """
    pure, mixed = real.groups
    warm = int(WARM_UP * settings.steps)
    bars = ("guide, every temper", "guide, chosen temper") if progress else (None, None)
    rate = settings.learning_rate
    with isolated(seed):
        encoder = Encoder(model, posterior.center())
        guide = MixtureGuide(encoder.width, model.n_experts + 1, settings)
        shares = model.label_shares(posterior.center()["pi"])
        span = settings.tempers
        simulations = simulate(model, posterior, like, settings.simulations, settings, span, DROPOUT)
        inputs = simulations.inputs(encoder)
        guide.standardise_by(inputs)

        def present(prompts: Prompts, temper: float) -> Tensor:
            return torch.from_numpy(encoder(prompts, temper, shares)).to(prompts.lengths)

        train_guide(guide, inputs, simulations.weights, None, settings, warm, rate, bars[0])

        def simulate_at(weights: Tensor, temper: float) -> Prompts:
            return simulate(model, posterior, like, len(weights), settings, (temper, temper), 0.0, weights).prompts

        temper, count = settings.tempers[0], min(JUDGED, settings.simulations)
        if settings.tempers[0] < settings.tempers[1]:
            chosen = mixed if len(mixed) <= JUDGED else mixed[torch.randperm(len(mixed))[:JUDGED]]
            few = len(mixed) < 100 and len(pure) > 0
            judged = real.concatenate(300) if few else (real.prompts.select(chosen), real.weights[chosen])
            known = len(judged[1]) > 0
            temper = choose_temper(guide, present, simulate_at, *judged, settings.tempers, count) if known else 1.0
        simulations = simulate(model, posterior, like, settings.simulations, settings, (temper, temper), DROPOUT)

        def pairs(count: int) -> tuple[Tensor, Tensor]:
            prompts, weights = real(count)
            return present(prompts, temper), weights

        source = pairs if len(pure) + len(mixed) else None
        inputs, left = simulations.inputs(encoder), settings.steps - warm
        train_guide(guide, inputs, simulations.weights, source, settings, left, rate / 2, bars[1])
    return guide, temper


@dataclass(frozen=True, eq=False)
class RealPrompts:
    """A source of real ``(prompts, weights)`` pairs: pure ones, known mixtures, and concatenations of pure ones.

    A concatenation of pieces has their byte-weighted mean of pooled features and the sum of their counts. Exact zeros
    count as weights below the guide's resolution.

    Args:
        prompts: the real prompts, every view observed (missing rows masked).
        weights: ``(N, K+1)`` known weights, one-hot for pure prompts, NaN rows where unknown.
    """

    prompts: Prompts
    weights: Tensor

    @cached_property
    def groups(self) -> tuple[Int[Tensor, " pure"], Int[Tensor, " mixed"]]:
        """Rows of pure and of mixed prompts."""
        top = self.weights.nan_to_num().max(-1).values
        return (top == 1).nonzero().squeeze(-1), ((top > 0) & (top < 1)).nonzero().squeeze(-1)

    @cached_property
    def _longest(self) -> float:
        return max(float(self.prompts.lengths.max()), 1.0)

    def __call__(self, count: int) -> tuple[Prompts, Float[Tensor, "prompt weight"]]:
        """Draw ``count`` prompts with torch's generator, equally pure, mixed and concatenated where there are any."""
        pure, mixed = self.groups
        sources = [rows for rows in (pure, mixed) if len(rows)]
        share = count // (len(sources) + bool(len(pure)))
        rows = torch.cat([rows[torch.randint(len(rows), (share,))] for rows in sources])
        taken = self.prompts.select(rows).unlabelled(), self.weights[rows]
        if not len(pure):
            return taken
        joined = self.concatenate(count - len(rows))
        return Prompts.concatenate([taken[0], joined[0]]), torch.cat([taken[1], joined[1]])

    def concatenate(self, count: int) -> tuple[Prompts, Float[Tensor, "prompt weight"]]:
        """``count`` concatenations of two or three pure prompts, where possible no longer than the longest prompt."""
        pure, _ = self.groups
        pieces = pure[torch.randint(len(pure), (8 * count, 3))]  # (8n, 3)
        sizes = self.prompts.lengths[pieces].clamp(min=1.0)
        sizes[torch.rand(len(pieces)) < 0.7, 2] = 0.0
        fits = sizes.sum(-1) <= self._longest
        chosen = torch.argsort(fits.int(), descending=True, stable=True)[:count]
        pieces, sizes = pieces[chosen], sizes[chosen]
        shares = (sizes / sizes.sum(-1, keepdim=True)).unsqueeze(-1)  # (n, 3, 1)
        used = sizes > 0
        prompts = self.prompts
        unknown = ((prompts.lengths[pieces] == 0) & used).any(-1)
        lengths = torch.where(unknown, torch.zeros(()), sizes.sum(-1))
        missing = {name: (mask[pieces] & used).any(-1) for name, mask in prompts.missing.items()}
        observed = {
            name: (values[pieces] * (used.unsqueeze(-1) if name in prompts.totals else shares)).sum(1)
            for name, values in prompts.observed.items()
        }
        totals = {name: (values[pieces] * used).sum(-1) for name, values in prompts.totals.items()}
        return Prompts(lengths, totals, missing, observed), (self.weights[pieces] * shares).sum(1)


@dataclass(frozen=True, eq=False)
class Simulations:
    """Prompts drawn from the program, with the weights and noise tempers they were drawn at.

    Args:
        prompts: every view observed.
        weights: ``(N, K+1)``.
        tempers: ``(N,)``.
        shares: ``(N, K+1)`` label shares of the prior that they were drawn from.
    """

    prompts: Prompts
    weights: Tensor
    tempers: Tensor
    shares: Tensor

    def inputs(self, encoder: Encoder) -> Float[Tensor, "prompt inputs"]:
        """The encoded evidence ``(N, I)``."""
        return torch.from_numpy(encoder(self.prompts, self.tempers, self.shares)).to(self.weights)


def simulate(
    model: DispatchModel,
    posterior: GlobalsPosterior,
    like: Prompts,
    count: int,
    settings: GuideSettings,
    tempers: tuple[float, float],
    dropout: float = 0.0,
    weights: Float[Tensor, "prompt weight"] | None = None,
    shares: Float[Tensor, " weight"] | None = None,
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
        shares: ``(K+1,)`` ``pi`` of that prior. By default half the prompts have the mean of the program's prior,
            and others draws from it or from a flat one, so that a guide learns to serve any.

    Returns:
        The simulated prompts.
    """
    low, high = np.log(settings.kappa)
    pieces = []
    for rows in torch.arange(count).chunk(min(settings.global_draws, count)):
        prompts = _drop(like.select(torch.randint(len(like), (len(rows),))), dropout)
        known = None if weights is None else weights[rows]
        pi = _draw_shares(model, len(rows)) if shares is None else shares.expand(len(rows), -1)
        sites = posterior.draw() | {"kappa": torch.exp(low + (high - low) * torch.rand(len(rows))), "pi": pi}
        tau = torch.exp(torch.empty(len(rows)).uniform_(*np.log(tempers)))
        blank = replace(prompts, known=known)
        with torch.no_grad():
            nodes: Any = poutine.trace(model.sample_prompts).get_trace(sites, blank, tau).nodes
        observed = {view.name: nodes[view.name]["value"] for view in model.views}
        drawn = nodes["w"]["value"] if known is None else known
        pieces.append((replace(prompts, observed=observed), drawn, tau, model.label_shares(pi)))
    parts, weights_of, tempers_of, shares_of = zip(*pieces, strict=True)
    return Simulations(Prompts.concatenate(parts), torch.cat(weights_of), torch.cat(tempers_of), torch.cat(shares_of))


def train_guide(
    guide: MixtureGuide,
    inputs: Float[Tensor, "prompt inputs"],
    targets: Float[Tensor, "prompt weight"],
    real: Callable[[int], tuple[Tensor, Tensor]] | None,
    settings: GuideSettings,
    steps: int,
    learning_rate: float,
    progress: str | None = None,
) -> Float[np.ndarray, " step"]:
    """Train the guide in place: maximise ``log q(w | evidence)`` over simulated and some real prompts.

    Args:
        guide: the network; its standardisation is set.
        inputs: encoded evidence of the simulated prompts.
        targets: ``(N, K+1)`` their weights.
        real: gives encoded evidence and weights of so many real prompts; ``None`` trains on simulations alone.
        settings: batch sizes and shares.
        steps: optimiser steps.
        learning_rate: at the start, cosine to zero.
        progress: title of a bar; none by default.

    Returns:
        The loss of each step, nats per prompt.
    """
    optimiser = torch.optim.Adam(guide.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    n_real = round(settings.real_share * settings.batch_size) if real is not None else 0
    losses: list[float] = []
    for _ in tqdm(range(steps), desc=progress, disable=True if progress is None else None):
        rows = torch.randint(len(targets), (settings.batch_size - n_real,))
        batch, weights = inputs[rows], targets[rows]
        if real is not None and n_real:
            encoded, known = real(n_real)
            batch, weights = torch.cat([batch, encoded]), torch.cat([weights, known])
        loss = -guide(batch, weights).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        losses.append(finite(float(loss.detach()), len(losses), learning_rate))
    return np.array(losses)


def choose_temper(
    guide: MixtureGuide,
    present: Callable[[Prompts, float], Tensor],
    simulate_at: Callable[[Tensor, float], Prompts],
    prompts: Prompts,
    weights: Float[Tensor, "prompt weight"],
    tempers: tuple[float, float],
    count: int = JUDGED,
) -> float:
    """The τ at which intervals cover the true weights of real prompts as often as those of simulated ones.

    Coverage of 50, 70 and 90% intervals, of components with a share above .02, is taken at seven τ; its excess over
    that of simulations at the same weights is next to linear in log τ, and the root of the line is chosen. A log score
    would judge by how much mass lies at weights of next to 0: true mixtures have exact zeros, and the sparsest
    posterior would win.

    Args:
        guide: trained at every τ.
        present: encodes prompts at a τ.
        simulate_at: draws prompts from the program at given weights and τ.
        prompts: prompts of known mixture, with features as noisy as those of new prompts.
        weights: ``(N, K+1)`` their true weights.
        tempers: smallest and largest τ.
        count: simulations at each τ, about.
    """
    answer = guide.compiled()
    repeated = weights.repeat(max(1, count // len(weights)), 1)
    grid = np.linspace(math.log(tempers[0]), math.log(tempers[1]), 7)

    def coverage(some: Prompts, truth: Tensor, temper: float) -> float:
        known = truth.double().numpy()
        below = answer(present(some, temper).double().numpy()).below(known)[known > 0.02]
        return float(np.mean([(np.abs(below - 0.5) <= level / 2).mean() for level in (0.5, 0.7, 0.9)]))

    excess = [
        coverage(prompts, weights, temper) - coverage(simulate_at(repeated, temper), repeated, temper)
        for temper in np.exp(grid).tolist()
    ]
    slope, intercept = np.polyfit(grid, excess, 1)
    if slope <= 0:  # too few documents to tell
        return float(np.exp(grid[np.argmin(np.abs(excess))]))
    return float(np.exp(np.clip(-intercept / slope, grid[0], grid[-1])))


def _draw_shares(model: DispatchModel, count: int) -> Float[Tensor, "prompt weight"]:
    """Shares ``pi`` that a dispatcher may come to serve: half of them those that it begins with, the prior's mean."""
    flat = torch.distributions.Dirichlet(torch.ones(model.n_experts + 1))
    prior: Any = model.shares_prior()
    mean = model.prior_of_shares()
    first = (mean / mean.sum()).expand(count, -1)
    drawn = torch.stack([first, first, prior.sample((count,)), flat.sample((count,))], 1)
    return drawn[torch.arange(count), torch.randint(4, (count,))]


def _drop(prompts: Prompts, chance: float) -> Prompts:
    """Make views and lengths missing at random; nothing is observed yet."""
    missing = {name: mask | (torch.rand(len(prompts)) < chance) for name, mask in prompts.missing.items()}
    lengths = torch.where(torch.rand(len(prompts)) < chance, torch.zeros(()), prompts.lengths)
    return Prompts(lengths, prompts.totals, missing)
