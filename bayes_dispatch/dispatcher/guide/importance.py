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
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.special import gammaln, logsumexp
from torch import Tensor

from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import RESOLUTION, DirichletMixtures, on_simplex
from bayes_dispatch.dispatcher.program.generative import FLOOR, DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View

__all__ = ["ImportanceSampler", "Table", "Weighted", "vertex_densities"]

GRID = 8  # precisions of the prior
MEMORY = 2**22  # numbers at a time


@dataclass(frozen=True, eq=False)
class Weighted:
    """Weighted proposals of N prompts.

    Args:
        proposals: ``(N, P, K+1)``.
        log_ratios: ``(N, P)`` log density of the fitted program, evidence included, over that of the proposals.
    """

    proposals: np.ndarray
    log_ratios: np.ndarray

    @property
    def log_evidence(self) -> Float[np.ndarray, " prompt"]:
        """``(N,)`` log density of the evidence under the fitted program, in nats."""
        return logsumexp(self.log_ratios, axis=1) - math.log(self.log_ratios.shape[1])

    @property
    def log_weights(self) -> Float[np.ndarray, "prompt proposal"]:
        """``(N, P)`` Pareto-smoothed, normalised."""
        return self._smoothed[0]

    @property
    def k_hat(self) -> Float[np.ndarray, " prompt"]:
        """``(N,)`` shape of the ratios' tail; above .7 the weights are not to be trusted."""
        return self._smoothed[1]

    def draw(
        self, draws: int, generators: Sequence[np.random.Generator]
    ) -> tuple[Float[np.ndarray, "draw prompt weight"], Float[np.ndarray, "draw prompt"]]:
        """Equal draws by systematic resampling, in random order, and the log weight of each as a proposal."""
        count, _, width = self.proposals.shape
        drawn, weights = np.empty((draws, count, width)), np.empty((draws, count))
        edges = np.exp(self.log_weights).cumsum(1)[:, :-1]
        for n, random in enumerate(generators):
            points = (np.arange(draws) + random.random()) / draws
            chosen = random.permutation(np.searchsorted(edges[n], points))
            drawn[:, n], weights[:, n] = self.proposals[n, chosen], self.log_weights[n, chosen]
        return drawn, weights

    @cached_property
    def _smoothed(self) -> tuple[np.ndarray, np.ndarray]:
        from bayes_dispatch.dispatcher.arviz_data import pareto_smoothed  # arviz takes a second or two to import

        return pareto_smoothed(self.log_ratios)


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
    _tables: list[Table] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tables", Table.of_views(self.model.views, self.sites, self.temper))

    def __call__(
        self,
        mixtures: DirichletMixtures,
        prompts: Prompts,
        shares: Float[np.ndarray, " weight"],
        proposals: int,
        generators: Sequence[np.random.Generator],
    ) -> Weighted:
        """Draw and weigh proposals.

        Args:
            mixtures: the guide's answer for N prompts.
            prompts: their evidence, float64.
            shares: ``(K+1,)`` ``pi`` of the prior.
            proposals: P for each prompt.
            generators: N; a prompt's proposals depend on its own only.
        """
        columns = sum(table.mixed.shape[-1] for table in self._tables)
        step = max(1, MEMORY // (proposals * (self.model.n_experts + 1 + columns)))
        parts = [
            self._weigh(
                DirichletMixtures(mixtures.shares[rows], mixtures.concentration[rows]),
                prompts if len(prompts) <= step else prompts.select(torch.from_numpy(rows)),
                shares,
                proposals,
                [generators[row] for row in rows],
            )
            for rows in np.array_split(np.arange(len(prompts)), max(1, -(-len(prompts) // step)))
        ]
        return Weighted(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _weigh(
        self,
        mixtures: DirichletMixtures,
        prompts: Prompts,
        shares: np.ndarray,
        proposals: int,
        generators: Sequence[np.random.Generator],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Proposals ``(N, P, K+1)`` and their log ratios ``(N, P)``.

        Both densities count weights below ``RESOLUTION`` by their probability to be there: the likelihood is flat in
        them, and the ratio of their densities has no bound. They are then drawn anew from the prior (not with
        families).
        """
        weights = mixtures.draw(proposals, generators).swapaxes(0, 1)
        ratios, prior = self._ratios(mixtures, weights, shares)
        if self.model.tree is None:
            concentration = self._kappas[:, None] * self.model.label_shares(shares)
            weights = _redraw_small(weights, weights < RESOLUTION, prior, concentration, generators)
        # The proposals of a prompt go through the draws of the globals in turn, from one that its generator chooses.
        first = np.array([random.integers(len(self.sites)) for random in generators])
        ratios += self._log_likelihood(prompts, weights, (first[:, None] + np.arange(proposals)) % len(self.sites))
        return weights, ratios

    def prior_ratios(
        self,
        mixtures: DirichletMixtures,
        weights: Float[np.ndarray, "prompt draw weight"],
        shares: Float[np.ndarray, " weight"],
    ) -> Float[np.ndarray, "prompt draw"]:
        """``(N, S)`` log density of weights under the prior over that under the guide's answer.

        With these, draws of the guide's stand for the prior: what the evidence has said of them is taken back.
        Resampled draws do with these less their log weights.

        Args:
            mixtures: the guide's answer for N prompts.
            weights: ``(N, S, K+1)``.
            shares: ``(K+1,)`` ``pi`` of the prior.
        """
        return self._ratios(mixtures, weights, shares)[0]

    @property
    def _kappas(self) -> Float[np.ndarray, " precision"]:
        low, high = map(math.log, self.kappa)
        return np.exp(low + (high - low) * (np.arange(GRID) + 0.5) / GRID)

    def _ratios(
        self, mixtures: DirichletMixtures, weights: np.ndarray, shares: np.ndarray
    ) -> tuple[Float[np.ndarray, "prompt draw"], Float[np.ndarray, "prompt draw precision"]]:
        """The ratios, and the log densities of the prior at each precision."""
        small = weights < RESOLUTION
        logs = np.log(np.maximum(weights, RESOLUTION))
        with np.errstate(divide="ignore"):
            mixture = np.log(mixtures.shares)[:, None] + _log_dirichlet(mixtures.concentration, logs, small)
        prior = _log_prior(self.model, self._kappas, self.model.label_shares(shares), weights, logs, small)
        return logsumexp(prior, axis=-1) - math.log(GRID) - logsumexp(mixture, axis=-1), prior

    def _log_likelihood(self, prompts: Prompts, weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """``(N, P)`` log density of the evidence given weights ``(N, P, K+1)``, each under its chosen globals."""
        order = np.argsort(chosen, axis=None, kind="stable")  # proposals of the same globals side by side
        edges = np.searchsorted(chosen.ravel()[order], np.arange(len(self.sites) + 1))
        raised = weights.reshape(-1, weights.shape[-1])[order] + FLOOR
        raised /= raised.sum(-1, keepdims=True)
        rows, globals_ = order // weights.shape[1], chosen.ravel()[order]
        total = np.zeros(len(order))
        for table in self._tables:
            mixed = np.empty((len(order), table.mixed.shape[-1]))
            for g, (start, end) in enumerate(pairwise(edges)):
                mixed[start:end] = raised[start:end] @ table.mixed[g]
            density = table.log_density(prompts, rows, mixed, globals_)
            total += np.where(prompts.missing[table.view.name].numpy()[rows], 0.0, density)
        out = np.empty(len(order))
        out[order] = total
        return out.reshape(chosen.shape)


def vertex_densities(tables: Sequence[Table], prompts: Prompts, width: int) -> Float[np.ndarray, "prompt weight"]:
    """``(N, K+1)`` log density of the evidence at each of ``width`` vertices, nats, under the first of the globals.

    How well each expert alone, and base, would explain prompts: what the guide's network sees beside the evidence.
    """
    out = np.zeros((len(prompts), width))
    for table in tables:
        step = max(1, MEMORY // (width * table.mixed.shape[-1]))
        present = np.flatnonzero(~prompts.missing[table.view.name].numpy())
        for start in range(0, len(present), step):
            rows = present[start : start + step]
            out[rows] += table.log_density(prompts, rows[:, None], table.mixed[0], np.zeros((1, 1), np.int64))
    return out


@dataclass(frozen=True, eq=False)
class Table:
    """The globals of a view with base appended, for G draws.

    Args:
        view: the view.
        mixed: ``(G, K+1, ·)`` what weights mix: means and then variances, or the chances of classes.
        strength: ``(G,)`` how fast noise falls with length, or how strongly classes speak.
        temper: noise temper τ.
    """

    view: View
    mixed: np.ndarray
    strength: np.ndarray
    temper: float

    @classmethod
    def of_views(cls, views: Sequence[View], sites: Sequence[Mapping[str, Tensor]], temper: float) -> list[Table]:
        """A table for each view under G draws of the globals."""
        doubles = [{name: value.double() for name, value in each.items()} for each in sites]
        tables = []
        for view in views:
            columns = [[view.with_base(each, parameter).numpy() for each in doubles] for parameter in view.constants]
            strength = np.ones(len(sites))
            if view.kind != "surprise":
                name = view.site("lt" if view.kind == "vectors" else "conc")
                strength = np.stack([each[name].numpy() for each in doubles])
            strength = strength / temper if view.kind in ("counts", "probabilities") else strength
            tables.append(cls(view, np.concatenate([np.stack(column) for column in columns], -1), strength, temper))
        return tables

    def log_density(
        self, prompts: Prompts, rows: np.ndarray, mixed: Float[np.ndarray, "... number"], chosen: np.ndarray
    ) -> Float[np.ndarray, "..."]:
        """Log density of the evidence of prompts at ``rows`` for mixed globals, under the chosen strengths.

        Rows, chosen globals, and mixed ones but for their last dimension, are broadcast.
        """
        values = prompts.observed[self.view.name].double().numpy()[rows]
        strength = self.strength[chosen]
        if self.view.kind in ("vectors", "surprise"):
            means, variances = np.split(mixed, 2, axis=-1)
            factor = np.full(np.broadcast_shapes(rows.shape, chosen.shape), self.temper)
            if self.view.kind == "vectors":
                lengths = prompts.lengths.double().numpy()[rows]
                known = (1 + 20 * strength / np.maximum(lengths, 1.0)) / (1 + 0.4 * strength)
                factor = factor * np.where(lengths > 0, known, 1.0)
            scaled = variances * factor[..., None]
            tails = 3.5 * np.log1p((values - means) ** 2 / (6.0 * scaled)) + 0.5 * np.log(scaled)
            constant = math.lgamma(3.5) - math.lgamma(3.0) - 0.5 * math.log(6.0 * math.pi)
            return values.shape[-1] * constant - tails.sum(-1)
        alpha = strength[..., None] * mixed + 1e-3
        if self.view.kind == "probabilities":
            return gammaln(alpha.sum(-1)) + ((alpha - 1) * np.log(values) - gammaln(alpha)).sum(-1)
        total = values.sum(-1)
        constant = gammaln(total + 1) - gammaln(values + 1).sum(-1)
        rising = (gammaln(alpha + values) - gammaln(alpha)).sum(-1)
        return constant + rising + gammaln(alpha.sum(-1)) - gammaln(alpha.sum(-1) + total)


def _log_dirichlet(
    alpha: Float[np.ndarray, "*some part weight"],
    logs: Float[np.ndarray, "prompt proposal weight"],
    small: Bool[np.ndarray, "prompt proposal weight"],
) -> Float[np.ndarray, "prompt proposal part"]:
    """Log densities of Dirichlets, small weights counting by their probability to be below ``RESOLUTION``."""
    parts = logs @ (alpha - 1).swapaxes(-1, -2) - small @ np.log(alpha).swapaxes(-1, -2)
    constant = gammaln(alpha.sum(-1)) - gammaln(alpha).sum(-1)
    return parts + (constant if alpha.ndim == 2 else constant[:, None])


def _log_prior(
    model: DispatchModel,
    kappas: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    logs: np.ndarray,
    small: np.ndarray,
) -> Float[np.ndarray, "prompt proposal precision"]:
    """Log density of the prior at J precisions; a Dirichlet tree's where the program has families."""
    if model.tree is None:
        return _log_dirichlet(kappas[:, None] * labels, logs, small)
    member = np.eye(max(model.tree) + 1)[list(model.tree)]  # (K+1, F)
    top = kappas[:, None] * (labels @ member)  # (J, F)
    leaves = kappas[:, None] * (labels / (member @ (labels @ member)))
    inside = leaves @ member
    sums = weights @ member  # (N, P, F)
    out = _log_dirichlet(leaves, logs, small) - gammaln(leaves.sum(-1)) + gammaln(top.sum(-1))
    out += (gammaln(inside) - gammaln(top)).sum(-1) + np.log(np.maximum(sums, RESOLUTION)) @ (top - inside).T
    # Where all members of a family are small they are as probable as the family is.
    return out + (sums < RESOLUTION) @ ((np.log(leaves) + gammaln(leaves)) @ member - gammaln(inside) - np.log(top)).T


def _redraw_small(
    weights: np.ndarray,
    small: np.ndarray,
    prior: Float[np.ndarray, "prompt proposal precision"],
    concentration: Float[np.ndarray, "precision weight"],
    generators: Sequence[np.random.Generator],
) -> Float[np.ndarray, "prompt proposal weight"]:
    """Weights below ``RESOLUTION`` drawn from the prior, at a precision drawn by its log density."""
    count, proposals, width = weights.shape
    chance = np.exp(prior - prior.max(-1, keepdims=True)).cumsum(-1)
    uniform = np.array([random.random(proposals) for random in generators]).reshape(count, proposals, 1)
    precision = (uniform * chance[..., -1:] >= chance[..., :-1]).sum(-1)
    falls = np.array([random.standard_exponential((proposals, width)) for random in generators])
    drawn = np.where(small, RESOLUTION * np.exp(-falls.reshape(weights.shape) / concentration[precision]), 0.0)
    rest = np.where(small, 0.0, weights)
    left = np.maximum(rest.sum(-1, keepdims=True), 1e-300)  # 0 where a thousand experts or more have small weights
    return on_simplex(rest * ((1 - drawn.sum(-1, keepdims=True)) / left) + drawn)
