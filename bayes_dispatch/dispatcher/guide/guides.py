"""Guides: the local one of SVI, and the amortised one that serves new prompts in one network call.

The amortised guide is a mixture of Dirichlets whose parameters a small network computes from the evidence. It is
trained by forward KL on draws from the fitted program ("sleep": Hinton et al. 1995; Bornschein and Bengio 2015), which
covers the posterior where an ELBO-trained guide would hug one mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from bayes_dispatch.arguments import real, set_whole, several
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import RESOLUTION, DirichletMixtures
from bayes_dispatch.dispatcher.guide.encoding import encode
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View
from bayes_dispatch.errors import ConfigError

__all__ = ["AmortisedDirichlet", "GuideSettings", "LocalDirichlet", "MixtureGuide"]

CONCENTRATION_FLOOR = 0.02  # below it draws sit on corners and gradients explode
LOG_CONCENTRATIONS = (-12.0, 7.0)  # above the floor
CLAMP = 10.0  # of standardised inputs


@dataclass(frozen=True)
class GuideSettings:
    """The network, and how it is trained.

    Args:
        components: Dirichlets in each prompt's mixture.
        hidden: width of the two hidden layers.
        simulations: prompts drawn from the fitted program.
        global_draws: draws of the globals that the simulations share.
        steps: optimiser steps.
        batch_size: simulations in each step.
        learning_rate: at the start, cosine to zero.
        real_share: share of each batch that is real prompts of known weights, and concatenations of them.
        kappa: range of the prior precision that serving assumes, log-uniform.
        tempers: smallest and largest noise temper τ, between which documents of known mixture choose.
    """

    components: int = 6
    hidden: int = 128
    simulations: int = 40_000
    global_draws: int = 40
    steps: int = 4_000
    batch_size: int = 256
    learning_rate: float = 2e-3
    real_share: float = 0.12
    kappa: tuple[float, float] = (0.2, 4.0)
    tempers: tuple[float, float] = (0.5, 4.0)

    def __post_init__(self) -> None:
        set_whole(self, components=1, hidden=1, simulations=1, global_draws=1, steps=1, batch_size=1)
        object.__setattr__(self, "learning_rate", real("learning_rate", self.learning_rate, 0, above=True))
        object.__setattr__(self, "real_share", real("real_share", self.real_share, 0))
        if self.real_share >= 1:
            raise ConfigError(f"expected real_share below 1, got {self.real_share}")
        for name in ("kappa", "tempers"):
            ends = tuple(real(f"each of {name}", end, 0, above=True) for end in several(name, getattr(self, name), 2))
            object.__setattr__(self, name, ends)
        if not (self.kappa[0] < self.kappa[1] and self.tempers[0] <= self.tempers[1]):
            raise ConfigError(
                f"expected kappa[0] < kappa[1] and tempers[0] ≤ tempers[1], got {self.kappa}, {self.tempers}"
            )


class LocalDirichlet(PyroModule):
    """SVI's guide of the weights: one Dirichlet for each prompt, started at its label.

    Args:
        prompts: the prompts, with labels and known weights where there are any.
        n_weights: K+1.
    """

    def __init__(self, prompts: Prompts, n_weights: int) -> None:
        super().__init__()
        start = torch.full((len(prompts), n_weights), 0.15) + 4.0 * _one_hot(prompts, n_weights)
        self.concentration = cast(Tensor, PyroParam(start, constraints.greater_than(CONCENTRATION_FLOOR)))

    def forward(self, prompts: Prompts) -> None:
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("w", _unless_known(_InsideDirichlet(self.concentration), prompts))


class AmortisedDirichlet(PyroModule):
    """SVI's guide of the weights where prompts come in mini-batches: a network gives each prompt's Dirichlet.

    Args:
        views: the program's.
        prompts: the prompts; a thousand of them standardise the network's inputs.
        n_weights: K+1.
        batch_size: as the program's.
    """

    def __init__(self, views: Sequence[View], prompts: Prompts, n_weights: int, batch_size: int) -> None:
        super().__init__()
        self.views, self.batch_size, self.n_weights = tuple(views), batch_size, n_weights
        some = self._encode(prompts.select(torch.linspace(0, len(prompts) - 1, 1000).long()))  # (1000, I)
        self.center, self.spread = some.mean(0), some.std(0).clamp(min=1e-3)
        first, second = nn.Linear(some.shape[1], 64), nn.Linear(64, n_weights)
        self.inner = cast(Tensor, PyroParam(torch.cat([first.weight.T, first.bias[None]]).detach()))
        self.outer = cast(Tensor, PyroParam(torch.cat([second.weight.T, second.bias[None]]).detach()))
        self.label_bonus = cast(Tensor, PyroParam(torch.tensor(4.0), constraints.positive))

    def forward(self, prompts: Prompts) -> None:
        with pyro.plate("prompts", len(prompts), subsample_size=self.batch_size) as rows:
            batch = prompts.select(torch.as_tensor(rows))
            inputs = ((self._encode(batch) - self.center) / self.spread).clamp(-10.0, 10.0)
            hidden = nn.functional.silu(inputs @ self.inner[:-1] + self.inner[-1])
            out = (hidden @ self.outer[:-1] + self.outer[-1]).clamp(-6.0, 8.0)
            concentration = 0.15 * out.exp() + CONCENTRATION_FLOOR
            concentration = concentration + self.label_bonus * _one_hot(batch, self.n_weights)
            pyro.sample("w", _unless_known(_InsideDirichlet(concentration), batch))

    def _encode(self, prompts: Prompts) -> Tensor:
        uniform = np.full(self.n_weights, 1.0 / self.n_weights)
        return torch.from_numpy(encode(self.views, prompts, 1.0, uniform)).to(prompts.lengths)


class _InsideDirichlet(dist.Dirichlet):
    """A Dirichlet whose draws keep off the faces, where gradients of sparse densities overflow in float32."""

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        return super().rsample(torch.Size(sample_shape)).clamp(min=1e-20)


def _one_hot(prompts: Prompts, n_weights: int) -> Float[Tensor, "prompt weight"]:
    """One at each prompt's label, zeros where it is unknown."""
    out = torch.zeros(len(prompts), n_weights)
    if prompts.labels is not None:
        rows = prompts.labels >= 0
        out[rows, prompts.labels[rows]] = 1.0
    return out


