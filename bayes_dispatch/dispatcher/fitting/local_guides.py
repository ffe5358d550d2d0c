"""SVI's guides of the prompts' weights: one Dirichlet for each prompt, or a network that gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View

__all__ = ["AmortisedDirichlet", "LocalDirichlet"]

CONCENTRATION_FLOOR = 0.02  # below it draws sit on corners and gradients explode


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
        some = _encode(self.views, prompts.select(torch.linspace(0, len(prompts) - 1, 1000).long()))  # (1000, I)
        self.center, self.spread = some.mean(0), some.std(0).clamp(min=1e-3)
        first, second = nn.Linear(some.shape[1], 64), nn.Linear(64, n_weights)
        self.inner = cast(Tensor, PyroParam(torch.cat([first.weight.T, first.bias[None]]).detach()))
        self.outer = cast(Tensor, PyroParam(torch.cat([second.weight.T, second.bias[None]]).detach()))
        self.label_bonus = cast(Tensor, PyroParam(torch.tensor(4.0), constraints.positive))

    def forward(self, prompts: Prompts) -> None:
        with pyro.plate("prompts", len(prompts), subsample_size=self.batch_size) as rows:
            batch = prompts.select(torch.as_tensor(rows))
            inputs = ((_encode(self.views, batch) - self.center) / self.spread).clamp(-10.0, 10.0)
            hidden = nn.functional.silu(inputs @ self.inner[:-1] + self.inner[-1])
            out = (hidden @ self.outer[:-1] + self.outer[-1]).clamp(-6.0, 8.0)
            concentration = 0.15 * out.exp() + CONCENTRATION_FLOOR
            concentration = concentration + self.label_bonus * _one_hot(batch, self.n_weights)
            pyro.sample("w", _unless_known(_InsideDirichlet(concentration), batch))


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


def _encode(views: Sequence[View], prompts: Prompts) -> Float[Tensor, "prompt inputs"]:
    """The network's inputs: each view and whether it is missing, log length and whether it is unknown."""
    columns = []
    for view in views:
        values, absent = prompts.observed[view.name], prompts.missing[view.name].unsqueeze(-1)
        if view.kind == "counts":
            values = (values / values.sum(-1, keepdim=True).clamp(min=1.0)).sqrt()
        elif view.kind == "probabilities":
            values = values.log()
        columns += [torch.where(absent, torch.zeros(()).to(values), values), absent.to(values)]
    lengths = prompts.lengths.unsqueeze(-1)
    return torch.cat([*columns, lengths.clamp(min=1.0).log(), (lengths == 0).to(lengths)], -1)
