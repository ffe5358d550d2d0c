"""The generative program (Pyro): expert weights of each prompt, and the evidence they explain.

Every prompt is an *admixture*: its pooled features lie near the convex combination of the experts' means, so the
weights ``w`` are a mixed membership and not a class. A fixed broad component ``base``, last, explains prompts that no
expert does::

    pi ~ Dirichlet([3]*K + [1.5])          kappa ~ LogNormal(0, .7)
    plate experts:  the globals of each view
    plate prompts:  w ~ Dirichlet(kappa * (.95*pi + .05/(K+1)));  each view given w;  label ~ Categorical(w) where
    observed

A view is one class below: what it draws for each expert, what base has instead, and the distribution of its evidence
given ``w``. Adding a view is adding a class. ``temper`` τ is part of the program: it multiplies the noise variance of
the hidden view and divides the concentration of the counts, because views are not quite independent given ``w``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

__all__ = ["CountsView", "DispatchModel", "HiddenView", "Prompts", "View", "label_informed_start", "length_factor"]

FLOOR = 1e-6  # of w inside the likelihoods: keeps scales and concentrations off zero


@dataclass(frozen=True, eq=False)
class Prompts:
    """Evidence of N prompts as tensors, masked where missing.

    Args:
        lengths: ``(N,)`` tokens, 0 where unknown.
        totals: ``(N,)`` sum of the counts of each prompt (0 where missing).
        missing: by view ``(N,)`` bool.
        observed: by view ``(N, ·)``; a view that is not here is drawn from the program.
        labels: ``(N,)`` expert index, −1 where unknown; ``None`` for none.
        known: ``(N, K+1)`` known weights, NaN rows where unknown; ``None`` for none.
    """

    lengths: Float[Tensor, " prompt"]
    totals: Float[Tensor, " prompt"]
    missing: Mapping[str, Bool[Tensor, " prompt"]]
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Int[Tensor, " prompt"] | None = None
    known: Float[Tensor, "prompt weight"] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, dtype: torch.dtype) -> Prompts:
        """The same evidence in another floating-point type, without labels and known weights."""
        observed = {name: values.to(dtype) for name, values in self.observed.items()}
        return Prompts(self.lengths.to(dtype), self.totals.to(dtype), self.missing, observed)

    def blank(self) -> Prompts:
        """The same lengths, totals and missing views, nothing observed."""
        return Prompts(self.lengths, self.totals, self.missing)

    def select(self, rows: Tensor) -> Prompts:
        """The prompts at ``rows`` (integer or bool tensor)."""
        return Prompts(
            self.lengths[rows],
            self.totals[rows],
            {name: mask[rows] for name, mask in self.missing.items()},
            {name: values[rows] for name, values in self.observed.items()},
            None if self.labels is None else self.labels[rows],
            None if self.known is None else self.known[rows],
        )


@runtime_checkable
class View(Protocol):
    """One kind of evidence: its name, its globals, and its distribution given the weights."""

    @property
    def name(self) -> str:
        """The key of its evidence and of its Pyro site."""

    @property
    def width(self) -> int:
        """Numbers in each prompt's evidence."""

    def sample_experts(self) -> dict[str, Tensor]:
        """Draw the globals of each expert, inside the plate of experts: site → ``(K, ·)``."""

    def sample_shared(self) -> dict[str, Tensor]:
        """Draw the globals that all experts share: site → scalar."""

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """Values of the globals to start SVI from, given evidence ``(N, width)`` and the prompts' shares ``(N, K)``."""

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        """The distribution ``(N,) | (width,)`` of the view's evidence given weights ``(N, K+1)``."""


