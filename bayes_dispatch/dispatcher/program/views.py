"""Views: kinds of evidence, each with what it draws for every expert and for base, and its likelihood.

Adding a kind is adding a class and a line in :data:`KINDS`. Evidence enters as it was measured: how strongly a view
speaks is a global of its likelihood, learnt from the prompts, and nothing is normalised by hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

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
    "length_factor",
    "off_zero",
]

PROBABILITY_FLOOR = 1e-3  # of a classifier's probabilities, which may be exactly 0


@dataclass(frozen=True)
class View(ABC):
    """One kind of evidence: its name, its globals, and its distribution given the weights.

    Args:
        width: numbers in each prompt's evidence.
        name: the key of its evidence, and of its Pyro site.
    """

    width: int
    name: str
    kind: ClassVar[str]  # its key in KINDS
    constants: ClassVar[Mapping[str, float]]  # each expert's globals, and around what those of base are drawn

    @abstractmethod
    def experts(self) -> dict[str, TorchDistributionMixin]:
        """Priors of the globals of an expert."""

    @abstractmethod
    def shared(self) -> dict[str, TorchDistributionMixin]:
        """Priors of the globals that all experts share."""

    @abstractmethod
    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """Values of the globals to start SVI from, given evidence ``(N, width)`` and the prompts' shares ``(N, K)``."""

    @abstractmethod
    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        """The distribution ``(N,) | (width,)`` of the view's evidence given weights ``(·, K+1)``, one row for all or a
        row for each prompt; globals, too, may be of all or, with ``N`` in front of their shape, of each."""

    def site(self, parameter: str) -> str:
        """The Pyro site of a global: plain for the views of :data:`NAMED_KINDS`, else with the view's name."""
        return parameter if self.name in NAMED_KINDS else f"{self.name}_{parameter}"

    def sample(self, priors: Mapping[str, TorchDistributionMixin]) -> dict[str, Tensor]:
        """Draw globals: site → value; inside the plate of experts ``(K, ·)``."""
        return {self.site(name): pyro.sample(self.site(name), prior) for name, prior in priors.items()}

    def with_base(self, sites: Mapping[str, Tensor], parameter: str) -> Float[Tensor, "*draws weight number"]:
        """``(K+1, width)`` a global of the experts, base last."""
        return torch.cat([sites[self.site(parameter)], sites[self.site(f"base_{parameter}")].unsqueeze(-2)], -2)


@dataclass(frozen=True)
class _StudentView(View):
    """Numbers about mixed means, with mixed variances; :attr:`constants` names the two."""

    log_variance: ClassVar[float]  # prior mean
    variances: ClassVar[tuple[float, float]]  # range of those that SVI starts from

    def experts(self) -> dict[str, TorchDistributionMixin]:
        (mean, variance), zeros = self.constants, torch.zeros(self.width)
        spread = dist.LogNormal(zeros + self.log_variance, 1.0).to_event(1)
        return {mean: dist.Normal(zeros, 1.0).to_event(1), variance: spread}

    def shared(self) -> dict[str, TorchDistributionMixin]:
        (mean, at), (variance, spread) = self.constants.items()
        wide, around = torch.full((self.width,), spread), torch.full((self.width,), at)
        return {
            f"base_{mean}": dist.Normal(around, 1.0).to_event(1),
            f"base_{variance}": dist.LogNormal(wide.log(), 0.5).to_event(1),
        }

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        base = {self.site(f"base_{name}"): torch.full((self.width,), value) for name, value in self.constants.items()}
        (mean, variance), total = map(self.site, self.constants), shares.sum(0).unsqueeze(-1)
        means = shares.T @ values / total
        found = shares.T @ values.square() / total - means.square()
        return {mean: means, variance: found.clamp(*self.variances), **base}

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        means, variances = (self.with_base(sites, name) for name in self.constants)  # (K+1, width)
        mean, noise = _mixed(weights, means), _mixed(weights, variances)  # (N, width)
        noise = noise * self.noise(sites, prompts).unsqueeze(-1)
        noise = noise + self.mixing(sites) * (_mixed(weights, means.square()) - mean.square()).clamp(min=0)
        return dist.StudentT(6.0, mean, (temper.unsqueeze(-1) * noise).sqrt()).to_event(1)

    def noise(self, sites: Mapping[str, Tensor], prompts: Prompts) -> Float[Tensor, "*draws prompt"]:
        """What variances are multiplied by, but for τ."""
        return torch.ones_like(prompts.lengths)

    def mixing(self, sites: Mapping[str, Tensor]) -> Float[Tensor, "*draws 1"] | float:
        """What the variance of the experts' means under the weights is multiplied by."""
        return 0.0


