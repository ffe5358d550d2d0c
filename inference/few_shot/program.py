"""Few-shot adaptation as inference: the posterior over blend weights, given a handful of questions with answers.

::

    w ~ Dirichlet(prior)                                          answers ~ language model blended by w
    per layer:  v_l ~ Dirichlet(coupling * w + floor)             answers ~ language model blended by v

Transformer² (arXiv 2501.06252) searches one vector of coefficients by the cross-entropy method; that is here as a
baseline. The posterior comes from the same likelihood by importance sampling, by a tempered sequential Monte Carlo
sampler, or by SVI through the language model (:mod:`bayes_dispatch.inference.few_shot.methods`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.arguments import real
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.inference.few_shot.answers import AnswerLikelihood

__all__ = ["PRECISION", "FewShotFit", "FewShotMethod", "FewShotProgram", "log_dirichlet"]

PRECISION = 0.5  # of the default prior, shared by all components; of .25–4 it left the least held-out NLL
FLOOR = 0.05  # of a layer's concentrations, where the shared weight is 0
TINY = 1e-30  # of weights inside logs


@dataclass(frozen=True, eq=False)
class FewShotProgram:
    """The generative program, and its densities for samplers; calling it runs the Pyro program.

    A *state* ``(P, G, K + 1)`` is P particles: the shared weights alone (G = 1), or these and then each layer's.

    Args:
        likelihood: of the answers.
        prior: (K + 1,) concentrations of ``w``; by default .5 / (K + 1) for each: few experts at a time.
        coupling: precision of the layers' weights about the shared ones; ``None`` for the same weights in every layer.

    Raises:
        ConfigError: a prior of another length or not positive, or a coupling that is not positive.
    """

    likelihood: AnswerLikelihood
    prior: Sequence[float] | None = None
    coupling: float | None = None
    concentration: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.likelihood.components)
        prior = np.asarray([PRECISION / count] * count if self.prior is None else self.prior, dtype=object)
        if prior.shape != (count,):
            raise ConfigError(f"expected {count} concentrations of a prior, got {self.prior!r:.80}")
        positive = [real("a concentration of the prior", each, 0, above=True) for each in prior]
        if self.coupling is not None:
            object.__setattr__(self, "coupling", real("coupling", self.coupling, 0, above=True))
        object.__setattr__(self, "concentration", torch.tensor(positive, dtype=torch.float64))

    @property
    def rows(self) -> int:
        """G: rows of a state."""
        return 1 if self.coupling is None else 1 + len(self.likelihood.layers)

    def __call__(self) -> None:
        shared = pyro.sample("w", dist.Dirichlet(self.concentration))
        if self.coupling is None:
            pyro.factor("answers", self._answers(shared.unsqueeze(-2)))
            return
        about = self.coupling * shared.unsqueeze(-2) + FLOOR
        layers = dist.Dirichlet(about.expand(*shared.shape[:-1], self.rows - 1, shared.shape[-1])).to_event(1)
        pyro.factor("answers", self._answers(torch.cat([shared.unsqueeze(-2), pyro.sample("layers", layers)], -2)))

    def draw(self, count: int) -> Float[Tensor, "P G components"]:
        """States from the prior, from torch's generator."""
        shared = dist.Dirichlet(self.concentration).sample((count,)).unsqueeze(1)
        if self.coupling is None:
            return shared
        about = (self.coupling * shared + FLOOR).expand(-1, self.rows - 1, -1)
        return torch.cat([shared, dist.Dirichlet(about).sample()], 1)

    def log_prior(self, state: Float[Tensor, "P G components"]) -> Float[Tensor, " P"]:
        """Log density of the prior, nats."""
        value = log_dirichlet(self.concentration, state[:, 0])
        if self.coupling is None:
            return value
        about = (self.coupling * state[:, :1] + FLOOR).expand(-1, self.rows - 1, -1)
        return value + log_dirichlet(about, state[:, 1:]).sum(1)

    def log_likelihood(self, state: Float[Tensor, "P G components"]) -> Float[Tensor, " P"]:
        """Log probability of the answers, nats: P times as many sequences as there are pairs.

        Raises:
            TensorError: it is NaN or infinite; no method could weigh such weights against others.
        """
        found = self.likelihood(state[:, 0] if self.coupling is None else state[:, 1:])
        if wrong := int((~found.isfinite()).sum()):
            got = f"got {wrong} of {len(found)} that are NaN or infinite"
            raise TensorError(f"expected finite log-likelihoods of the answers under blends of the experts, {got}")
        return found

    def _answers(self, state: Tensor) -> Tensor:
        """The log-likelihood of states with any leading dimensions."""
        return self.log_likelihood(state.reshape(-1, *state.shape[-2:])).reshape(state.shape[:-2])


@dataclass(frozen=True, eq=False)
class FewShotFit:
    """What a method found.

    Attributes:
        state: (S, G, K + 1) equally weighted draws; a point estimate is one draw.
        posterior: of the weights, for one prompt. With weights by layer, of those shared by the layers.
        layers: of each layer's weights, a layer in place of a prompt; ``None`` where all are the same.
        log_evidence: log marginal likelihood of the answers, nats; ``None`` from methods that do not estimate it.
        evaluations: how many times the likelihood of all pairs was computed.
    """

    state: np.ndarray
    posterior: DispatchPosterior
    layers: DispatchPosterior | None
    log_evidence: float | None
    evaluations: int

    @classmethod
    def of(
        cls,
        program: FewShotProgram,
        state: Tensor,
        evaluations: int,
        log_evidence: float | None = None,
        k_hat: float | None = None,
    ) -> "FewShotFit":
        """From draws of states; ``k_hat`` where they were importance-weighted."""
        names = program.likelihood.components
        draws = state.detach().double().numpy()
        draws = draws / draws.sum(-1, keepdims=True)
        known = (None if value is None else np.array([value]) for value in (k_hat, log_evidence))
        layers = None if program.coupling is None else DispatchPosterior(draws[:, 1:], names)
        return cls(draws, DispatchPosterior(draws[:, :1], names, *known), layers, log_evidence, evaluations)


@runtime_checkable
class FewShotMethod(Protocol):
    """A way to infer the weights."""

    @property
    def name(self) -> str: ...

    def infer(self, program: FewShotProgram, seed: int) -> FewShotFit:
        """Draws of the posterior, or a point estimate."""
        ...


def log_dirichlet(
    concentration: Float[Tensor, "*#B components"], weights: Float[Tensor, "*#B components"]
) -> Float[Tensor, "*draws"]:
    """Log density of Dirichlets at weights that may touch the faces of the simplex."""
    constants = concentration.sum(-1).lgamma() - concentration.lgamma().sum(-1)
    return constants + ((concentration - 1) * weights.clamp(min=TINY).log()).sum(-1)
