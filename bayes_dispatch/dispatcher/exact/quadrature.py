"""Summing out the weights: which components share a prompt, and how much each of them has.

The sets of one, two and three components that matter are few, and on each the weights have at most two dimensions. So
the posterior is a sum over sets and over pieces of them, halved again where the mass is: no draw, no training, and
nothing to converge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from bayes_dispatch.dispatcher.arrays import on_simplex
from bayes_dispatch.dispatcher.exact.cells import Cells
from bayes_dispatch.dispatcher.exact.densities import ViewDensity
from bayes_dispatch.dispatcher.exact.supports import MOST, SupportPrior
from bayes_dispatch.dispatcher.program.observed import Prompts

__all__ = ["Quadrature"]

PAIRED, TRIPLED = 24, 10  # components that are tried in pairs, and in triples
ANCHORS = 8  # the likeliest alone, each of which is tried beside every other where there are more than ``PAIRED``
SPLIT = 64  # cells of a size that are split in a round, at most
FINEST = (1.0, 1 / 64, 1 / 16)  # length of the finest cells of one, two and three components
KEPT = 1024  # cells of a size, at most
TAIL = 1e-4  # share of a size's mass that may be left out where it has fewer
ROUNDING = 1e-9  # of probabilities
NEGLIGIBLE = 1e-12  # mass of a cell that is not split: where evidence is sharp, the centre of a coarse one says little

CORNER = np.eye(MOST)[:1].repeat(MOST, 0)  # of one component
INTERVAL = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
TRIANGLE = np.eye(MOST)


class _Pieces(NamedTuple):
    """Cells of one prompt: ``(G, M)`` supports, ``(G, M, M)`` corners, ``(G,)`` sizes, edges and log masses."""

    supports: np.ndarray
    corners: np.ndarray
    sizes: np.ndarray
    edges: np.ndarray
    prior: np.ndarray
    density: np.ndarray

    @property
    def mass(self) -> np.ndarray:
        return self.prior + self.density

    def take(self, rows: np.ndarray) -> _Pieces:
        return _Pieces(*(each[rows] for each in self))

    @classmethod
    def joined(cls, parts: Sequence[_Pieces]) -> _Pieces:
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Posteriors of prompts' weights under the fitted program.

    Args:
        densities: of its views.
        sizes: see :class:`SupportPrior`. tree: family of each component; ``None`` without families.
        rounds: of splitting; fewer are quicker, and coarser.
    """

    densities: tuple[ViewDensity, ...]
    sizes: tuple[float, ...]
    tree: tuple[int, ...] | None = None
    rounds: int = 3

    def at(self, temper: float) -> Quadrature:
        """The same at another noise temper."""
        return replace(self, densities=tuple(replace(each, temper=temper) for each in self.densities))

    def prior(self, shares: Float[np.ndarray, " weight"]) -> SupportPrior:
        """The prior of the weights under label shares ``(K+1,)``."""
        return SupportPrior(self.sizes, shares, self.tree)

    def __call__(self, prompts: Prompts, shares: Float[np.ndarray, " weight"]) -> Cells:
        """Posteriors of N prompts under a prior of label shares ``(K+1,)``."""
        prior = self.prior(shares)
        parts = [self._cells(prompts, row, prior) for row in range(len(prompts))]
        return Cells.concatenate(parts) if parts else _none(self.width)

    @property
    def width(self) -> int:
        """K+1."""
        return len(self.densities[0].columns)

    def log_density(self, prompts: Prompts, row: int, supports: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """``(G,)`` log density of a prompt's evidence where components ``supports (G, M)`` have ``weights (G, M)``."""
        total = np.zeros(len(supports))
        for density in self.densities:
            mixed = weights[:, :1] * density.columns[supports[:, 0]]
            for slot in range(1, weights.shape[1]):
                mixed += weights[:, slot, None] * density.columns[supports[:, slot]]
            total += density(prompts, row, mixed)
        return total

    def _cells(self, prompts: Prompts, row: int, prior: SupportPrior) -> Cells:
        """Which sets are tried is told by evidence and shares alone, and not by how many components are expected."""
        alone = self._pieces(prompts, row, prior, np.arange(self.width)[:, None], CORNER[None])
        shared = self._pieces(
            prompts, row, prior, self._sets(prompts, row, alone, prior), _quartered(INTERVAL[None], 2)
        )
        logs = np.log(prior.shares)
        most = alone.density + logs
        each = logsumexp(shared.density.reshape(-1, 4), axis=1) - np.log(4) + logs[shared.supports[::4, :2]].sum(1)
        for slot in range(2):
            np.maximum.at(most, shared.supports[::4, slot], each)
        likely = np.sort(np.argsort(-most, kind="stable")[:TRIPLED])
        triples = likely[np.array(list(combinations(range(len(likely)), 3)))]
        found = _Pieces.joined(
            [alone, shared, self._pieces(prompts, row, prior, triples, _quartered(TRIANGLE[None], 3))]
        )
        for _ in range(self.rounds):
            chosen = self._to_split(found)
            if not len(chosen):
                break
            left = np.delete(np.arange(len(found.sizes)), chosen)
            children = [
                self._children(prompts, row, found.take(own))
                for size in (2, 3)
                if len(own := chosen[found.sizes[chosen] == size])
            ]
            found = _Pieces.joined([found.take(left), *children])
        return self._finished(self._with_untried(found))

    def _sets(self, prompts: Prompts, row: int, alone: _Pieces, prior: SupportPrior) -> np.ndarray:
        """``(P, 2)`` pairs of components to try: all, or those of the ones that go best with the likeliest."""
        if self.width <= PAIRED:
            return self._all_pairs
        order = np.argsort(-alone.density - np.log(prior.shares), kind="stable")
        anchors, most = order[:ANCHORS], alone.density - np.inf
        for anchor in anchors:
            beside = np.column_stack([np.full(self.width, anchor), np.arange(self.width)])
            halves = self.log_density(prompts, row, beside, np.full((self.width, 2), 0.5))
            most = np.maximum(most, np.where(np.arange(self.width) == anchor, -np.inf, halves))
        most[anchors] = np.inf
        likely = np.sort(np.argsort(-most, kind="stable")[:PAIRED])
        return likely[np.array(list(combinations(range(len(likely)), 2)))]

    @cached_property
    def _all_pairs(self) -> np.ndarray:
        return np.array(list(combinations(range(self.width), 2)))

    def _pieces(
        self, prompts: Prompts, row: int, prior: SupportPrior, sets: np.ndarray, corners: np.ndarray
    ) -> _Pieces:
        """The pieces ``corners (C, M, M)`` of each of some sets ``(S, m)``."""
        count, size = sets.shape
        supports = np.repeat(np.pad(sets, [(0, 0), (0, MOST - size)], "edge"), len(corners), axis=0)
        masses = np.repeat(prior.log_prob(sets), len(corners)) - np.log(len(corners))
        edge = 0.25 if size == 2 else 0.5 if size == 3 else 0.0
        every = np.tile(corners, (count, 1, 1))
        density = self.log_density(prompts, row, supports, _centers(every, size))
        return _Pieces(supports, every, np.full(len(every), size), np.full(len(every), edge), masses, density)

    def _to_split(self, found: _Pieces) -> np.ndarray:
        """The likeliest cells of each size that are not too small: a coarse cell may look worse than its set is."""
        coarse = found.edges > np.array(FINEST)[found.sizes - 1] * (1 + 1e-9)
        chosen = []
        for size in (2, 3):
            own = np.flatnonzero(coarse & (found.sizes == size))
            mass = found.mass[own]
            worth = own[mass > mass.max(initial=-np.inf) + np.log(NEGLIGIBLE)]
            chosen.append(worth[np.argsort(-found.mass[worth], kind="stable")[:SPLIT]])  # of ties the same anywhere
        return np.concatenate(chosen)

    def _children(self, prompts: Prompts, row: int, parents: _Pieces) -> _Pieces:
        size = int(parents.sizes[0])
        corners = _quartered(parents.corners, size)
        supports = parents.supports.repeat(4, axis=0)
        edges = (parents.edges / (4 if size == 2 else 2)).repeat(4)
        density = self.log_density(prompts, row, supports, _centers(corners, size))
        return _Pieces(
            supports, corners, parents.sizes.repeat(4), edges, (parents.prior - np.log(4)).repeat(4), density
        )

    def _with_untried(self, found: _Pieces) -> _Pieces:
        """With the prior mass of the sets that were not tried, as likely as the least likely of those that were.

        It counts where evidence tells little: then as many components share a prompt as under the prior.
        """
        masses = found.prior.copy()
        for size in (2, 3):
            own = np.flatnonzero((found.sizes == size) & (found.prior > -np.inf))
            untried = self.sizes[size - 1] - np.exp(logsumexp(found.prior[own])) if len(own) else 0.0
            if untried < ROUNDING:
                continue
            names = found.supports[own, :size] @ self.width ** np.arange(size)
            _, place = np.unique(names, return_inverse=True)
            prior, joint = (np.full(place.max() + 1, -np.inf) for _ in range(2))
            np.logaddexp.at(prior, place, found.prior[own])
            np.logaddexp.at(joint, place, found.mass[own])
            least = (joint - prior).min()
            masses[own] += np.logaddexp(0.0, np.log(untried) + least - logsumexp(found.mass[own]))
        return found._replace(prior=masses)

    def _finished(self, found: _Pieces) -> Cells:
        """The likeliest cells of each size, which get the mass of its others."""
        evidence = logsumexp(found.mass)
        rows, scales = [np.arange(self.width)], [np.zeros(self.width)]  # single components come first, and all are kept
        for size in (2, 3):
            own = np.flatnonzero(found.sizes == size)
            own = own[np.argsort(-found.mass[own], kind="stable")]
            mass = np.exp(found.mass[own] - evidence)
            whole = mass.sum()
            if not whole > 0:
                continue
            count = min(KEPT, len(own), 1 + int(np.searchsorted(mass.cumsum(), (1 - TAIL) * whole)))
            rows.append(own[:count])
            scales.append(np.full(count, np.log(whole / mass[:count].sum())))
        kept = found.take(np.concatenate(rows))
        kept = kept._replace(density=kept.density + np.concatenate(scales))
        mass = on_simplex(np.exp(kept.mass - evidence))
        ratios = (evidence - kept.density)[None]
        one = np.array([evidence])
        return Cells(self.width, mass[None], kept.sizes[None], kept.supports[None], kept.corners[None], ratios, one)


def _centers(corners: np.ndarray, size: int) -> np.ndarray:
    return corners[:, :size].mean(1)


def _quartered(corners: np.ndarray, size: int) -> np.ndarray:
    """Each simplex of two or three components in four of equal size: ``(4 G, M, M)``."""
    if size == 2:
        steps = np.linspace(0, 1, 5)
        places = corners[:, 0, None] * (1 - steps)[:, None] + corners[:, 1, None] * steps[:, None]  # (G, 5, M)
        parts = np.stack([places[:, :-1], places[:, 1:], places[:, 1:]], axis=2)
    else:
        a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
        ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
        parts = np.stack([np.stack(each, 1) for each in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))], axis=1)
    return parts.reshape(-1, MOST, MOST)


def _none(width: int) -> Cells:
    empty = np.zeros((0, 1))
    whole = np.zeros((0, 1), dtype=np.int64)
    return Cells(
        width, empty, whole, np.zeros((0, 1, MOST), np.int64), np.zeros((0, 1, MOST, MOST)), empty, np.zeros(0)
    )
