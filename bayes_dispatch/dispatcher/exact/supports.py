"""The prior of a prompt's weights: it is one expert's alone, or two or three share it in any proportion.

Most text is of one kind, and mixed text mixes a few: weights have exact zeros. A Dirichlet has none. One that is sparse
enough for pure prompts expects of a mixed one that nearly all of it is one expert's, and so finds its shares with too
little doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bayes_dispatch.dispatcher.arrays import on_simplex

__all__ = ["LARGEST_SET", "SupportPrior", "largest_weights"]

LARGEST_SET = 3  # components that share a prompt, at most
POSSIBLE = 1e-100  # sum over sets of the products of their shares, below which there are none of a kind


@dataclass(frozen=True, eq=False)
class SupportPrior:
    """``m ~ sizes``; a set S of m components in proportion to the product of their shares; ``w_S ~ Dirichlet(1)``.

    With families, the number of families that S is of is as likely to be one as any other that is possible: a prompt
    of two experts is as often of related ones as of strangers, however many strangers there are.

    Args:
        sizes: ``(M,)`` probabilities that 1 … M components share a prompt.
        shares: ``(K+1,)`` of the components, positive, summing to 1.
        tree: family of each component; ``None`` without families.
    """

    sizes: Sequence[float]
    shares: np.ndarray
    tree: tuple[int, ...] | None = None

    def log_prob(self, supports: np.ndarray) -> np.ndarray:
        """Log probabilities ``(·,)`` of sets ``(·, m)`` of components; those of one are distinct, in any order."""
        size = supports.shape[-1]
        classes = self._classes[size - 1]
        possible = sum(total > POSSIBLE for total, _ in classes)
        with np.errstate(divide="ignore"):
            constants = np.log(
                [self.sizes[size - 1] / possible / total if total > POSSIBLE else 0.0 for total, _ in classes]
            )
        return np.log(self.shares)[supports].sum(-1) + constants[self._families(supports)]

    @cached_property
    def mean(self) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` mean of the weights: near the shares."""
        found = np.zeros(len(self.shares))
        for size, (probability, classes) in enumerate(zip(self.sizes, self._classes, strict=False), 1):
            inside = [self.shares * gradient / total for total, gradient in classes if total > POSSIBLE]
            found += probability * np.mean(inside, axis=0) / size
        return on_simplex(found)

    def draw(self, count: int, random: np.random.Generator) -> Float[np.ndarray, "draw weight"]:
        """``(count, K+1)`` weights."""
        out, sizes = np.zeros((count, len(self.shares))), random.choice(len(self.sizes), count, p=self.sizes) + 1
        for size in np.unique(sizes):
            rows = np.flatnonzero(sizes == size)
            chosen = self._sets(len(rows), int(size), random)
            out[rows[:, None], chosen] = random.dirichlet(np.ones(size), len(rows))
        return out

    def _sets(self, count: int, size: int, random: np.random.Generator) -> Int[np.ndarray, "draw size"]:
        """Sets of so many components: with families, first how many of these they are of, then which, and then who."""
        if self.tree is None:
            return _distinct(self.shares, count, size, random)
        totals = [total for total, _ in self._classes[size - 1]]
        families = random.choice([n for n, total in enumerate(totals, 1) if total > POSSIBLE], count)
        member, sums, pairs, triples = self._by_family
        found = np.empty((count, size), dtype=np.int64)
        for number in np.unique(families):
            rows = np.flatnonzero(families == number)
            if number == size:
                own = _distinct(sums, len(rows), size, random).ravel()
                found[rows] = self._members(own, 1, random).reshape(-1, size)
            elif number == 1:
                own = random.choice(len(sums), len(rows), p=on_simplex(pairs if size == 2 else triples))
                found[rows] = self._members(own, size, random)
            else:  # two of a family, and one of another
                own = random.choice(len(sums), len(rows), p=on_simplex(pairs * (1 - sums)))
                others = self.shares[:, None] * (1 - member)  # (K+1, F)
                found[rows, :2] = self._members(own, 2, random)
                for family in np.unique(own):
                    same = rows[own == family]
                    found[same, 2] = random.choice(len(others), len(same), p=on_simplex(others[:, family]))
        return found

    def _members(
        self, families: Int[np.ndarray, " draw"], size: int, random: np.random.Generator
    ) -> Int[np.ndarray, "draw size"]:
        """So many distinct components of each family."""
        member, found = self._by_family[0], np.empty((len(families), size), dtype=np.int64)
        for family in np.unique(families):
            here = families == family
            found[here] = _distinct(self.shares * member[:, family], int(here.sum()), size, random)
        return found

    @cached_property
    def _by_family(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """``(K+1, F)`` who is of which family; ``(F,)`` sums of shares, and of products of two and of three of them."""
        assert self.tree is not None
        member = np.eye(max(self.tree) + 1)[list(self.tree)]
        within = [_symmetric(self.shares[inside > 0]) for inside in member.T]
        sums, pairs, triples = (
            np.array(values) for values in zip(*((each[0], *each[1:]) for each in within), strict=True)
        )
        return member, sums, pairs, triples

    @cached_property
    def _classes(self) -> list[list[tuple[float, np.ndarray]]]:
        """By size and number of families less one: the sum over sets of the products of their shares, and its
        derivative by each share. Without families there is one class of each size."""
        x = self.shares
        one, two, three = _symmetric(x)
        if self.tree is None:
            return [[(one, np.ones_like(x))], [(two, one - x)], [(three, _second(x, one, two))]]
        _, sums, pairs, triples = self._by_family
        own = list(self.tree)
        first = sums[own] - x  # derivatives of the sums within a component's family, and among families
        second = _second(x, sums[own], pairs[own])
        total, apart, all_apart = _symmetric(sums)
        others = total - sums
        mixed = first * others[own] + pairs.sum() - pairs[own]
        return [
            [(one, np.ones_like(x))],
            [(pairs.sum(), first), (apart, others[own])],
            [(triples.sum(), second), (float(pairs @ others), mixed), (all_apart, _second(sums, total, apart)[own])],
        ]

    def _families(self, supports: np.ndarray) -> np.ndarray:
        """How many families sets are of, less one; 0 without families."""
        if self.tree is None:
            return np.zeros(supports.shape[:-1], dtype=np.int64)
        ordered = np.sort(np.array(self.tree)[supports], axis=-1)
        return (np.diff(ordered, axis=-1) > 0).sum(-1)


def largest_weights(
    weights: Float[np.ndarray, "prompt point weight"],
) -> tuple[Int[np.ndarray, "prompt point slot"], Float[np.ndarray, "prompt point slot"]]:
    """Which components have the three largest weights, and these, summing to 1: no more share a prompt."""
    supports = np.argsort(-weights, axis=2, kind="stable")[..., :LARGEST_SET]
    return supports, on_simplex(np.take_along_axis(weights, supports, 2))


def _symmetric(x: np.ndarray) -> tuple[float, float, float]:
    """Sums of the products of one, two and three distinct elements, from terms that are all positive."""
    one = two = three = 0.0
    for value in x:
        one, two, three = one + value, two + value * one, three + value * two
    return float(one), float(two), float(three)


def _second(x: np.ndarray, one: Any, two: Any) -> np.ndarray:
    """Derivative by each element of the sum of the products of three: of those of two of the others."""
    return two - x * (one - x)


def _distinct(chances: np.ndarray, count: int, size: int, random: np.random.Generator) -> Int[np.ndarray, "set size"]:
    """Sets of indices in proportion to the product of their chances."""
    drawn = random.choice(len(chances), (count, size), p=on_simplex(chances))
    while len(again := np.flatnonzero((np.diff(np.sort(drawn, axis=1), axis=1) == 0).any(1))):
        drawn[again] = random.choice(len(chances), (len(again), size), p=on_simplex(chances))
    return drawn
