"""Views: kinds of evidence, each with what it draws for every expert, what base has instead, and its likelihood.

Adding a kind is adding a class and a line in :data:`KINDS`. Evidence enters as it was measured: how strongly a view
speaks is a global of its likelihood, learnt from the prompts, and nothing is normalised by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from bayes_dispatch.dispatcher.program.observed import Prompts

__all__ = [
    "KINDS",
    "NAMED_KINDS",
    "CountsView",
    "ProbabilitiesView",
    "SurpriseView",
    "VectorsView",
    "View",
    "floored",
    "length_factor",
    "site",
]

PROBABILITY_FLOOR = 1e-3  # of a classifier's probabilities, which may be exactly 0


@runtime_checkable
class Named(Protocol):
    """What has the name of a view."""

    @property
    def name(self) -> str:
        """The key of its evidence and of its Pyro site."""


@runtime_checkable
class View(Named, Protocol):
    """One kind of evidence: its name, its globals, and its distribution given the weights."""

    @property
    def kind(self) -> str:
        """Its key in :data:`KINDS`."""

    @property
    def width(self) -> int:
        """Numbers in each prompt's evidence."""

    def sample_experts(self) -> dict[str, Tensor]:
        """Draw the globals of each expert, inside the plate of experts: site → ``(K, ·)``."""

    def sample_shared(self) -> dict[str, Tensor]:
        """Draw the globals that all experts share: site → scalar."""

    def base(self) -> dict[str, Tensor]:
        """What base has in place of the globals of each expert: site → ``(·,)``."""

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """Values of the globals to start SVI from, given evidence ``(N, width)`` and the prompts' shares ``(N, K)``."""

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        """The distribution ``(N,) | (width,)`` of the view's evidence given weights ``(·, K+1)``, one row for all or a
        row for each prompt."""


@dataclass(frozen=True)
class VectorsView:
    """``StudentT(6, w @ M, sqrt(τ · length_factor · w @ s2))`` for vectors ``(N, D)``, such as hidden states.

    Per expert ``M ~ Normal(0, 1)[D]``, ``s2 ~ LogNormal(-3, 1)[D]``; base has ``M = 0, s2 = 1``; shared
    ``lt ~ LogNormal(2.5, 1)`` tells how fast noise falls with length. A fitted affine map brings raw vectors to a few
    coordinates of this scale (:mod:`bayes_dispatch.dispatcher.evidence.projection`).
    """

    width: int
    name: str = "hidden"
    kind = "vectors"

    def sample_experts(self) -> dict[str, Tensor]:
        zeros = torch.zeros(self.width)
        return _sample(self, M=dist.Normal(zeros, 1.0).to_event(1), s2=dist.LogNormal(zeros - 3.0, 1.0).to_event(1))

    def sample_shared(self) -> dict[str, Tensor]:
        return _sample(self, lt=dist.LogNormal(torch.tensor(2.5), 1.0))

    def base(self) -> dict[str, Tensor]:
        return _constants(self, M=0.0, s2=1.0)

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        means, variances = _moments(values, shares)
        return _named(self, M=means, s2=variances.clamp(min=5e-3, max=1.0), lt=torch.tensor(12.0))

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        means = _with_base(self, sites, "M")  # (K+1, D)
        variances = _with_base(self, sites, "s2")
        factor = temper * length_factor(prompts.lengths, sites[site(self, "lt")])  # (N,)
        noise = (weights @ variances) * factor.unsqueeze(-1)  # (N, D)
        return dist.StudentT(6.0, weights @ means, noise.sqrt()).to_event(1)


@dataclass(frozen=True)
class SurpriseView:
    """``StudentT(6, w @ a, sqrt(τ · w @ a2))`` for how badly the reader predicted a prompt, standardised ``(N, 2)``.

    Per expert ``a ~ Normal(0, 1)[2]``, ``a2 ~ LogNormal(-1, 1)[2]``; base has ``a = 4, a2 = 9``: it expects surprise.
    """

    width: int
    name: str = "surprise"
    kind = "surprise"

    def sample_experts(self) -> dict[str, Tensor]:
        zeros = torch.zeros(self.width)
        return _sample(self, a=dist.Normal(zeros, 1.0).to_event(1), a2=dist.LogNormal(zeros - 1.0, 1.0).to_event(1))

    def sample_shared(self) -> dict[str, Tensor]:
        return {}

    def base(self) -> dict[str, Tensor]:
        return _constants(self, a=4.0, a2=9.0)

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        means, variances = _moments(values, shares)
        return _named(self, a=means, a2=variances.clamp(min=2e-2, max=4.0))

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        means = _with_base(self, sites, "a")  # (K+1, 2)
        variances = _with_base(self, sites, "a2")
        noise = (weights @ variances) * temper.unsqueeze(-1)
        return dist.StudentT(6.0, weights @ means, noise.sqrt()).to_event(1)


@dataclass(frozen=True)
class _ClassesView:
    """The globals of views by class: per expert ``Phi ~ Dirichlet(.7)[C]``; shared ``conc ~ LogNormal(3, 1)``."""

    width: int
    name: str
    kind: ClassVar[str]

    def sample_experts(self) -> dict[str, Tensor]:
        return _sample(self, Phi=dist.Dirichlet(torch.full((self.width,), 0.7)))

    def sample_shared(self) -> dict[str, Tensor]:
        return _sample(self, conc=dist.LogNormal(torch.tensor(3.0), 1.0))

    def base(self) -> dict[str, Tensor]:
        return _constants(self, Phi=1.0 / self.width)


