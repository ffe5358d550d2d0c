"""Importance sampling of the weights: from the guide's answer to the posterior of the fitted program.

Proposals come from the guide's mixture of Dirichlets, each beside one draw of the globals, so that their uncertainty is
carried through: the weights of the proposals are those of the joint posterior. The prior's precision is summed out over
a grid. Pareto smoothing (PSIS; Vehtari et al. 2024) steadies the weights, and its k-hat says, for each prompt, whether
they can be trusted (below .7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import NO_FAMILIES, DirichletMixtures
from bayes_dispatch.dispatcher.guide.importance_kernels import (
    counts_at_vertices,
    counts_density,
    draw_weights,
    pareto_smooth,
    probabilities_at_vertices,
    probabilities_density,
    resample,
    vectors_at_vertices,
    vectors_density,
)
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View, site

__all__ = ["ImportanceSampler", "VertexDensities", "Weighted", "draw_resampled", "pareto_smoothed"]

GRID = 8  # precisions of the prior
MEMORY = 2**22  # numbers of proposals at a time


class Weighted(NamedTuple):
    """Weighted proposals of N prompts.

    Attributes:
        proposals: ``(N, P, K+1)``.
        log_weights: ``(N, P)`` Pareto-smoothed, normalised.
        k_hat: ``(N,)`` shape of the ratios' tail; above .7 the weights are not to be trusted.
        log_evidence: ``(N,)`` log density of the evidence under the fitted program, in nats.
    """

    proposals: np.ndarray
    log_weights: np.ndarray
    k_hat: np.ndarray
    log_evidence: np.ndarray


@dataclass(frozen=True, eq=False)
class ImportanceSampler:
    """The fitted program's densities, tabulated for G draws of its globals.

    Args:
        model: the program.
        sites: G draws of its globals.
        temper: noise temper τ.
        kappa: range of the prior's precision, log-uniform.
    """

    model: DispatchModel
    sites: Sequence[Mapping[str, Tensor]]
    temper: float
    kappa: tuple[float, float]
    _tables: dict[str, dict[str, np.ndarray]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tables = {view.name: _tabulate(view, self.sites, self.temper) for view in self.model.views}
        object.__setattr__(self, "_tables", tables)

    def __call__(
        self,
        mixtures: DirichletMixtures,
        prompts: Prompts,
        shares: Float[np.ndarray, " weight"],
        proposals: int,
        keys: Shaped[np.ndarray, " prompt"],
    ) -> Weighted:
        """Draw and weigh proposals.

        Args:
            mixtures: the guide's answer for N prompts.
            prompts: their evidence, float64.
            shares: ``(K+1,)`` ``pi`` of the prior.
            proposals: P for each prompt.
            keys: ``(N,)`` seeds; a prompt's proposals depend on its own only.

        Returns:
            The weighted proposals.
        """
        step = max(1, MEMORY // (proposals * (self.model.n_experts + 1)))
        parts = [
            self._weigh(
                DirichletMixtures(mixtures.shares[rows], mixtures.concentration[rows]),
                prompts if len(prompts) <= step else prompts.select(torch.from_numpy(rows)),
                shares,
                proposals,
                keys[rows],
            )
            for rows in np.array_split(np.arange(len(prompts)), max(1, -(-len(prompts) // step)))
        ]
        return (
            parts[0]
            if len(parts) == 1
            else Weighted(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        )

    def _weigh(
        self,
        mixtures: DirichletMixtures,
        prompts: Prompts,
        shares: np.ndarray,
        proposals: int,
        keys: np.ndarray,
    ) -> Weighted:
        count, width = len(prompts), self.model.n_experts + 1
        weights, ratios = np.empty((count, proposals, width)), np.empty((count, proposals))
        kappas = np.exp(_middle_points(math.log(self.kappa[0]), math.log(self.kappa[1]), GRID))
        prior, families, top = _prior(self.model, shares, kappas)
        draw_weights(keys, mixtures.shares, mixtures.concentration, kappas, prior, families, top, weights, ratios)
        # The proposals of a prompt go through the draws of the globals in turn, from one that its key chooses.
        chosen = (keys[:, None].astype(np.int64) + np.arange(proposals)) % len(self.sites)
        for view in self.model.views:
            self._add_density(view, prompts, weights, chosen, ratios)
        highest = ratios.max(1)
        log_evidence = highest + np.log(np.exp(ratios - highest[:, None]).mean(1))
        log_weights, k_hat = pareto_smoothed(ratios)
        return Weighted(weights, log_weights, k_hat, log_evidence)

    def _add_density(
        self, view: View, prompts: Prompts, weights: np.ndarray, chosen: np.ndarray, out: np.ndarray
    ) -> None:
        table, missing = self._tables[view.name], prompts.missing[view.name].numpy()
        values = prompts.observed[view.name].double()
        if view.kind in ("vectors", "surprise"):
            lengths, means, variances = _noise_lengths(view, prompts), table["means"], table["variances"]
            known = (values.numpy(), missing, lengths, means, variances, table["lt"])
            vectors_density(weights, chosen, *known, self.temper, out)
        elif view.kind == "counts":
            counts_density(weights, chosen, values.numpy(), missing, table["strengths"], table["classes"], out)
        else:
            probabilities_density(weights, chosen, values.numpy(), missing, table["strengths"], table["classes"], out)


def pareto_smoothed(
    ratios: Float[np.ndarray, "prompt proposal"],
) -> tuple[Float[np.ndarray, "prompt proposal"], Float[np.ndarray, " prompt"]]:
    """Pareto-smoothed normalised log weights for log importance ratios, and k-hat of each row."""
    log_weights, k_hat = ratios.copy(), np.empty(len(ratios))
    pareto_smooth(log_weights, k_hat)
    return log_weights, k_hat


def draw_resampled(
    weighted: Weighted, draws: int, keys: Shaped[np.ndarray, " prompt"]
) -> Float[np.ndarray, "draw prompt weight"]:
    """``(S, N, K+1)`` equally weighted draws, by systematic resampling, in random order."""
    count, _, width = weighted.proposals.shape
    drawn = np.empty((draws, count, width))
    resample(keys, weighted.proposals, weighted.log_weights, drawn)
    return drawn


@dataclass(frozen=True, eq=False)
class VertexDensities:
    """How well each expert alone, and base, would explain prompts: what the guide's network sees beside the evidence.

    Args:
        views: the program's.
        sites: globals, at one value.
    """

    views: Sequence[View]
    sites: Mapping[str, Tensor]
    _tables: dict[str, dict[str, np.ndarray]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tables = {view.name: _tabulate(view, [self.sites], 1.0) for view in self.views}
        object.__setattr__(self, "_tables", tables)

    def __call__(self, prompts: Prompts) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` log density of the evidence at each vertex, nats, up to a constant of the prompt; τ is 1."""
        out = np.zeros((len(prompts), len(self.sites["pi"])))
        for view in self.views:
            table, missing = self._tables[view.name], prompts.missing[view.name].numpy()
            values = prompts.observed[view.name].double().numpy()
            if view.kind in ("vectors", "surprise"):
                lengths, means, variances = _noise_lengths(view, prompts), table["means"][0], table["variances"][0]
                vectors_at_vertices(values, missing, lengths, means, variances, float(table["lt"][0]), out)
            else:
                add = counts_at_vertices if view.kind == "counts" else probabilities_at_vertices
                add(values, missing, float(table["strengths"][0]), table["classes"][0], out)
        return out