def _unless_known(local: dist.Dirichlet, prompts: Prompts) -> TorchDistributionMixin:
    """A prompt of known weights has none to infer."""
    return local if prompts.known is None else local.mask(~torch.isfinite(prompts.known[:, 0]))


class MixtureGuide(nn.Module):
    """The amortised guide: encoded evidence ``(N, I)`` to a mixture of Dirichlets over ``(N, K+1)`` weights.

    Args:
        n_inputs: width of the encoded evidence.
        n_weights: K+1.
        settings: sizes of the network.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, n_inputs: int, n_weights: int, settings: GuideSettings) -> None:
        super().__init__()
        self.shape = (settings.components, n_weights)
        self.register_buffer("center", torch.zeros(n_inputs))
        self.register_buffer("spread", torch.ones(n_inputs))
        self.network = nn.Sequential(
            nn.Linear(n_inputs, settings.hidden),
            nn.SiLU(),
            nn.Linear(settings.hidden, settings.hidden),
            nn.SiLU(),
            nn.Linear(settings.hidden, settings.components * (n_weights + 1)),
        )

    def standardise_by(self, inputs: Float[Tensor, "prompt inputs"]) -> None:
        """Take centre and spread of the inputs from a sample of them."""
        self.center.copy_(inputs.mean(0))
        self.spread.copy_(inputs.std(0).clamp(min=1e-3))

    def parameters_of(self, inputs: Float[Tensor, "prompt inputs"]) -> tuple[Tensor, Tensor]:
        """Log mixture weights ``(N, R)`` and concentrations ``(N, R, K+1)``."""
        scaled = ((inputs - self.center) / self.spread).clamp(-CLAMP, CLAMP)
        out = self.network(scaled)
        components, weights = self.shape
        logits, raw = out[:, :components], out[:, components:].reshape(-1, components, weights)
        return logits.log_softmax(-1), raw.clamp(*LOG_CONCENTRATIONS).exp() + CONCENTRATION_FLOOR

    def compiled(self) -> Callable[[Float[np.ndarray, "prompt inputs"]], DirichletMixtures]:
        """The network as it is now in NumPy and float64, which for a single prompt takes a fifth of torch's time."""
        center, spread = self.center.double().numpy(), self.spread.double().numpy()
        layers = [module for module in self.network if isinstance(module, nn.Linear)]
        weights = [
            (np.ascontiguousarray(e.weight.detach().double().numpy().T), e.bias.detach().double().numpy())
            for e in layers
        ]
        components, width = self.shape

        def answer(inputs: Float[np.ndarray, "prompt inputs"]) -> DirichletMixtures:
            x = np.clip((inputs - center) / spread, -CLAMP, CLAMP)
            for matrix, bias in weights[:-1]:
                x = x @ matrix + bias
                x /= 1.0 + np.exp(-x)
            x = x @ weights[-1][0] + weights[-1][1]
            logits = x[:, :components]
            shares = np.exp(logits - logits.max(1, keepdims=True))
            raw = np.clip(x[:, components:], *LOG_CONCENTRATIONS).reshape(-1, components, width)
            return DirichletMixtures(shares / shares.sum(1, keepdims=True), np.exp(raw) + CONCENTRATION_FLOOR)

        return answer

    def forward(
        self, inputs: Float[Tensor, "prompt inputs"], weights: Float[Tensor, "prompt weight"]
    ) -> Float[Tensor, " prompt"]:
        """Log density ``(N,)`` of weights, those below ``RESOLUTION`` counting by their probability to be there.

        Evidence cannot tell 1e-5 from 1e-50, but their densities under a sparse Dirichlet differ by a hundred nats:
        without it a guide learns little else. Below ``RESOLUTION`` the density of each weight is its mean there.
        """
        logits, concentration = self.parameters_of(inputs)
        small = (weights < RESOLUTION).to(weights).unsqueeze(1)  # (N, 1, K+1)
        logs = weights.clamp(min=RESOLUTION).log().unsqueeze(1)
        parts = ((concentration - 1) * logs - small * concentration.log() - concentration.lgamma()).sum(-1)
        return (logits + parts + concentration.sum(-1).lgamma()).logsumexp(-1)
