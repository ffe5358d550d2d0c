"""The usual amortised guide, trained by the ELBO: a baseline beside the guide of ``fitting.sleep``.

It answers for the same fitted program with the same network, but one Dirichlet for each prompt, so that draws are
reparameterised, and learns from real prompts' evidence: it maximises ``E_q[log p(evidence, w | globals)] + H(q)``
(Kingma and Welling 2014; Srivastava and Sutton 2017 for admixtures). Reverse KL prefers to miss mass over putting it
where there is none, which is what the comparison shows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher
from bayes_dispatch.dispatcher.fitting.svi import isolated
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import prompt_generators
from bayes_dispatch.dispatcher.guide.guides import MixtureGuide
from bayes_dispatch.dispatcher.guide.importance import Weighted
from bayes_dispatch.dispatcher.posterior import DispatchPosterior

__all__ = ["ELBOGuide", "ELBOSettings", "fit_elbo_guide"]

PRECISIONS = 8  # of the prior, whose precision is summed out
SMALLEST = -600.0  # log weight; float64 still holds its exponential
WARM_UP = 0.1  # of the steps, at rates that rise from zero


@dataclass(frozen=True)
class ELBOSettings:
    """Optimiser steps, prompts in each, largest learning rate (cosine to zero), and draws of each prompt's weights."""

    steps: int = 3_000
    batch_size: int = 256
    learning_rate: float = 2e-3
    draws: int = 2


@dataclass(frozen=True, eq=False)
class ELBOGuide:
    """A dispatcher's answers as the ELBO-trained guide gives them.

    Args:
        names: of the K+1 components, base last.
        state: the dispatcher's fitted parts, with this guide in place of its own.
        shares: ``(K+1,)`` ``pi`` of the prior.
        losses: ``(steps,)`` negative ELBO, nats per prompt.
    """

    names: tuple[str, ...]
    state: FittedDispatcher
    shares: np.ndarray
    losses: np.ndarray

    def posterior(self, X: Evidence, draws: int, seed: int) -> DispatchPosterior:
        """Draws ``(draw, prompt, K+1)``."""
        return DispatchPosterior(self._answer(X).draw(draws, prompt_generators(seed, len(X))), self.names)

    def predict_proba(self, X: Evidence) -> np.ndarray:
        """``(N, K+1)`` probability that each component has the largest weight."""
        return self._answer(X).probability_best()

    def weigh(self, X: Evidence, proposals: int, seed: int) -> Weighted:
        """Weighted proposals: their k-hat tells how far the guide is from the posterior."""
        prompts = self.state.prompts(X)
        return self.state.sampler(self._answer(X), prompts, self.shares, proposals, prompt_generators(seed, len(X)))

    def _answer(self, X: Evidence):
        return self.state.answer(self.state.prompts(X), self.shares)


def fit_elbo_guide(dispatcher: Dispatcher, evidence: Evidence, settings: ELBOSettings, seed: int) -> ELBOGuide:
    """Train a guide for a fitted dispatcher's program; its globals, temper, prior and sizes of network stay."""
    state = dispatcher.state
    model, prompts, shares = state.model, state.prompts(evidence), dispatcher.prior.mean
    single = replace(state.settings, components=1)
    inputs = torch.from_numpy(state.encoder(prompts, state.temper, model.label_shares(shares)))
    with isolated(seed, torch.float64):
        guide = MixtureGuide(state.encoder.width, model.n_experts + 1, single)
        guide.standardise_by(inputs)
        sites = [{name: value.double() for name, value in each.items()} for each in state.draws]
        prior = _serving_prior(state, shares)
        optimiser = torch.optim.Adam(guide.parameters(), lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, settings.steps))
        losses = []
        for _ in range(settings.steps):
            rows = torch.randint(len(inputs), (min(settings.batch_size, len(inputs)),))
            concentration = guide.parameters_of(inputs[rows])[1].squeeze(1)  # (B, K+1)
            weights = _log_draws(concentration, settings.draws).exp()  # (S, B, K+1)
            drawn = sites[int(torch.randint(len(sites), ()))]
            parts = model.log_likelihood(drawn, weights, prompts.select(rows), state.temper)
            density = torch.stack(list(parts.values())).sum(0) + prior(weights)
            loss = -(density.mean(0) + torch.distributions.Dirichlet(concentration).entropy()).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(guide.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
    fitted = replace(state, guide=guide.float(), settings=single)
    return ELBOGuide((*dispatcher.experts, "base"), fitted, shares, np.array(losses))


def _serving_prior(state: FittedDispatcher, shares: np.ndarray) -> Callable[[Tensor], Tensor]:
    """The log density ``(S, B)`` of weights that serving assumes: precisions log-uniform, summed out on a grid."""
    low, high = math.log(state.settings.kappa[0]), math.log(state.settings.kappa[1])
    kappas = torch.exp(low + (high - low) * (torch.arange(PRECISIONS) + 0.5) / PRECISIONS)
    each = state.model.weights_prior({"kappa": kappas, "pi": torch.from_numpy(shares.copy())})
    return lambda weights: each.log_prob(weights.unsqueeze(-2)).logsumexp(-1) - math.log(PRECISIONS)


def _log_draws(concentration: Float[Tensor, "prompt weight"], draws: int) -> Float[Tensor, "draw prompt weight"]:
    """Logs of reparameterised draws, which never underflow: a gamma variate of shape a is one of shape a + 1 times
    ``u ** (1 / a)`` (Marsaglia and Tsang 2000)."""
    alpha = concentration.expand(draws, *concentration.shape)
    boosted = torch.distributions.Gamma(alpha + 1, torch.ones(())).rsample().log()
    uniform = torch.rand(alpha.shape).clamp(min=torch.finfo(alpha.dtype).tiny)
    return (boosted + uniform.log() / alpha).log_softmax(-1).clamp(min=SMALLEST)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up, then a cosine to zero."""
    warm = max(1, int(WARM_UP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
