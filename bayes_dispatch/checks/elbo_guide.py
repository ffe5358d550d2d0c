"""The usual amortised guide, trained by the ELBO: a baseline beside the guide of ``fitting.sleep``.

It answers for the same fitted program with the same network, but one Dirichlet for each prompt, so that draws are
reparameterised, and learns from real prompts' evidence: it maximises ``E_q[log p(evidence, w | globals)] + H(q)``
(Kingma and Welling 2014; Srivastava and Sutton 2017 for admixtures). Reverse KL prefers to miss mass over putting it
where there is none, which is what the comparison shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher
from bayes_dispatch.dispatcher.fitting.svi import isolated
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import DirichletMixtures
from bayes_dispatch.dispatcher.guide.guides import MixtureGuide
from bayes_dispatch.dispatcher.guide.importance import Weighted
from bayes_dispatch.dispatcher.keys import prompt_keys
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError

__all__ = ["ELBOGuide", "ELBOSettings", "fit_elbo_guide"]

PRECISIONS = 8  # of the prior, whose precision is summed out
SMALLEST = -600.0  # log weight; float64 still holds its exponential
WARM_UP = 0.1  # of the steps, at rates that rise from zero


@dataclass(frozen=True)
class ELBOSettings:
    """How the guide is trained.

    Args:
        steps: optimiser steps.
        batch_size: prompts in each step; all prompts when there are no more.
        learning_rate: the largest, cosine to zero.
        draws: of each prompt's weights in each step.

    Raises:
        ConfigError: a number that is not positive.
    """

    steps: int = 3_000
    batch_size: int = 256
    learning_rate: float = 2e-3
    draws: int = 2

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.draws) < 1 or self.learning_rate <= 0:
            raise ConfigError(f"expected positive steps, batch size, learning rate and draws, got {self}")


@dataclass(frozen=True, eq=False)
class ELBOGuide:
    """A dispatcher's answers as the ELBO-trained guide gives them.

    Args:
        experts: K names, without base.
        state: the dispatcher's fitted parts, with this guide in place of its own.
        shares: ``(K+1,)`` ``pi`` of the prior.
        losses: ``(steps,)`` negative ELBO, nats per prompt.
    """

    experts: tuple[str, ...]
    state: FittedDispatcher
    shares: np.ndarray
    losses: np.ndarray

    def posterior(self, X: Evidence, draws: int = 64, seed: int | Sequence[int] = 0) -> DispatchPosterior:
        """Draws ``(draw, prompt, K+1)`` of N prompts; ``seed`` is one, or one for each prompt.

        Raises:
            ConfigError: fewer than one draw, or another number of seeds than prompts.
            EvidenceError, TensorError: as :meth:`Dispatcher.posterior`.
        """
        if draws < 1:
            raise ConfigError(f"expected at least 1 draw, got {draws}")
        return DispatchPosterior(self.mixtures_of(X).draw(draws, prompt_keys(seed, len(X))), (*self.experts, "base"))

    def predict_proba(self, X: Evidence) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` probability that each expert (base last) has the largest weight; deterministic."""
        return self.mixtures_of(X).probability_best()

    def mixtures_of(self, evidence: Evidence) -> DirichletMixtures:
        """The guide's answer itself, one Dirichlet for each prompt."""
        answer = self.state.answer(self.state.prompts(evidence), self.shares)
        assert isinstance(answer, DirichletMixtures)  # a state with a guide has no other
        return answer

    def weigh(self, X: Evidence, proposals: int, seed: int = 0) -> Weighted:
        """Weighted proposals, as :meth:`Dispatcher.weigh`: their k-hat tells how far the guide is from the posterior.

        Raises:
            ConfigError: fewer than 25 proposals.
        """
        if proposals < 25:
            raise ConfigError(f"expected at least 25 proposals, got {proposals}")
        prompts = self.state.prompts(X)
        return self.state.sampler(self.mixtures_of(X), prompts, self.shares, proposals, prompt_keys(seed, len(X)))


def fit_elbo_guide(
    dispatcher: Dispatcher,
    evidence: Evidence,
    settings: ELBOSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ELBOGuide:
    """Train a guide for a fitted dispatcher's program by the ELBO of real prompts.

    Args:
        dispatcher: a fitted admixture; its globals, temper, prior and sizes of the network are taken.
        evidence: of N ≥ 2 prompts, labels are not needed.
        settings: of the training.
        seed: of all randomness.
        progress: show a bar.

    Returns:
        The guide, behind the interface of the dispatcher.

    Raises:
        NotFittedError: a dispatcher before ``fit``.
        ConfigError: a one-label program, whose posterior is exact, or fewer than two prompts.
        EvidenceError, TensorError: evidence that the dispatcher cannot read.
    """
    settings = settings or ELBOSettings()
    state = dispatcher.state
    if state.guide is None or len(evidence) < 2:
        got = f"{len(evidence)} for {type(dispatcher.program).__name__}"
        raise ConfigError(f"expected at least two prompts and an admixture, got {got}")
    model, prompts = state.model, state.prompts(evidence)
    shares = dispatcher.prior.mean
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
        for _ in tqdm(range(settings.steps), desc="guide (ELBO)", disable=not progress):
            rows = torch.randint(len(inputs), (min(settings.batch_size, len(inputs)),))
            _, concentration = guide.parameters_of(inputs[rows])
            concentration = concentration.squeeze(1)  # (B, K+1)
            logs = _log_draws(concentration, settings.draws)  # (S, B, K+1)
            weights = logs.exp()
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
    return ELBOGuide(tuple(dispatcher.experts), fitted, shares, np.array(losses))


def _serving_prior(state: FittedDispatcher, shares: np.ndarray) -> Callable[[Tensor], Tensor]:
    """The log density ``(S, B)`` of weights that serving assumes: precisions log-uniform, summed out on a grid."""
    low, high = math.log(state.settings.kappa[0]), math.log(state.settings.kappa[1])
    kappas = torch.exp(low + (high - low) * (torch.arange(PRECISIONS) + 0.5) / PRECISIONS)
    each = state.model.weights_prior({"kappa": kappas, "pi": torch.from_numpy(shares.copy())})

    def log_density(weights: Tensor) -> Tensor:
        return each.log_prob(weights.unsqueeze(-2)).logsumexp(-1) - math.log(PRECISIONS)

    return log_density


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