@dataclass(frozen=True)
class HiddenView:
    """``StudentT(6, w @ M, sqrt(τ · length_factor · w @ s2))`` for projected hidden states ``(N, D)``.

    Per expert ``M ~ Normal(0, 1)[D]``, ``s2 ~ LogNormal(-3, 1)[D]``; base has ``M = 0, s2 = 1``; shared
    ``lt ~ LogNormal(2.5, 1)`` tells how fast noise falls with length.
    """

    width: int
    name: str = "hidden"

    def sample_experts(self) -> dict[str, Tensor]:
        zeros = torch.zeros(self.width)
        return {
            "M": pyro.sample("M", dist.Normal(zeros, 1.0).to_event(1)),
            "s2": pyro.sample("s2", dist.LogNormal(zeros - 3.0, 1.0).to_event(1)),
        }

    def sample_shared(self) -> dict[str, Tensor]:
        return {"lt": pyro.sample("lt", dist.LogNormal(torch.tensor(2.5), 1.0))}

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        total = shares.sum(0).unsqueeze(-1)
        means = shares.T @ values / total  # (K, D)
        variances = shares.T @ values.square() / total - means.square()
        return {"M": means, "s2": variances.clamp(min=5e-3, max=1.0), "lt": torch.tensor(12.0)}

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        means = _append(sites["M"], torch.zeros(self.width))  # (K+1, D)
        variances = _append(sites["s2"], torch.ones(self.width))
        noise = (weights @ variances) * (temper * length_factor(prompts.lengths, sites["lt"])).unsqueeze(-1)  # (N, D)
        return dist.StudentT(6.0, weights @ means, noise.sqrt()).to_event(1)


@dataclass(frozen=True)
class CountsView:
    """``DirichletMultinomial(conc/τ · (w @ Phi) + 1e-3, T)`` for token-class counts ``(N, C)``.

    Per expert ``Phi ~ Dirichlet(.7)[C]``; base is uniform; shared ``conc ~ LogNormal(3, 1)``.
    """

    width: int
    name: str = "counts"

    def sample_experts(self) -> dict[str, Tensor]:
        return {"Phi": pyro.sample("Phi", dist.Dirichlet(torch.full((self.width,), 0.7)))}

    def sample_shared(self) -> dict[str, Tensor]:
        return {"conc": pyro.sample("conc", dist.LogNormal(torch.tensor(3.0), 1.0))}

    def start(self, values: Tensor, shares: Tensor) -> dict[str, Tensor]:
        counts = shares.T @ values + 1.0  # (K, C)
        return {"Phi": counts / counts.sum(-1, keepdim=True), "conc": torch.tensor(20.0)}

    def likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor
    ) -> TorchDistributionMixin:
        classes = _append(sites["Phi"], torch.full((self.width,), 1.0 / self.width))  # (K+1, C)
        strength = (sites["conc"] / temper).unsqueeze(-1)
        return _RaggedDirichletMultinomial(strength * (weights @ classes) + 1e-3, prompts.totals)


