"""The generative program (Pyro): expert weights of each prompt, and the evidence they explain.

Every prompt is an *admixture*: its pooled features lie near the convex combination of the experts' means, so the
weights ``w`` are a mixed membership and not a class. A broad component ``base``, last, explains prompts that no expert
does, and those that are known to be its own::

    pi ~ Dirichlet([3]*K + [1.5])          kappa ~ LogNormal(0, .7)
    plate experts:  the globals of each view
    plate prompts:  w ~ Dirichlet(kappa * (.95*pi + .05/(K+1)));  each view given w;  label ~ Categorical(w) where
    observed

The views are in ``program.views``. ``temper`` τ is part of the program: it multiplies the noise variance of
vectors and divides the concentration of counts, because views are not quite independent given ``w``. With families of
experts both Dirichlets become trees (``program.dirichlet_tree``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from bayes_dispatch.dispatcher.program.dirichlet_tree import DirichletTree, family_sums
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View

__all__ = ["MOSTLY", "SIZES", "DispatchModel", "floored", "label_informed_start"]

WEIGHT_FLOOR = 1e-6  # of w inside the likelihoods: keeps scales and concentrations off zero
PRIOR = (3.0, 1.5)  # concentration of pi for an expert, and for base
MOSTLY = 0.6  # of a prompt's weight on an expert: above it, the prompt is taken for one of the expert's
SIZES = (0.5, 0.35, 0.15)  # that one, two or three components share a prompt


@dataclass(frozen=True)
class DispatchModel:
    """The program for K experts and some views; calling it on prompts is the Pyro model that SVI and NUTS take.

    Args:
        n_experts: K, without base.
        views: the kinds of evidence.
        batch_size: prompts in each step's plate; all by default.
        prior: K+1 concentrations of ``pi``, base last; by default 3 for experts and 1.5 for base.
        families: family of each expert, numbered from 0; none by default. Base is a family of its own.
        sizes: probabilities that one, two or three components share a prompt to be served.
    """

    n_experts: int
    views: tuple[View, ...]
    batch_size: int | None = None
    prior: tuple[float, ...] | None = None
    families: tuple[int, ...] | None = None
    sizes: tuple[float, ...] = SIZES

    @property
    def tree(self) -> tuple[int, ...] | None:
        """Family of each component, base last in one of its own; ``None`` without families."""
        return None if self.families is None else (*self.families, max(self.families) + 1)

    def __call__(self, prompts: Prompts) -> None:
        self.sample_prompts(self.sample_globals(), prompts)

    def sample_globals(self) -> dict[str, Tensor]:
        """Draw every global: site → value; per-expert sites have K rows (base is fixed)."""
        kappa = dist.LogNormal(torch.tensor(0.0), 0.7)
        sites = {"pi": pyro.sample("pi", self.shares_prior()), "kappa": pyro.sample("kappa", kappa)}
        for view in self.views:
            sites |= view.sample(view.shared())
        with pyro.plate("experts", self.n_experts):
            for view in self.views:
                sites |= view.sample(view.experts())
        return sites

    def shares_prior(self) -> TorchDistributionMixin:
        """The prior of ``pi``; a family is as likely as an expert, whatever its size."""
        prior = self.prior_of_shares()
        if self.tree is None:
            return dist.Dirichlet(prior)
        tree, ones = torch.tensor(self.tree), torch.ones_like(prior)
        count = max(self.tree) + 1
        return DirichletTree(family_sums(prior, tree, count) / family_sums(ones, tree, count), prior, tree)

    def prior_of_shares(self) -> Float[Tensor, " weight"]:
        """``(K+1,)`` concentrations of ``pi``."""
        return torch.tensor(self.prior or (PRIOR[0],) * self.n_experts + PRIOR[1:], device="cpu")

    def sample_prompts(self, sites: Mapping[str, Tensor], prompts: Prompts, temper: Tensor | None = None) -> Tensor:
        """Draw the weights of prompts, and their evidence where it is not observed.

        Args:
            sites: globals, each of all prompts or, with ``N`` in front of its shape, of each.
            prompts: what is known of the prompts; rows of known mixture enter at their weights.
            temper: ``(N,)`` or scalar τ, 1 by default.

        Returns:
            ``(N, K+1)`` weights of the prompts in the plate.
        """
        with pyro.plate("prompts", len(prompts), subsample_size=self.batch_size) as rows:
            batch = prompts if self.batch_size is None or rows is None else prompts.select(rows)
            tau = torch.ones(len(batch)) if temper is None else torch.as_tensor(temper).expand(len(batch))
            weights = floored(self._sample_weights(sites, batch))
            if batch.labels is not None:
                label = dist.Categorical(probs=weights).mask(batch.labels >= 0)
                pyro.sample("labels", label, obs=batch.labels.clamp(min=0))
            for view in self.views:
                likelihood = view.likelihood(sites, weights, batch, tau).mask(~batch.missing[view.name])
                pyro.sample(view.name, likelihood, obs=batch.observed.get(view.name))
        return weights

    def _sample_weights(self, sites: Mapping[str, Tensor], prompts: Prompts) -> Float[Tensor, "... weight"]:
        """Draw the weights inside the plate of prompts, ``(N, K+1)``; known ones stay."""
        prior = self.weights_prior(sites).expand([len(prompts)])
        if prompts.known is None:
            return pyro.sample("w", prior)
        known = torch.isfinite(prompts.known[:, 0])
        drawn = pyro.sample("w", prior.mask(~known))
        return torch.where(known.unsqueeze(-1), prompts.known.nan_to_num(), drawn)

    def weights_prior(self, sites: Mapping[str, Tensor]) -> TorchDistributionMixin:
        """The prior of a prompt's weights, batch shape that of ``kappa``."""
        concentration = self.prior_concentration(sites)
        if self.tree is None:
            return dist.Dirichlet(concentration)
        tree, kappa = torch.tensor(self.tree), sites["kappa"].unsqueeze(-1)
        sums = family_sums(concentration, tree, max(self.tree) + 1)
        return DirichletTree(sums, kappa * concentration / sums[..., tree], tree)

    def prior_concentration(self, sites: Mapping[str, Tensor]) -> Tensor:
        """``(K+1,)`` or ``(N, K+1)`` concentration of the weights' prior; the floor keeps its share as K grows."""
        return sites["kappa"].unsqueeze(-1) * self.label_shares(sites["pi"])

    def label_shares(self, shares: Any) -> Any:
        """``(·, K+1)`` chance of each label under shares ``pi``, a tensor or an array: these with their floor."""
        return 0.95 * shares + 0.05 / (self.n_experts + 1)

    def log_likelihood(
        self, sites: Mapping[str, Tensor], weights: Tensor, prompts: Prompts, temper: Tensor | float = 1.0
    ) -> dict[str, Tensor]:
        """By view the log density of its observed evidence at given weights, 0 where it is missing.

        Args:
            sites: globals.
            weights: ``(·, N, K+1)``, or ``(·, 1, K+1)`` for all prompts.
            prompts: N prompts, every view observed.
            temper: ``(N,)`` or scalar τ.

        Returns:
            view → ``(·, N)`` nats.
        """
        tau = torch.as_tensor(temper, dtype=weights.dtype).expand(len(prompts))
        values = {}
        for view in self.views:
            density = view.likelihood(sites, floored(weights), prompts, tau).log_prob(prompts.observed[view.name])
            values[view.name] = density.masked_fill(prompts.missing[view.name], 0.0)
        return values