@dataclass(frozen=True)
class CountsView(_ClassesView):
    """``DirichletMultinomial(conc/τ · (w @ Phi) + 1e-3, T)`` for counts by class ``(N, C)``.

    Per expert ``Phi ~ Dirichlet(.7)[C]``; base is uniform; shared ``conc ~ LogNormal(3, 1)``.
    """

    name: str = "counts"
    kind = "counts"

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        counts = shares.T @ values + 1.0  # (K, C)
        return _named(self, Phi=counts / counts.sum(-1, keepdim=True), conc=torch.tensor(20.0))

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        return _RaggedDirichletMultinomial(_mixed_classes(self, sites, weights, temper), prompts.totals[self.name])


@dataclass(frozen=True)
class ProbabilitiesView(_ClassesView):
    """``Dirichlet(conc/τ · (w @ Phi) + 1e-3)`` for probabilities ``(N, C)`` that a classifier gives: its confusions.

    Per expert ``Phi ~ Dirichlet(.7)[C]``, the classifier's mean answer to its prompts; base is uniform; shared
    ``conc ~ LogNormal(3, 1)`` tells how far the classifier can be trusted. Evidence enters :func:`floored`.
    """

    name: str = "classifier"
    kind = "probabilities"

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        means = shares.T @ values + 1e-2  # (K, C)
        return _named(self, Phi=means / means.sum(-1, keepdim=True), conc=torch.tensor(5.0))

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        return _FlooredDirichlet(_mixed_classes(self, sites, weights, temper))


KINDS: dict[str, Callable[[int, str], View]] = {
    "vectors": VectorsView,
    "counts": CountsView,
    "probabilities": ProbabilitiesView,
    "surprise": SurpriseView,
}

# The kinds of views that have a name of their own; of others a dispatcher must be told.
NAMED_KINDS = {"hidden": "vectors", "counts": "counts", "surprise": "surprise"}


def length_factor(lengths: Float[Tensor, " prompt"], lt: Tensor) -> Float[Tensor, "*draws prompt"]:
    """Noise variance at T tokens relative to 50 tokens, ``(1 + 20 lt/T) / (1 + .4 lt)``; 1 where T is 0, unknown."""
    known = (1 + 20 * lt / lengths.clamp(min=1.0)) / (1 + 0.4 * lt)
    return torch.where(lengths > 0, known, torch.ones_like(known))


def site(view: Named, parameter: str) -> str:
    """The Pyro site of a view's global: plain for the views of :data:`NAMED_KINDS`, else with the view's name."""
    return parameter if view.name in NAMED_KINDS else f"{view.name}_{parameter}"


def floored(probabilities: Tensor) -> Tensor:
    """Probabilities ``(·, C)`` moved a little to the uniform ones, so that all are positive."""
    width = probabilities.shape[-1]
    return (probabilities + PROBABILITY_FLOOR) / (1 + width * PROBABILITY_FLOOR)


def _named(view: Named, **values: Tensor) -> dict[str, Tensor]:
    return {site(view, parameter): value for parameter, value in values.items()}


def _constants(view: View | _ClassesView, **values: float) -> dict[str, Tensor]:
    """In float64, whatever torch's default type, which other threads may change."""
    return _named(
        view, **{name: torch.full((view.width,), value, dtype=torch.float64) for name, value in values.items()}
    )


def _sample(view: Named, **priors: TorchDistributionMixin) -> dict[str, Tensor]:
    return {site(view, parameter): pyro.sample(site(view, parameter), prior) for parameter, prior in priors.items()}


def _moments(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means and variances ``(K, D)``."""
    total = shares.sum(0).unsqueeze(-1)
    means = shares.T @ values / total
    return means, shares.T @ values.square() / total - means.square()


def _mixed_classes(view: View, sites: Mapping[str, Tensor], weights: Tensor, temper: Tensor) -> Tensor:
    classes = _with_base(view, sites, "Phi")  # (K+1, C)
    strength = (sites[site(view, "conc")] / temper).unsqueeze(-1)
    return strength * (weights @ classes) + 1e-3


def _with_base(view: View, sites: Mapping[str, Tensor], parameter: str) -> Tensor:
    name = site(view, parameter)
    return torch.cat([sites[name], view.base()[name].to(sites[name]).unsqueeze(0)])


class _FlooredDirichlet(dist.Dirichlet):
    """A Dirichlet of floored probabilities; what it samples is floored, so that every density is finite."""

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        return floored(super().rsample(torch.Size(sample_shape)))


class _RaggedDirichletMultinomial(dist.DirichletMultinomial):
    """Pyro's, able to sample when totals differ by row: one conditional binomial per class."""

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        with torch.no_grad():
            probabilities = self._dirichlet.sample(torch.Size(sample_shape))
            left, mass = self.total_count.expand(probabilities.shape[:-1]).round(), torch.ones(())
            counts = []
            for p in probabilities.unbind(-1)[:-1]:
                drawn = torch.binomial(left, (p / mass.clamp(min=1e-9)).clamp(0.0, 1.0))
                counts.append(drawn)
                left, mass = left - drawn, mass - p
            return torch.stack([*counts, left], dim=-1)
