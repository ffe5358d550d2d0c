"""Summing out the weights: which components share a prompt, and how much each of them has.

The sets of one, two and three components that matter are few, and on each the weights have at most two dimensions. So
the posterior is a sum over sets and over pieces of them, halved again where the mass is: no draw, no training, and
nothing to converge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from bayes_dispatch.dispatcher.exact.cells import Cells
from bayes_dispatch.dispatcher.exact.densities import ViewDensity
from bayes_dispatch.dispatcher.exact.supports import LARGEST_SET, SupportPrior
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

CORNER = np.eye(LARGEST_SET)[:1].repeat(LARGEST_SET, 0)  # of one component
INTERVAL = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
TRIANGLE = np.eye(LARGEST_SET)


class _Pieces(NamedTuple):
    """G cells of each of N prompts: ``(N, G, M)`` supports, ``(N, G, M, M)`` corners, and ``(N, G)`` sizes, the set of
    its size that each is of, edges and log masses. A cell of no prior mass has been split, or is one too many."""

    supports: np.ndarray
    corners: np.ndarray
    sizes: np.ndarray
    sets: np.ndarray
    edges: np.ndarray
    prior: np.ndarray
    density: np.ndarray

    @property
    def mass(self) -> np.ndarray:
        return self.prior + self.density

    def take(self, places: np.ndarray) -> _Pieces:
        """Of each prompt those at its ``places (N, ·)``."""
        rows = np.arange(len(places))[:, None]
        return _Pieces(*(each[rows, places] for each in self))

    @classmethod
    def joined(cls, parts: Sequence[_Pieces]) -> _Pieces:
        return cls(*(np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)))


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
        """Posteriors of N prompts under a prior of label shares ``(K+1,)``; each is of its own evidence alone."""
        if not len(prompts):
            return _none(self.width)
        prior = self.prior(shares)
        return Cells.concatenate([self._cells(some, prior) for some in prompts.pieces()])

    @property
    def width(self) -> int:
        """K+1."""
        return len(self.densities[0].columns)

    def log_density(self, prompts: Prompts, supports: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """``(N, G)`` log densities of prompts' evidence where components ``supports (N, G, M)`` have ``weights``."""
        total = np.zeros(supports.shape[:2])
        supports, weights = np.ascontiguousarray(supports), np.ascontiguousarray(weights)
        for density in self.densities:
            density.add(prompts, supports, weights, total)
        return total

    def _cells(self, prompts: Prompts, prior: SupportPrior) -> Cells:
        """Which sets are tried is told by evidence and shares alone, and not by how many components are expected."""
        singles = np.arange(self.width)[None, :, None]
        alone = self._pieces(prompts, prior, singles, CORNER[None])
        pairs = self._sets(prompts, alone, prior)
        shared = self._pieces(prompts, prior, pairs, _quartered(INTERVAL[None], 2))
        logs = np.log(prior.shares)
        most, rows = alone.density + logs, np.arange(len(prompts))[:, None]
        each = logsumexp(shared.density.reshape(len(prompts), -1, 4), axis=2) - np.log(4) + logs[pairs].sum(2)
        for slot in range(2):
            np.maximum.at(most, (rows, pairs[..., slot]), each)
        triples = _combined(_likeliest(most, TRIPLED), 3)
        found = _Pieces.joined([alone, shared, self._pieces(prompts, prior, triples, _quartered(TRIANGLE[None], 3))])
        for _ in range(self.rounds):
            found = _Pieces.joined([found, self._children(prompts, found)])
        return self._finished(self._with_untried(found))

    def _sets(self, prompts: Prompts, alone: _Pieces, prior: SupportPrior) -> np.ndarray:
        """``(N, P, 2)`` pairs of components to try: all, or those of the ones that go best with the likeliest."""
        everybody = np.arange(self.width)[None].repeat(len(prompts), 0)
        if self.width <= PAIRED:
            return _combined(everybody, 2)
        order = np.argsort(-alone.density - np.log(prior.shares), axis=1, kind="stable")
        anchors, others = np.broadcast_arrays(order[:, :ANCHORS, None], everybody[:, None])  # (N, A, K + 1)
        beside = np.stack([anchors, others, others], axis=3)
        weights = np.broadcast_to([0.5, 0.5, 0.0], beside.shape)
        halves = self.log_density(
            prompts, beside.reshape(len(prompts), -1, LARGEST_SET), weights.reshape(len(prompts), -1, LARGEST_SET)
        )
        most = np.where(anchors == others, -np.inf, halves.reshape(anchors.shape)).max(1)
        np.put_along_axis(most, order[:, :ANCHORS], np.inf, 1)
        return _combined(_likeliest(most, PAIRED), 2)

    def _pieces(self, prompts: Prompts, prior: SupportPrior, sets: np.ndarray, corners: np.ndarray) -> _Pieces:
        """The pieces ``corners (C, M, M)`` of each of some sets ``(N or 1, S, m)``."""
        count, size, pieces = sets.shape[1], sets.shape[2], len(corners)
        sets = np.broadcast_to(sets, (len(prompts), count, size))
        supports = np.pad(sets, [(0, 0), (0, 0), (0, LARGEST_SET - size)], "edge").repeat(pieces, axis=1)
        shape = supports.shape[:2]
        masses = prior.log_prob(sets).repeat(pieces, axis=1) - np.log(pieces)
        every = np.broadcast_to(np.tile(corners, (count, 1, 1)), (*shape, LARGEST_SET, LARGEST_SET))
        origins = np.broadcast_to(np.arange(count).repeat(pieces), shape)
        edge = 0.25 if size == 2 else 0.5 if size == 3 else 0.0
        density = self.log_density(prompts, supports, _centers(every, size))
        return _Pieces(supports, every, np.full(shape, size), origins, np.full(shape, edge), masses, density)

    def _to_split(self, found: _Pieces, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest cells of a size, ``(N, ·)``, and which of them are worth it: a coarse cell may look worse than
        its set is."""
        coarse = (found.edges > FINEST[size - 1] * (1 + 1e-9)) & (found.sizes == size)
        mass = np.where(coarse, found.mass, -np.inf)
        mass[mass <= mass.max(1, initial=-np.inf, keepdims=True) + np.log(NEGLIGIBLE)] = -np.inf
        places = np.argsort(-mass, axis=1, kind="stable")[:, :SPLIT]  # of ties the same anywhere
        return places, np.take_along_axis(mass, places, 1) > -np.inf

    def _children(self, prompts: Prompts, found: _Pieces) -> _Pieces:
        """Four of each cell that is worth it, whose mass they take."""
        parts, centers, rows = [], [], np.arange(len(prompts))[:, None]
        for size in (2, 3):
            places, worth = self._to_split(found, size)
            parents, corners = found.take(places), _quartered(found.corners[rows, places], size)
            prior = np.where(worth, parents.prior - np.log(4), -np.inf)
            edges = parents.edges / (4 if size == 2 else 2)
            four = (each.repeat(4, axis=1) for each in (parents.supports, parents.sizes, parents.sets, edges, prior))
            supports, sizes, sets, edges, prior = four
            parts.append(_Pieces(supports, corners, sizes, sets, edges, prior, np.zeros_like(prior)))
            centers.append(_centers(corners, size))
            found.prior[rows, places] = np.where(worth, -np.inf, parents.prior)
        children = _Pieces.joined(parts)
        return children._replace(density=self.log_density(prompts, children.supports, np.concatenate(centers, 1)))

    def _with_untried(self, found: _Pieces) -> _Pieces:
        """With the prior mass of the sets that were not tried, as likely as the least likely of those that were.

        It counts where evidence tells little: then as many components share a prompt as under the prior.
        """
        masses = found.prior.copy()
        for size in (2, 3):
            own = (found.sizes == size) & (found.prior > -np.inf)
            prior = _by_set(np.where(own, found.prior, -np.inf), found.sets)
            joint = _by_set(np.where(own, found.mass, -np.inf), found.sets)
            tried, total = (_log_sum(each) for each in (prior, joint))  # (N,)
            untried = np.where(tried > -np.inf, self.sizes[size - 1] - np.exp(tried), 0.0)
            with np.errstate(invalid="ignore", divide="ignore"):
                least = np.where(prior > -np.inf, joint - prior, np.inf).min(1, initial=np.inf)
                more = np.logaddexp(0.0, np.log(untried) + least - total)
            more = np.where((untried < ROUNDING) | ~np.isfinite(more), 0.0, more)
            masses += np.where(own, more[:, None], 0.0)
        return found._replace(prior=masses)

    def _finished(self, found: _Pieces) -> Cells:
        """The likeliest cells of each size, which get the mass of its others."""
        evidence, count = _log_sum(found.mass), len(found.mass)
        whole = np.exp(found.mass - evidence[:, None])
        places = [np.arange(self.width)[None].repeat(count, 0)]  # single components come first, and all are kept
        kept, scales = [np.ones((count, self.width), bool)], [np.zeros((count, self.width))]
        for size in (2, 3):
            mass = np.where(found.sizes == size, whole, 0.0)
            order = np.argsort(-mass, axis=1, kind="stable")
            running = np.take_along_axis(mass, order, 1).cumsum(1)
            order, total = order[:, :KEPT], running[:, -1:]
            enough = np.minimum(1 + (running < (1 - TAIL) * total).sum(1), order.shape[1])
            chosen = np.arange(order.shape[1]) < np.where(total[:, 0] > 0, enough, 0)[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = np.log(total / np.take_along_axis(running, enough[:, None] - 1, 1))
            places.append(order)
            kept.append(chosen & (np.take_along_axis(mass, order, 1) > 0))
            scales.append(np.where(chosen, scale, 0.0))
        return _kept(self.width, found, np.hstack(places), np.hstack(kept), np.hstack(scales), evidence)


def _kept(
    width: int, found: _Pieces, places: np.ndarray, kept: np.ndarray, scales: np.ndarray, evidence: np.ndarray
) -> Cells:
    """Cells at some of the ``places (N, ·)``, in order, their masses scaled up; the last of a prompt fills it up."""
    order = np.argsort(~kept, axis=1, kind="stable")[:, : kept.sum(1).max()]
    within = np.arange(order.shape[1]) < kept.sum(1)[:, None]
    order = np.where(within, order, np.take_along_axis(order, kept.sum(1)[:, None] - 1, 1))
    chosen = found.take(np.take_along_axis(places, order, 1))
    density = chosen.density + np.take_along_axis(scales, order, 1)
    mass = np.where(within, np.exp(chosen.prior + density - evidence[:, None]), 0.0)
    mass /= mass.cumsum(1)[:, -1:]  # a sum that zeros at the end do not change
    ratios = evidence[:, None] - density
    return Cells(width, mass, chosen.sizes, chosen.supports, chosen.corners, ratios, evidence)


def _likeliest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the largest values of each row, in order of place."""
    return np.sort(np.argsort(-values, axis=1, kind="stable")[:, :count], axis=1)


def _combined(members: np.ndarray, size: int) -> np.ndarray:
    """``(N, S, size)`` sets of each prompt's members ``(N, ·)``."""
    places = np.array(list(combinations(range(members.shape[1]), size)), dtype=np.int64).reshape(-1, size)
    return members[:, places]


def _log_sum(logs: np.ndarray) -> np.ndarray:
    """``(N,)`` log-sums of rows; those of nothing are −∞."""
    return _by_set(logs, np.zeros(logs.shape, dtype=np.int64))[:, 0]


def _by_set(logs: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """``(N, S)`` log-sums of the cells of each set; those of nothing are −∞."""
    prompts, count = len(logs), int(sets.max()) + 1
    most = logs.max(1, initial=-np.inf, keepdims=True)
    most = np.where(most > -np.inf, most, 0.0)
    places = (np.arange(prompts)[:, None] * count + sets).ravel()
    sums = np.bincount(places, np.exp(logs - most).ravel(), prompts * count).reshape(prompts, count)
    with np.errstate(divide="ignore"):
        return np.log(sums) + most


def _centers(corners: np.ndarray, size: int) -> np.ndarray:
    return corners[..., :size, :].mean(-2)


def _quartered(corners: np.ndarray, size: int) -> np.ndarray:
    """Each simplex of two or three components in four of equal size: ``(…, 4 G, M, M)``."""
    if size == 2:
        steps = np.linspace(0, 1, 5)[:, None]
        places = corners[..., 0, None, :] * (1 - steps) + corners[..., 1, None, :] * steps  # (…, G, 5, M)
        parts = np.stack([places[..., :-1, :], places[..., 1:, :], places[..., 1:, :]], axis=-2)
    else:
        a, b, c = corners[..., 0, :], corners[..., 1, :], corners[..., 2, :]
        ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
        of = ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))
        parts = np.stack([np.stack(each, -2) for each in of], axis=-3)
    return parts.reshape(*corners.shape[:-3], -1, LARGEST_SET, LARGEST_SET)


def _none(width: int) -> Cells:
    empty, corners = np.zeros((0, 1)), np.zeros((0, 1, LARGEST_SET, LARGEST_SET))
    whole = np.zeros((0, 1), dtype=np.int64)
    return Cells(width, empty, whole, np.zeros((0, 1, LARGEST_SET), np.int64), corners, empty, np.zeros(0))