@dataclass(frozen=True)
class DispatchModel:
    """The program for K experts and some views; calling it on prompts is the Pyro model that SVI and NUTS take.

    Args:
        n_experts: K, without base.
        views: the kinds of evidence.
        batch_size: prompts in each step's plate; all by default.
    """

    n_experts: int
    views: tuple[View, ...]
    batch_size: int | None = None

    def __call__(self, prompts: Prompts) -> None:
        self.sample_prompts(self.sample_globals(), prompts)

    def sample_globals(self) -> dict[str, Tensor]:
        """Draw every global: site → value; per-expert sites have K rows (base is fixed)."""
        prior = torch.tensor([3.0] * self.n_experts + [1.5])
        sites = {
            "pi": pyro.sample("pi", dist.Dirichlet(prior)),
            "kappa": pyro.sample("kappa", dist.LogNormal(torch.tensor(0.0), 0.7)),
        }
        for view in self.views:
            sites |= view.sample_shared()
        with pyro.plate("experts", self.n_experts):
            for view in self.views:
                sites |= view.sample_experts()
        return sites

    def sample_prompts(self, sites: Mapping[str, Tensor], prompts: Prompts, temper: Tensor | None = None) -> Tensor:
        """Draw the weights of prompts, and their evidence where it is not observed.

        Args:
            sites: globals; ``kappa`` may be a scalar, or ``(N,)`` for a precision per prompt.
            prompts: what is known of the prompts; rows of known mixture enter at their weights.
            temper: ``(N,)`` or scalar τ, 1 by default.

        Returns:
            ``(N, K+1)`` weights of the prompts in the plate.
        """
        with pyro.plate("prompts", len(prompts), subsample_size=self.batch_size) as rows:
            batch = prompts if self.batch_size is None or rows is None else prompts.select(rows)
            tau = torch.ones(len(batch)) if temper is None else torch.as_tensor(temper).expand(len(batch))
            weights = self._sample_weights(sites, batch)
            if batch.labels is not None:
                label = dist.Categorical(probs=weights).mask(batch.labels >= 0)
                pyro.sample("labels", label, obs=batch.labels.clamp(min=0))
            for view in self.views:
                likelihood = view.likelihood(sites, weights, batch, tau).mask(~batch.missing[view.name])
                pyro.sample(view.name, likelihood, obs=batch.observed.get(view.name))
        return weights

    def prior_concentration(self, sites: Mapping[str, Tensor]) -> Tensor:
        """``(K+1,)`` or ``(N, K+1)`` concentration of the weights' prior; the floor keeps its share as K grows."""
        floored = 0.95 * sites["pi"] + 0.05 / (self.n_experts + 1)
        return sites["kappa"].unsqueeze(-1) * floored

    def _sample_weights(self, sites: Mapping[str, Tensor], prompts: Prompts) -> Tensor:
        prior = dist.Dirichlet(self.prior_concentration(sites)).expand([len(prompts)])
        if prompts.known is None:
            weights = pyro.sample("w", prior)
        else:
            known = torch.isfinite(prompts.known[:, 0])
            drawn = pyro.sample("w", prior.mask(~known))
            weights = torch.where(known.unsqueeze(-1), prompts.known.nan_to_num(), drawn)
        floored = weights + FLOOR
        return floored / floored.sum(-1, keepdim=True)


def length_factor(lengths: Float[Tensor, " prompt"], lt: Tensor) -> Float[Tensor, " prompt"]:
    """Noise variance at T tokens relative to 50 tokens, ``(1 + 20 lt/T) / (1 + .4 lt)``; 1 where T is 0, unknown."""
    known = (1 + 20 * lt / lengths.clamp(min=1.0)) / (1 + 0.4 * lt)
    return torch.where(lengths > 0, known, torch.ones_like(known))


def label_informed_start(model: DispatchModel, prompts: Prompts) -> dict[str, Tensor]:
    """Values of the globals to start SVI from: moments of the prompts of each expert, by label or known weight.

    Experts that no prompt is known of start at distinct prompts, so that they can part.
    """
    count = model.n_experts
    shares = torch.zeros(len(prompts), count + 1)
    if prompts.labels is not None:
        rows = prompts.labels >= 0
        shares[rows, prompts.labels[rows]] = 1.0
    if prompts.known is not None:
        rows = torch.isfinite(prompts.known[:, 0])
        shares[rows] = prompts.known[rows]
    shares = torch.where(shares > 0.6, shares, torch.zeros(()))[:, :count]  # prompts that are mostly one expert's
    spread = torch.linspace(0, len(prompts) - 1, count).long()
    empty = shares.sum(0) == 0
    shares[spread[empty], empty.nonzero().squeeze(-1)] = 1.0
    start = {"pi": torch.full((count + 1,), 1.0 / (count + 1)), "kappa": torch.tensor(0.5)}
    for view in model.views:
        present = (~prompts.missing[view.name]).float().unsqueeze(-1)
        start |= view.start(prompts.observed[view.name], shares * present + 1e-6)
    return start


def _append(experts: Tensor, base: Tensor) -> Tensor:
    return torch.cat([experts, base.to(experts).unsqueeze(0)])


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
