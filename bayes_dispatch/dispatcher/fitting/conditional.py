"""The globals once more, so that known weights are likely given the evidence.

SVI fits how evidence and weights go together. The program is never quite true, and what describes the evidence best
does not tell the weights best. So the fit goes on by the log posterior density of the weights that are known, and a
little of the log likelihood: without any, the globals would no longer describe prompts, which the gate asks of them
(multi-conditional learning; McCallum et al. 2006).

A posterior density divides by that of the evidence, here a mean over draws, half of a wider posterior and half of the
prior, each weighed by its density under the prior over that under what it was drawn from (importance sampling). The
known weights are one of them, and those of the prior are anywhere, so that little is won where there are no draws. What
is won on prompts that were held out of these steps decides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from bayes_dispatch.dispatcher.exact.supports import largest_weights
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher
from bayes_dispatch.dispatcher.fitting.svi import SOME, GlobalsPosterior, SVISettings, constrained, isolated
from bayes_dispatch.dispatcher.fitting.temper import KnownPrompts
from bayes_dispatch.dispatcher.program.observed import AT_ONCE, Prompts

__all__ = ["fit_conditionally"]

NUMBERS = 200_000  # prompts that are learnt from, times components, at most
MOST = 8_000  # prompts that are learnt from
WIDER = 4.0  # noise temper of what is drawn from, over the posterior's
POOL = 64  # draws of either kind for each prompt, of which every step takes some
DRAWS = 31  # that a step takes, beside the known weights
BATCH = 128  # prompts of a step
PASSES = 50  # over all prompts, at most
STEPS = 12_000  # times components, at most
HELD_OUT = 5  # one of so many prompts is held out of the steps, and 200 at most
RATE = 0.03  # of learning, at the start
JOINT = 0.003  # of the log likelihood, to one of the log posterior density
STRAY = 0.3  # prior sd of what a global moves by, on the line


def fit_conditionally(
    fitted: FittedDispatcher, known: KnownPrompts, settings: SVISettings, seed: int, progress: bool = False
) -> GlobalsPosterior:
    """The globals of a fit, moved to where known weights are likelier; or themselves, where a step gives no number or
    held-out prompts do not agree.

    Their scales stay, and so do globals of a component that next to no prompt is known of: other prompts tell of it
    only that they are none of its own.

    Args:
        fitted: by SVI, with its temper.
        known: prompts, with features as noisy as those of new ones, some of known weights.
        settings: how many steps, and in which precision.
        seed: of everything random.
        progress: show a bar.
    """
    # other prompts than chose the temper, which starts from the seed alone
    random, dtype = np.random.default_rng([seed, 1]), settings.dtype
    rows, held = _parted(known, random)
    prompts, weights = known.prompts.select(torch.from_numpy(rows)), np.zeros((len(rows), known.weights.shape[1]))
    supports, shares = largest_weights(known.weights[rows, None])
    np.put_along_axis(weights, supports[:, 0], shares[:, 0], 1)
    places = torch.arange(len(rows), device=prompts.lengths.device)
    judged = prompts.select(places[:held]), weights[:held]
    prompts, weights = prompts.select(places[held:]), weights[held:]
    draws, count = _Draws.of(fitted, prompts, weights, random), len(weights)
    prompts, own = prompts.to(dtype), torch.from_numpy(weights).to(dtype)
    steps = min(settings.conditional_steps, -(-PASSES * count // BATCH), -(-STEPS // own.shape[1]))
    fixed = {name: value.to(dtype) for name, value in fitted.globals.locations.items()}
    with isolated(seed, dtype):
        free = _movable(fitted, own.sum(0) >= SOME)
        moves = {name: torch.zeros_like(fixed[name], requires_grad=True) for name in free}
        optimiser = torch.optim.Adam(moves.values(), RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in tqdm(range(steps), "globals (known weights)", disable=None if progress else True):
            some = random.choice(count, min(BATCH, count), replace=False)
            tried, log_ratios = draws.some(some, own[some], random)
            line = fixed | {name: fixed[name] + move * free[name] for name, move in moves.items()}
            sites = {name: constrained(name)(value) for name, value in line.items()}
            views = fitted.model.log_likelihood(sites, tried, prompts.select(torch.from_numpy(some)), fitted.temper)
            density = torch.stack(list(views.values())).sum(0)  # (1 + DRAWS, batch)
            posterior = density[0] - torch.logsumexp(density + log_ratios, 0)
            strayed = torch.cat([move.flatten() for move in moves.values()]).square().sum() / (2 * STRAY**2 * count)
            loss = strayed - (posterior + JOINT * density[0]).mean()
            if not loss.isfinite():
                return fitted.globals
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    found = {name: value.detach().to(fitted.globals.locations[name].dtype) for name, value in line.items()}
    moved = replace(fitted.globals, locations=found)
    return moved if _score(replace(fitted, globals=moved), *judged) > _score(fitted, *judged) else fitted.globals


def _parted(known: KnownPrompts, random: np.random.Generator) -> tuple[np.ndarray, int]:
    """Rows of known weights, and how many of the first are held out: copies of a prompt are, or are not."""
    parts = [known.parts[n] for n in random.permutation(len(known.parts))]
    ends = np.cumsum([len(part) for part in parts])
    most = min(NUMBERS // known.weights.shape[1], MOST, int(ends[-1]))
    held = max(1, int(np.searchsorted(ends, min(most // HELD_OUT, 200), "right")))
    learnt = max(held + 1, int(np.searchsorted(ends, most, "right")))
    return np.concatenate(parts[:learnt]), int(ends[held - 1])


def _score(fitted: FittedDispatcher, prompts: Prompts, weights: np.ndarray) -> float:
    """Mean log posterior density of known weights, but for what their prior says."""
    own = fitted.quadrature.log_density(prompts, *largest_weights(weights[:, None]))[:, 0]
    return float(np.mean(own - fitted.answer(prompts, fitted.shares).log_evidence))


class _Draws(NamedTuple):
    """Weights of each of N prompts: ``(N, P, M)`` which components and their shares, and ``(N, P)`` log ratios
    of prior to proposal; and ``(N,)`` these of the known weights."""

    supports: np.ndarray
    shares: np.ndarray
    log_ratios: np.ndarray
    of_known: np.ndarray

    @classmethod
    def of(cls, fitted: FittedDispatcher, prompts: Prompts, weights: np.ndarray, random: np.random.Generator) -> _Draws:
        """From the posteriors under wider noise, and from the prior."""
        wide, prior = fitted.quadrature.at(WIDER * fitted.temper), fitted.quadrature.prior(fitted.shares)
        parts = []
        for some, own in zip(prompts.pieces(), np.split(weights, range(AT_ONCE, len(weights), AT_ONCE)), strict=True):
            cells = wide(some, fitted.shares)
            drawn, _ = cells.draw(POOL, [random] * len(some))
            anywhere = prior.draw(POOL * len(some), random).reshape(len(some), POOL, -1)
            tried = np.concatenate([own[:, None], drawn.swapaxes(0, 1), anywhere], 1)  # (n, 1 + 2 P, K+1)
            supports, shares = largest_weights(tried)
            # of the wider posterior's density to the prior's, and so of the mean of both to the prior's
            log_ratios = wide.log_density(some, supports, shares) - cells.log_evidence[:, None]
            log_ratios = np.log(2) - np.logaddexp(log_ratios, 0)
            kept = supports[:, 1:].astype(np.int16), shares[:, 1:].astype(np.float32)
            parts.append((*kept, log_ratios[:, 1:], log_ratios[:, 0]))
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def some(
        self, rows: np.ndarray, own: Float[Tensor, "prompt weight"], random: np.random.Generator
    ) -> tuple[Float[Tensor, "draw prompt weight"], Float[Tensor, "draw prompt"]]:
        """``(1 + DRAWS, n, K+1)`` weights of some prompts, the known ones first, and their log ratios."""
        chosen = rows[:, None], random.integers(2 * POOL, size=(len(rows), DRAWS))
        supports, shares = torch.from_numpy(self.supports[chosen]).long(), torch.from_numpy(self.shares[chosen]).to(own)
        weights = torch.zeros(*supports.shape[:2], own.shape[1]).scatter_add_(2, supports, shares)
        log_ratios = np.concatenate([self.of_known[rows, None], self.log_ratios[chosen]], 1)
        return torch.cat([own[:, None], weights], 1).swapaxes(0, 1), torch.from_numpy(log_ratios.T).to(own)


def _movable(fitted: FittedDispatcher, seen: Tensor) -> dict[str, Tensor]:
    """Site → 1 where its values may move, else 0: those of components that are ``seen (K+1,)``, and shared ones."""
    free: dict[str, Tensor] = {}
    for view in fitted.model.views:
        free |= {view.site(name): seen[:-1, None] for name in view.experts()}
        free |= {view.site(name): seen[-1] | (not name.startswith("base_")) for name in view.shared()}
    return free
