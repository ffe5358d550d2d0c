"""Guides: the local one of SVI, and the amortised one that serves new prompts in one network call.

The amortised guide is a mixture of Dirichlets whose parameters a small network computes from the evidence. It is
trained by forward KL on draws from the fitted program ("sleep": Hinton et al. 1995; Bornschein and Bengio 2015), which
covers the posterior where an ELBO-trained guide would hug one mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule, PyroParam
from scipy.special import gammainc
from torch import Tensor, nn
from torch.distributions import constraints

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.generative import Prompts

__all__ = ["DirichletMixtures", "GuideSettings", "LocalDirichlet", "MixtureGuide", "encode", "encoded_width"]

CONCENTRATION_FLOOR = 0.02  # below it draws sit on corners and gradients explode
LOG_WEIGHT_FLOOR = -30.0  # of log w in training


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
        tempers: values of the noise temper τ that held-out documents of known mixture choose from.
    """

    components: int = 3
    hidden: int = 128
    simulations: int = 32_000
    global_draws: int = 40
    steps: int = 4_000
    batch_size: int = 256
    learning_rate: float = 2e-3
    real_share: float = 0.12
    kappa: tuple[float, float] = (0.2, 4.0)
    tempers: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)

    def __post_init__(self) -> None:
        sizes = (self.components, self.hidden, self.simulations, self.global_draws, self.steps, self.batch_size)
        if min(sizes) < 1 or self.learning_rate <= 0:
            raise ConfigError(f"expected positive sizes and learning rate, got {self}")
        if not 0 <= self.real_share < 1:
            raise ConfigError(f"expected 0 ≤ real_share < 1, got {self.real_share}")
        if not 0 < self.kappa[0] < self.kappa[1] or not self.tempers or min(self.tempers) <= 0:
            raise ConfigError(
                f"expected 0 < kappa[0] < kappa[1] and positive tempers, got {self.kappa}, {self.tempers}"
            )


class LocalDirichlet(PyroModule):
    """SVI's guide of the weights: one Dirichlet for each prompt, started at its label.

    Args:
        prompts: the prompts, with labels and known weights where there are any.
        n_weights: K+1.
        batch_size: as the program's.
    """

    def __init__(self, prompts: Prompts, n_weights: int, batch_size: int | None) -> None:
        super().__init__()
        self.batch_size = batch_size
        start = torch.full((len(prompts), n_weights), 0.15)
        if prompts.labels is not None:
            rows = prompts.labels >= 0
            start[rows, prompts.labels[rows]] += 4.0
        self.concentration = cast(Tensor, PyroParam(start, constraints.greater_than(CONCENTRATION_FLOOR)))

    def forward(self, prompts: Prompts) -> None:
        with pyro.plate("prompts", len(prompts), subsample_size=self.batch_size) as rows:
            local = dist.Dirichlet(self.concentration[rows])
            if prompts.known is not None:
                local = local.mask(~torch.isfinite(prompts.known[rows, 0]))
            pyro.sample("w", local)


def encoded_width(widths: dict[str, int]) -> int:
    """Inputs of the network for views of these widths (see :func:`encode`)."""
    return sum(widths.values()) + len(widths) + 3


def encode(prompts: Prompts, temper: Float[Tensor, " prompt"]) -> Float[Tensor, "prompt inputs"]:
    """The network's inputs ``(N, ·)``: each view and whether it is missing, log length and whether unknown, log τ."""
    columns = []
    for name, values in prompts.observed.items():
        absent = prompts.missing[name].to(values).unsqueeze(-1)
        if name == "counts":
            values = (values / values.sum(-1, keepdim=True).clamp(min=1.0)).sqrt()
        columns += [values * (1 - absent), absent]
    lengths = prompts.lengths
    columns += [lengths.clamp(min=1.0).log().unsqueeze(-1), (lengths == 0).to(lengths).unsqueeze(-1)]
    return torch.cat([*columns, temper.to(lengths).log().unsqueeze(-1)], dim=-1)


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
        scaled = ((inputs - self.center) / self.spread).clamp(-10.0, 10.0)
        out = self.network(scaled)
        components, weights = self.shape
        logits, raw = out[:, :components], out[:, components:].reshape(-1, components, weights)
        return logits.log_softmax(-1), raw.clamp(-12.0, 7.0).exp() + CONCENTRATION_FLOOR

    def forward(self, inputs: Float[Tensor, "prompt inputs"]) -> torch.distributions.MixtureSameFamily:
        """The guide's distribution of the weights, batch shape ``(N,)``."""
        logits, concentration = self.parameters_of(inputs)
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=logits, validate_args=False),
            torch.distributions.Dirichlet(concentration, validate_args=False),
            validate_args=False,
        )


@dataclass(frozen=True, eq=False)
class DirichletMixtures:
    """The guide's answer for N prompts in float64: what draws and probabilities are computed from.

    Args:
        shares: ``(N, R)`` mixture weights.
        concentration: ``(N, R, K+1)``.
    """

    shares: np.ndarray
    concentration: np.ndarray

    @property
    def mean(self) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` exact mean."""
        means = self.concentration / self.concentration.sum(-1, keepdims=True)
        return (self.shares[..., None] * means).sum(1)

    def draw(self, draws: int, generators: Sequence[np.random.Generator]) -> Float[np.ndarray, "draw prompt weight"]:
        """``(S, N, K+1)`` draws; those of a prompt depend on its own generator only.

        Gamma variates of shape a are those of shape a+1 times ``U^(1/a)``, in logs: small shapes never underflow to
        0/0.
        """
        rows, _, weights = self.concentration.shape
        alpha = np.empty((rows, draws, weights))
        gammas, exponentials = np.empty_like(alpha), np.empty_like(alpha)
        edges = np.cumsum(self.shares, axis=1)[:, :-1]
        for row, generator in enumerate(generators):
            alpha[row] = self.concentration[row, np.searchsorted(edges[row], generator.random(draws), side="right")]
            generator.standard_gamma(alpha[row] + 1.0, out=gammas[row])
            generator.standard_exponential(out=exponentials[row])
        logs = np.log(gammas) - exponentials / alpha
        drawn = np.exp(logs - logs.max(-1, keepdims=True))
        return (drawn / drawn.sum(-1, keepdims=True)).swapaxes(0, 1)

    def probability_best(self, nodes: int = 96) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` P(argmax w = k), by quadrature over the largest of independent gamma variates.

        ``P(k) = ∫ Π_{j≠k} F_j(g) dF_k(g)`` on ``nodes`` points spaced evenly in ``log g``.
        """
        alpha = self.concentration
        top = alpha.max(-1)  # (N, R)
        low = np.log(top) - np.minimum(8.0 / np.sqrt(top) + 8.0 / top, 60.0)
        high = np.log(top + 8.0 * np.sqrt(top) + 25.0)
        grid = low[..., None] + (high - low)[..., None] * np.linspace(0.0, 1.0, nodes)  # (N, R, G)
        edges = gammainc(alpha[..., None, :], np.exp(grid)[..., None])  # (N, R, G, K+1)
        steps = np.diff(edges, axis=-2, prepend=0.0)
        middle = np.maximum((edges + np.roll(edges, 1, axis=-2)) / 2, 1e-300)
        middle[..., 0, :] = np.maximum(edges[..., 0, :] / 2, 1e-300)
        others = np.log(middle).sum(-1, keepdims=True) - np.log(middle)
        best = (steps * np.exp(others)).sum(-2)  # (N, R, K+1)
        best /= best.sum(-1, keepdims=True)
        return (self.shares[..., None] * best).sum(1)
