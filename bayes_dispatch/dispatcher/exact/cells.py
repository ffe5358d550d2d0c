"""The posterior of prompts' weights as pieces of the simplex, on each of which it is uniform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
from jaxtyping import Float

from bayes_dispatch import arguments
from bayes_dispatch.dispatcher.arrays import Frozen, on_simplex
from bayes_dispatch.errors import ConfigError

__all__ = ["RESOLUTION", "Cells", "prompt_generators"]

RESOLUTION = 1e-3  # of weights: evidence hardly tells nearer ones apart
_SPREAD = np.array(list(permutations((0.62, 0.28, 0.1))))
PROBES = np.stack([on_simplex(_SPREAD * used) for used in ((1, 0, 0), (1, 1, 0), (1, 1, 1))])  # by size, (6, corner)


def prompt_generators(seed: int | Sequence[int], count: int) -> list[np.random.Generator]:
    """A generator for each of N prompts: from one seed and the prompts' rows, or from one seed for each prompt.

    Raises:
        ConfigError: a seed that is no whole number ≥ 0, or another number of seeds than prompts.
    """
    if not isinstance(seed, Sequence | np.ndarray):
        first = arguments.seed(seed)
        return [np.random.default_rng(np.random.SeedSequence(first, spawn_key=(row,))) for row in range(count)]
    if len(seed) != count:
        raise ConfigError(f"expected one seed, or one for each of {count} prompts, got {len(seed)}")
    return [np.random.default_rng(arguments.whole("each prompt's seed", each, 0)) for each in seed]


@dataclass(frozen=True, eq=False)
class Cells(Frozen):
    """Mixtures of uniform distributions on simplices of up to M components, G for each of N prompts.

    A cell of one component is the component itself, one of two is an interval, one of three a triangle.

    Args:
        width: K+1.
        mass: ``(N, G)`` probabilities, summing to 1 for each prompt; cells that fill up have 0.
        sizes: ``(N, G)`` components of each.
        supports: ``(N, G, M)`` which ones; from the size on any.
        corners: ``(N, G, M, M)`` the weights of these components at each corner; from the size on any corner, and 0
            the weights.
        log_ratios: ``(N, G)`` log density of the prior over that of the posterior.
        log_evidence: ``(N,)`` log density of the prompt's evidence, nats.
    """

    width: int
    mass: np.ndarray
    sizes: np.ndarray
    supports: np.ndarray
    corners: np.ndarray
    log_ratios: np.ndarray
    log_evidence: np.ndarray

    def __len__(self) -> int:
        return len(self.mass)

    @property
    def mean(self) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` mean, which no draw is needed for."""
        return self._spread(self.mass[..., None] * self._centers)

    def probability_best(self) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` probability that each weight is the largest, from six points of every cell."""
        from bayes_dispatch.dispatcher.exact.loops import add_best  # numba is slow to import

        found = np.zeros((len(self), self.width))
        add_best(self.mass, self.sizes, self.supports, self.corners, PROBES, found)
        return np.minimum(found, 1.0)

    def below(self, weights: Float[np.ndarray, "prompt weight"]) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` probability that each weight is at most the given one."""
        from bayes_dispatch.dispatcher.exact.loops import add_below

        found = np.zeros(weights.shape)
        add_below(self.mass, self.sizes, self.supports, self.corners, weights, found)
        return found

    def draw(
        self, draws: int, generators: Sequence[np.random.Generator]
    ) -> tuple[Float[np.ndarray, "draw prompt weight"], Float[np.ndarray, "draw prompt"]]:
        """``(S, N, K+1)`` independent draws and their log ratios; a prompt's depend on its own generator only."""
        most = self.supports.shape[-1]
        weights, ratios = np.zeros((draws, len(self), self.width)), np.empty((draws, len(self)))
        edges, rows = self.mass.cumsum(1)[:, :-1], np.arange(draws)[:, None]
        for n, random in enumerate(generators):
            chosen = np.searchsorted(edges[n], random.random(draws), side="right")
            shares = random.standard_exponential((draws, most))
            shares = on_simplex(np.where(np.arange(most) < self.sizes[n, chosen][:, None], shares, 0.0))
            drawn = np.einsum("sc,scm->sm", shares, self.corners[n, chosen])
            np.add.at(weights[:, n], (rows, self.supports[n, chosen]), drawn)  # unused ones are 0
            ratios[:, n] = self.log_ratios[n, chosen]
        return on_simplex(weights), ratios

    @classmethod
    def concatenate(cls, parts: Sequence[Cells]) -> Cells:
        """Those of all prompts."""
        longest = max(part.mass.shape[1] for part in parts)
        filled = [part._filled(longest) for part in parts]
        return cls(parts[0].width, *(np.concatenate([getattr(part, name) for part in filled]) for name in _COLUMNS))

    def _filled(self, cells: int) -> Cells:
        """With cells of no mass up to so many of each prompt."""
        missing = cells - self.mass.shape[1]
        columns = {name: getattr(self, name) for name in _COLUMNS}
        for name in _COLUMNS[:-1]:
            values = columns[name]
            more = np.repeat(values[:, -1:], missing, axis=1)
            columns[name] = np.concatenate([values, 0 * more if name == "mass" else more], axis=1)
        return Cells(self.width, **columns)

    @property
    def _centers(self) -> Float[np.ndarray, "prompt cell slot"]:
        used = np.arange(self.supports.shape[-1]) < self.sizes[..., None]
        return np.einsum("ngc,ngcm->ngm", used / self.sizes[..., None], self.corners)

    def _spread(self, values: Float[np.ndarray, "prompt cell slot"]) -> Float[np.ndarray, "prompt weight"]:
        """Sums of the components' values over cells."""
        rows = np.arange(len(self))[:, None, None]
        places = (rows * self.width + self.supports).ravel()
        sums = np.bincount(places, values.ravel().astype(np.float64), len(self) * self.width)
        return sums.astype(np.float64).reshape(len(self), self.width)


_COLUMNS = tuple(each.name for each in fields(Cells) if each.name != "width")
