"""Ways to infer the weights of few-shot adaptation: three for their posterior, and the cross-entropy method."""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.distributions import constraints

from bayes_dispatch.arguments import real, set_whole
from bayes_dispatch.dispatcher.arviz_data import pareto_smoothed
from bayes_dispatch.dispatcher.fitting.svi import finite_loss, isolated
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.few_shot.program import FewShotFit, FewShotProgram, log_dirichlet
from bayes_dispatch.model.frozen import frozen

__all__ = ["CrossEntropy", "ImportanceSampling", "SequentialMonteCarlo", "VariationalInference"]

BROAD = 0.1  # share of far proposals that are uniform on the simplex, where no particle may be yet
NARROW = 0.02  # concentration of a local proposal where the weight is 0


@dataclass(frozen=True)
class ImportanceSampling:
    """Proposals from the prior, Pareto-smoothed weights, systematic resampling.

    Attributes:
        proposals: in all. draws: of the result.
    """

    proposals: int = 1024
    draws: int = 256
    name = "importance sampling"

    def __post_init__(self) -> None:
        set_whole(self, proposals=25, draws=1)

    def infer(self, program: FewShotProgram, seed: int) -> FewShotFit:
        """Draws, with ``k_hat`` and the evidence."""
        with isolated(seed), torch.no_grad():
            state = program.draw(self.proposals)
            ratios = program.log_likelihood(state)
            weights, k_hat = _smoothed(ratios)
            chosen = _systematic(weights, self.draws)
        return FewShotFit.of(program, state[chosen], self.proposals, _log_mean(ratios), k_hat)


@dataclass(frozen=True)
class SequentialMonteCarlo:
    """A tempered sampler (Del Moral et al. 2006): particles go from the prior to the posterior in steps.

    A step raises the power of the likelihood as far as leaves a share ``keep`` of the particles effective (Jasra et al.
    2011), resamples, and moves every particle by Metropolis–Hastings: in turn near where it is, and to a Dirichlet that
    is fitted to all of them.

    Attributes:
        particles: draws of the result too. keep: effective share. moves: sweeps after each step.
    """

    particles: int = 256
    keep: float = 0.5
    moves: int = 3
    name = "sequential Monte Carlo"

    def __post_init__(self) -> None:
        set_whole(self, particles=8, moves=1)
        object.__setattr__(self, "keep", real("keep", self.keep, 0, 1, above=True, below=True))

    def infer(self, program: FewShotProgram, seed: int) -> FewShotFit:
        """Draws, with the evidence."""
        with isolated(seed), torch.no_grad():
            state = program.draw(self.particles)
            likelihood = program.log_likelihood(state)
            power, log_evidence, evaluations, precision = 0.0, 0.0, self.particles, 30.0
            while power < 1:
                step = self._step(likelihood, 1 - power)
                ratios = step * likelihood
                log_evidence += _log_mean(ratios)
                chosen = _systematic(ratios.softmax(0), self.particles)
                state, likelihood, power = state[chosen], likelihood[chosen], power + step
                for sweep in range(2 * self.moves):
                    for row in range(program.rows):
                        near = precision if sweep % 2 == 0 else None
                        state, likelihood, accepted, computed = _move(program, state, likelihood, power, row, near)
                        evaluations += computed
                        if near is not None:  # towards a third of the moves accepted
                            precision = float(np.clip(precision * math.exp(1.5 * (0.33 - accepted)), 3.0, 3e4))
        return FewShotFit.of(program, state, evaluations, log_evidence)

    def _step(self, likelihood: Tensor, left: float) -> float:
        """The largest step, of at most ``left``, that leaves enough particles effective."""

        def effective(step: float) -> float:
            weights = (step * likelihood).softmax(0)
            return float(1 / weights.square().sum()) / len(weights)

        if effective(left) >= self.keep:
            return left
        low, high = 0.0, left
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if effective(middle) >= self.keep else (low, middle)
        return high  # above 0, as low may not be