def _tabulate(view: View, sites: Sequence[Mapping[str, Tensor]], temper: float) -> dict[str, np.ndarray]:
    """The globals of a view with base appended, for G draws: ``(G, K+1, ·)`` and ``(G,)``."""
    bases = view.base()

    def stack(parameter: str) -> np.ndarray:
        name = site(view, parameter)
        values = np.stack([each[name].double().numpy() for each in sites])
        if name not in bases:
            return values
        base = np.broadcast_to(bases[name].double().numpy(), (len(values), 1, values.shape[-1]))
        return np.ascontiguousarray(np.concatenate([values, base], 1))

    if view.kind == "vectors":
        return {"means": stack("M"), "variances": stack("s2"), "lt": stack("lt")}
    if view.kind == "surprise":
        return {"means": stack("a"), "variances": stack("a2"), "lt": np.ones(len(sites))}
    return {"classes": stack("Phi"), "strengths": stack("conc") / temper}


def _noise_lengths(view: View, prompts: Prompts) -> Float[np.ndarray, " prompt"]:
    """The lengths that a view's noise depends on, 0 where on none."""
    return prompts.lengths.double().numpy() if view.kind == "vectors" else np.zeros(len(prompts))


def _prior(model: DispatchModel, shares: np.ndarray, kappas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prior's concentrations ``(J, K+1)`` at J precisions, families ``(K+1,)`` and their own ``(J, F)``."""
    labels = model.label_shares(shares)
    if model.tree is None:
        return kappas[:, None] * labels, *NO_FAMILIES
    families = np.array(model.tree)
    sums = np.bincount(families, labels)
    return kappas[:, None] * (labels / sums[families]), families, kappas[:, None] * sums


def _middle_points(low: float, high: float, count: int) -> np.ndarray:
    return low + (high - low) * (np.arange(count) + 0.5) / count
