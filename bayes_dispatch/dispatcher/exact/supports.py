"""The prior of a prompt's weights: it is one expert's alone, or two or three share it in any proportion.

Most text is of one kind, and mixed text mixes a few: weights have exact zeros. A Dirichlet has none. One that is sparse
enough for pure prompts expects of a mixed one that nearly all of it is one expert's, and so finds its shares with too
little doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from bayes_dispatch.dispatcher.arrays import on_simplex

__all__ = ["MOST", "SupportPrior"]

MOST = 3  # components that share a prompt


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
        possible = sum(total > 0 for total, _ in classes)
        with np.errstate(divide="ignore"):
            constants = np.log([self.sizes[size - 1] / possible / total if total > 0 else 0.0 for total, _ in classes])
        return np.log(self.shares)[supports].sum(-1) + constants[self._families(supports)]

    @cached_property
    def mean(self) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` mean of the weights: near the shares."""
        found = np.zeros(len(self.shares))
        for size, (probability, classes) in enumerate(zip(self.sizes, self._classes, strict=False), 1):
            inside = [self.shares * gradient / total for total, gradient in classes if total > 0]
            found += probability * np.mean(inside, axis=0) / size
        return on_simplex(found)

    def draw(self, count: int, random: np.random.Generator) -> Float[np.ndarray, "draw weight"]:
        """``(count, K+1)`` weights."""
        out, sizes = np.zeros((count, len(self.shares))), random.choice(len(self.sizes), count, p=self.sizes) + 1
        for size in np.unique(sizes):
            rows = np.flatnonzero(sizes == size)
            possible = [number for number, (total, _) in enumerate(self._classes[size - 1]) if total > 0]
            wanted, left = random.choice(possible, len(rows)), rows
            chosen = np.zeros((count, size), dtype=np.int64)
            while len(left):
                drawn = random.choice(len(self.shares), (len(left), size), p=self.shares)
                ordered = np.sort(drawn, axis=1)
                good = (np.diff(ordered, axis=1) > 0).all(1) & (self._families(drawn) == wanted)
                chosen[left[good]] = drawn[good]
                left, wanted = left[~good], wanted[~good]
            out[rows[:, None], chosen[rows]] = random.dirichlet(np.ones(size), len(rows))
        return out

    @cached_property
    def _classes(self) -> list[list[tuple[float, np.ndarray]]]:
        """By size and number of families less one: the sum over sets of the products of their shares, and its
        derivative by each share. Without families there is one class of each size."""
        x = self.shares
        pairs, triples = _symmetric(x, x.sum())
        if self.tree is None:
            return [[(x.sum(), np.ones_like(x))], [pairs], [triples]]
        member = np.eye(max(self.tree) + 1)[list(self.tree)]  # (K+1, F)
        sums = x @ member
        within = [_symmetric(x * inside, total) for inside, total in zip(member.T, sums, strict=True)]
        own = list(self.tree)
        two, three = (
            (sum(each[i][0] for each in within), np.array([within[f][i][1][k] for k, f in enumerate(own)]))
            for i in (0, 1)
        )
        apart, all_apart = ((total, gradient[own]) for total, gradient in _symmetric(sums, sums.sum()))
        rest = triples[0] - three[0] - all_apart[0], triples[1] - three[1] - all_apart[1]
        found = [[(x.sum(), np.ones_like(x))], [two, apart], [three, rest, all_apart]]
        return [[(total if total > 1e-12 else 0.0, gradient) for total, gradient in each] for each in found]

    def _families(self, supports: np.ndarray) -> np.ndarray:
        """How many families sets are of, less one; 0 without families."""
        if self.tree is None:
            return np.zeros(supports.shape[:-1], dtype=np.int64)
        ordered = np.sort(np.array(self.tree)[supports], axis=-1)
        return (np.diff(ordered, axis=-1) > 0).sum(-1)


def _symmetric(x: np.ndarray, total: float) -> tuple[tuple[float, np.ndarray], tuple[float, np.ndarray]]:
    """Elementary symmetric polynomials of degree two and three, with their derivatives."""
    first = total - x
    pairs = float(x @ first) / 2
    second = pairs - x * first
    return (pairs, first), (float(x @ second) / 3, second)