@dataclass(frozen=True)
class VariationalInference:
    """SVI through the language model, with a Dirichlet guide for each row of weights, all particles in one batch.

    Attributes:
        steps: of Adam. particles: that estimate the ELBO. learning_rate: at first, falling to a tenth.
        draws: of the result; their importance ratios give ``k_hat``.
    """

    steps: int = 100
    particles: int = 8
    learning_rate: float = 0.1
    draws: int = 256
    name = "SVI"

    def __post_init__(self) -> None:
        set_whole(self, steps=1, particles=1, draws=25)
        object.__setattr__(self, "learning_rate", real("learning_rate", self.learning_rate, 0, above=True))

    def infer(self, program: FewShotProgram, seed: int) -> FewShotFit:
        """The guide's draws, with their ``k_hat`` against the program, and its estimate of the evidence."""
        with isolated(seed), frozen(program.likelihood.model):
            guide = _DirichletGuide(program)
            decay = 0.1 ** (1 / self.steps)
            optimizer = ClippedAdam({"lr": self.learning_rate, "lrd": decay, "clip_norm": 10.0})
            elbo = Trace_ELBO(num_particles=self.particles, vectorize_particles=True, max_plate_nesting=0)
            svi = SVI(program, guide, optimizer, elbo)
            for step in range(self.steps):
                finite_loss(svi.step(), step, self.learning_rate)
            with torch.no_grad():
                state = guide.draw(self.draws)
                ratios = program.log_prior(state) + program.log_likelihood(state) - guide.log_density(state)
        _, k_hat = _smoothed(ratios)
        evaluations = self.steps * self.particles + self.draws
        return FewShotFit.of(program, state, evaluations, _log_mean(ratios), k_hat)


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy method, as Transformer² searches its coefficients: a point estimate.

    A Gaussian over logits (softmax keeps the weights on the simplex) is refitted to the best of each population.

    Attributes:
        population: candidates of an iteration. elite: how many of them it is refitted to. iterations: in all.
        spread: standard deviation of the logits at first.
    """

    population: int = 64
    elite: int = 10
    iterations: int = 12
    spread: float = 2.0
    name = "cross-entropy method"

    def __post_init__(self) -> None:
        set_whole(self, elite=2, population=2, iterations=1)
        object.__setattr__(self, "spread", real("spread", self.spread, 0, above=True))
        if self.elite > self.population:
            raise ConfigError(f"expected an elite of at most the population, {self.population}, got {self.elite}")

    def infer(self, program: FewShotProgram, seed: int) -> FewShotFit:
        """One draw: the weights at the mean of the last Gaussian."""
        shape = (program.rows, len(program.concentration))
        with isolated(seed), torch.no_grad():
            mean, spread = torch.zeros(shape).double(), torch.full(shape, self.spread).double()
            for _ in range(self.iterations):
                logits = mean + spread * torch.randn(self.population, *shape).double()
                best = program.log_likelihood(logits.softmax(-1)).topk(self.elite).indices
                mean, spread = logits[best].mean(0), logits[best].std(0) + 1e-3
        state = mean.softmax(-1)
        if program.coupling is not None:
            state = torch.cat([state[1:].mean(0, keepdim=True), state[1:]])
        return FewShotFit.of(program, state[None], self.iterations * self.population)


class _DirichletGuide(PyroModule):
    """A Dirichlet for each row of a state."""

    def __init__(self, program: FewShotProgram) -> None:
        super().__init__()
        self._layered = program.coupling is not None
        start = torch.full((program.rows, len(program.concentration)), 1.0, dtype=torch.float64)
        self.concentration = cast(Tensor, PyroParam(start, constraints.greater_than(NARROW)))

    def forward(self) -> None:
        pyro.sample("w", dist.Dirichlet(self.concentration[0]))
        if self._layered:
            pyro.sample("layers", dist.Dirichlet(self.concentration[1:]).to_event(1))

    def draw(self, count: int) -> Tensor:
        return dist.Dirichlet(self.concentration.detach()).sample((count,))

    def log_density(self, state: Tensor) -> Tensor:
        return log_dirichlet(self.concentration.detach(), state).sum(-1)


def _move(
    program: FewShotProgram, state: Tensor, likelihood: Tensor, power: float, row: int, precision: float | None
) -> tuple[Tensor, Tensor, float, int]:
    """One Metropolis–Hastings move of a row of every particle: new states and likelihoods, share accepted, evaluations.

    With a precision it is near where the row is; without it to a Dirichlet fitted to the rows of all, or anywhere.
    """
    now = state[:, row]
    if precision is None:
        fitted = _fit_dirichlet(now)
        broad = torch.rand(len(now)) < BROAD
        concentration = torch.where(broad[:, None], torch.ones_like(fitted), fitted)
        new = dist.Dirichlet(concentration).sample()
        forward, backward = (_log_mixture(fitted, values) for values in (new, now))
    else:
        new = dist.Dirichlet(precision * now + NARROW).sample()
        forward = log_dirichlet(precision * now + NARROW, new)
        backward = log_dirichlet(precision * new + NARROW, now)
    proposed = state.clone()
    proposed[:, row] = new
    read = program.coupling is None or row > 0  # the shared weights are no row of the language model's
    after = program.log_likelihood(proposed) if read else likelihood
    ratio = program.log_prior(proposed) - program.log_prior(state) + power * (after - likelihood) + backward - forward
    accepted = torch.rand(len(ratio)).log() < ratio
    state = torch.where(accepted[:, None, None], proposed, state)
    likelihood = torch.where(accepted, after, likelihood)
    return state, likelihood, float(accepted.double().mean()), len(state) if read else 0


def _log_mixture(fitted: Tensor, weights: Tensor) -> Tensor:
    broad = log_dirichlet(torch.ones_like(fitted), weights)
    return torch.logaddexp(math.log(BROAD) + broad, math.log1p(-BROAD) + log_dirichlet(fitted, weights))


def _fit_dirichlet(weights: Tensor) -> Tensor:
    """Concentrations (K + 1,) with the moments of weights (P, K + 1), spread a little wider."""
    mean, variance = weights.mean(0), weights.var(0)
    precision = (mean * (1 - mean)).sum() / variance.sum().clamp(min=1e-9) - 1
    return (0.7 * precision.clamp(min=0.5, max=1e4) * mean).clamp(min=NARROW)


def _smoothed(ratios: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed normalised weights (P,) and k-hat."""
    log_weights, k_hat = pareto_smoothed(ratios.double().numpy()[None])
    return torch.from_numpy(np.exp(log_weights[0])), float(k_hat[0])


def _systematic(weights: Tensor, count: int) -> Tensor:
    """Indices of ``count`` systematically resampled particles, in random order: some uses take the first few."""
    points = (torch.arange(count).double() + torch.rand(()).double()) / count
    chosen = torch.searchsorted(weights.double().cumsum(0), points).clamp(max=len(weights) - 1)
    return chosen[torch.randperm(count)]


def _log_mean(ratios: Tensor) -> float:
    return float(ratios.logsumexp(0)) - math.log(len(ratios))