@dataclass(frozen=True)
class VectorsView(_StudentView):
    """``StudentT(6, w @ M, sqrt(τ · (length_factor · w @ s2 + xi · v)))`` for vectors ``(N, D)``, as hidden states are.

    Per expert ``M ~ Normal(0, 1)[D]``, ``s2 ~ LogNormal(-3, 1)[D]``; base's ``s2 ~ LogNormal(0, .5)`` is wide until
    prompts of its own are known. Shared ``lt ~ LogNormal(2.5, 1)`` tells how fast noise falls with length, and
    ``xi ~ LogNormal(-4, 1)`` what ``v = w @ M² − (w @ M)²``, the variance of the experts' means, adds at any length: a
    model that has read one domain reads the next differently. A fitted affine map brings raw vectors to a few
    coordinates of this scale (:mod:`bayes_dispatch.dispatcher.evidence.projection`).
    """

    name: str = "hidden"
    kind = "vectors"
    constants = MappingProxyType({"M": 0.0, "s2": 1.0})
    log_variance, variances = -3.0, (5e-3, 1.0)

    def shared(self) -> dict[str, TorchDistributionMixin]:
        own = {"lt": dist.LogNormal(torch.tensor(2.5), 1.0), "xi": dist.LogNormal(torch.tensor(-4.0), 1.0)}
        return super().shared() | own

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        return super().start(values, shares) | {
            self.site("lt"): torch.tensor(12.0),
            self.site("xi"): torch.tensor(0.02),
        }

    def noise(self, sites: Mapping[str, Tensor], prompts: Prompts) -> Float[Tensor, "*draws prompt"]:
        return length_factor(prompts.lengths, sites[self.site("lt")])

    def mixing(self, sites: Mapping[str, Tensor]) -> Float[Tensor, "*draws 1"]:
        return sites[self.site("xi")].unsqueeze(-1)


@dataclass(frozen=True)
class SurpriseView(_StudentView):
    """``StudentT(6, w @ a, sqrt(τ · w @ a2))`` for how badly the reader predicted a prompt, standardised ``(N, 2)``.

    Per expert ``a ~ Normal(0, 1)[2]``, ``a2 ~ LogNormal(-1, 1)[2]``; base's are around 4 and 9: it expects surprise.
    """

    name: str = "surprise"
    kind = "surprise"
    constants = MappingProxyType({"a": 4.0, "a2": 9.0})
    log_variance, variances = -1.0, (2e-2, 4.0)


@dataclass(frozen=True)
class _ClassesView(View):
    """Numbers by class C: an expert's ``Phi ~ Dirichlet(.7)``, base's ``Dirichlet(5)``; ``conc ~ LogNormal(3, 1)``."""

    first: ClassVar[tuple[float, float]]  # what SVI starts from: added to each class, and ``conc``

    @property
    def constants(self) -> Mapping[str, float]:  # type: ignore[override]
        return {"Phi": 1.0 / self.width}

    def experts(self) -> dict[str, TorchDistributionMixin]:
        return {"Phi": dist.Dirichlet(torch.full((self.width,), 0.7))}

    def shared(self) -> dict[str, TorchDistributionMixin]:
        even = dist.Dirichlet(torch.full((self.width,), 5.0))
        return {"conc": dist.LogNormal(torch.tensor(3.0), 1.0), "base_Phi": even}

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        classes = shares.T @ values + self.first[0]  # (K, C)
        phi = classes / classes.sum(-1, keepdim=True)
        even = torch.full((self.width,), 1.0 / self.width)
        return {self.site("Phi"): phi, self.site("base_Phi"): even, self.site("conc"): torch.tensor(self.first[1])}

    def concentration(self, sites: Mapping[str, Tensor], weights: Tensor, temper: Tensor) -> Float[Tensor, "... class"]:
        """``conc/τ · (w @ Phi) + 1e-3``."""
        strength = (sites[self.site("conc")] / temper).unsqueeze(-1)
        return strength * _mixed(weights, self.with_base(sites, "Phi")) + 1e-3


@dataclass(frozen=True)
class CountsView(_ClassesView):
    """``DirichletMultinomial(conc/τ · (w @ Phi) + 1e-3, T)`` for counts by class ``(N, C)``."""

    name: str = "counts"
    kind = "counts"
    first = (1.0, 20.0)

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        return _RaggedDirichletMultinomial(self.concentration(sites, weights, temper), prompts.totals[self.name])


@dataclass(frozen=True)
class ProbabilitiesView(_ClassesView):
    """``Dirichlet(conc/τ · (w @ Phi) + 1e-3)`` for probabilities ``(N, C)`` that a classifier gives: its confusions.

    ``Phi`` is the classifier's mean answer to an expert's prompts; ``conc`` tells how far it can be trusted. Evidence
    enters :func:`off_zero`, for classifiers say 0; what the program draws is positive as it is.
    """

    name: str = "classifier"
    kind = "probabilities"
    first = (1e-2, 5.0)

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        return dist.Dirichlet(self.concentration(sites, weights, temper))


KINDS: dict[str, Callable[[int, str], View]] = {
    "vectors": VectorsView,
    "counts": CountsView,
    "probabilities": ProbabilitiesView,
    "surprise": SurpriseView,
}

# The kinds of views that have a name of their own; of others a dispatcher must be told.
NAMED_KINDS = {"hidden": "vectors", "counts": "counts", "surprise": "surprise"}


def _mixed(weights: Tensor, table: Tensor) -> Float[Tensor, "... number"]:
    """The rows of a table ``(K+1, ·)``, or of each prompt's own ``(N, K+1, ·)``, in the shares ``(N, K+1)``."""
    return (weights.unsqueeze(-2) @ table).squeeze(-2)


def length_factor(lengths: Float[Tensor, " prompt"], lt: Tensor) -> Float[Tensor, "*draws prompt"]:
    """Noise variance at T tokens relative to 50 tokens, ``(1 + 20 lt/T) / (1 + .4 lt)``; 1 where T is 0, unknown."""
    known = (1 + 20 * lt / lengths.clamp(min=1.0)) / (1 + 0.4 * lt)
    return torch.where(lengths > 0, known, torch.ones_like(known))


def off_zero(probabilities: Tensor) -> Tensor:
    """Probabilities ``(·, C)`` moved a little to the uniform ones, so that all are positive."""
    width = probabilities.shape[-1]
    return (probabilities + PROBABILITY_FLOOR) / (1 + width * PROBABILITY_FLOOR)


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