def label_informed_start(model: DispatchModel, prompts: Prompts) -> dict[str, Tensor]:
    """Values of the globals to start SVI from: moments of the prompts of each expert, by label or known weight.

    Experts that no prompt is known of start at clusters of the others, found beside the known experts' means.
    """
    count = model.n_experts
    shares = torch.zeros(len(prompts), count + 1)
    if prompts.labels is not None:
        rows = prompts.labels >= 0
        shares[rows, prompts.labels[rows]] = 1.0
    if prompts.known is not None:
        rows = torch.isfinite(prompts.known[:, 0])
        shares[rows] = prompts.known[rows]
    unknown = shares.sum(-1) == 0
    shares = torch.where(shares > MOSTLY, shares, torch.zeros(()))[:, :count]
    if (shares.sum(0) == 0).any():
        shares = shares + _clusters(model, prompts, shares, unknown if unknown.any() else ~unknown)
    start = {"pi": torch.full((count + 1,), 1.0 / (count + 1)), "kappa": torch.tensor(0.5)}
    for view in model.views:
        present = (~prompts.missing[view.name]).float().unsqueeze(-1)
        start |= view.start(prompts.observed[view.name], shares * present + 1e-6)
    return start


def _clusters(model: DispatchModel, prompts: Prompts, shares: Tensor, rows: Tensor) -> Tensor:
    """Shares ``(N, K)`` of prompts at ``rows`` in clusters for the experts that have none, by k-means.

    Its start is the means of the known experts, and prompts as far as can be from all centres so far.
    """
    columns = [
        (values / values.sum(-1, keepdim=True).clamp(min=1.0)).sqrt() if view.kind == "counts" else values
        for view in model.views
        for values in [prompts.observed[view.name]]
    ]
    joined = torch.cat(columns, -1)
    points = ((joined - joined.mean(0)) / joined.std(0).clamp(min=1e-6)).double().numpy()
    empty = (shares.sum(0) == 0).numpy()
    mass = shares.double().numpy()
    centers = (mass.T @ points) / np.maximum(mass.sum(0), 1e-9)[:, None]
    candidates = points[rows.numpy()]
    far = np.full(len(candidates), np.inf)
    for known in centers[~empty]:
        far = np.minimum(far, np.square(candidates - known).sum(1))
    for expert in np.flatnonzero(empty):
        centers[expert] = candidates[far.argmax()] if np.isfinite(far).all() else candidates[0]
        far = np.minimum(far, np.square(candidates - centers[expert]).sum(1))
    out = torch.zeros_like(shares)
    if len(np.unique(candidates, axis=0)) < len(centers):  # fewer prompts than experts: each stands for some
        nearest = np.arange(len(centers)) % len(candidates)
        out[rows.nonzero().squeeze(-1)[nearest[empty]], torch.from_numpy(np.flatnonzero(empty))] = 1.0
        return out
    from sklearn.cluster import KMeans  # slow to import, and for fits alone

    found = KMeans(len(centers), init=centers, n_init=1, random_state=0).fit_predict(candidates)
    out[rows.nonzero().squeeze(-1), torch.from_numpy(found).long()] = 1.0
    return out * torch.from_numpy(empty).to(out)


def floored(weights: Float[Tensor, "... weight"]) -> Float[Tensor, "... weight"]:
    """The weights that the likelihoods are of: none below about ``WEIGHT_FLOOR``."""
    raised = weights + WEIGHT_FLOOR
    return raised / raised.sum(-1, keepdim=True)
