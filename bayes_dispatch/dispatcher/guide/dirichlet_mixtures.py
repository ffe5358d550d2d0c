"""The guide's answer: for each prompt a mixture of Dirichlets over the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import betainc, gammainc, gammaln, logsumexp

from bayes_dispatch import arguments
from bayes_dispatch.errors import ConfigError

__all__ = ["RESOLUTION", "DirichletMixtures", "on_simplex", "prompt_generators"]

RESOLUTION = 1e-3  # of weights: evidence hardly tells smaller ones apart
MEMORY = 2**22  # numbers of a quadrature at a time


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


def on_simplex(values: Float[np.ndarray, "*some weight"]) -> Float[np.ndarray, "*some weight"]:
    """Values ≥ 0 divided by their sum."""
    return values / values.sum(-1, keepdims=True)


@dataclass(frozen=True, eq=False)
class DirichletMixtures:
    """Mixtures of Dirichlets for N prompts in float64: what draws and probabilities are computed from.

    Args:
        shares: ``(N, R)`` mixture weights.
        concentration: ``(N, R, K+1)``.
    """

    shares: np.ndarray
    concentration: np.ndarray

    def __len__(self) -> int:
        return len(self.shares)

    @property
    def mean(self) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` exact mean."""
        means = self.concentration / self.concentration.sum(-1, keepdims=True)
        return (self.shares[..., None] * means).sum(1)

    def draw(self, draws: int, generators: Sequence[np.random.Generator]) -> Float[np.ndarray, "draw prompt weight"]:
        """``(S, N, K+1)`` draws; those of a prompt depend on its own generator only."""
        rows, _, width = self.concentration.shape
        logs, edges = np.empty((rows, draws, width)), self.shares.cumsum(1)[:, :-1]
        for n, random in enumerate(generators):
            chosen = (random.random(draws)[:, None] >= edges[n]).sum(1)
            alpha = self.concentration[n, chosen]
            # A gamma variate of shape a is one of shape a + 1 times u^(1/a): its log never underflows.
            logs[n] = np.log(random.standard_gamma(alpha + 1)) - random.standard_exponential(alpha.shape) / alpha
        return on_simplex(np.exp(logs - logs.max(-1, keepdims=True))).swapaxes(0, 1)

    def below(self, weights: Float[np.ndarray, "prompt weight"]) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` probability that each weight is below the given one."""
        alpha = self.concentration
        return (self.shares[..., None] * betainc(alpha, alpha.sum(-1, keepdims=True) - alpha, weights[:, None])).sum(1)

    def log_prob(self, weights: Float[np.ndarray, "... prompt weight"]) -> Float[np.ndarray, "... prompt"]:
        """Log density of weights ``(·, N, K+1)`` inside the simplex."""
        alpha = self.concentration
        constants = gammaln(alpha.sum(-1)) - gammaln(alpha).sum(-1)  # (N, R)
        parts = ((alpha - 1) * np.log(weights)[..., None, :]).sum(-1)
        with np.errstate(divide="ignore"):
            return logsumexp(np.log(self.shares) + constants + parts, axis=-1)

    def probability_best(self, nodes: int = 96) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` P(argmax w = k), by quadrature over the largest of independent gamma variates.

        ``P(k) = ∫ Π_{j≠k} F_j(g) dF_k(g)`` on ``nodes`` points spaced evenly in ``log g``.
        """
        size = max(1, MEMORY // (nodes * self.concentration[:1].size or 1))
        pieces = [
            self._best(self.shares[i : i + size], self.concentration[i : i + size], nodes)
            for i in range(0, len(self), size)
        ]
        return np.concatenate(pieces) if pieces else np.zeros((0, self.concentration.shape[-1]))

    @staticmethod
    def _best(shares: np.ndarray, alpha: np.ndarray, nodes: int) -> np.ndarray:
        top = alpha.max(-1)  # (N, R)
        low = np.log(top) - np.minimum(8.0 / np.sqrt(top) + 8.0 / top, 60.0)
        high = np.log(top + 8.0 * np.sqrt(top) + 25.0)
        grid = low[..., None] + (high - low)[..., None] * np.linspace(0.0, 1.0, nodes)  # (N, R, G)
        edges = gammainc(alpha[..., None, :], np.exp(grid)[..., None])  # (N, R, G, K+1)
        steps = np.diff(edges, axis=-2, prepend=0.0)
        middle = np.maximum((edges + np.roll(edges, 1, axis=-2)) / 2, 1e-300)
        middle[..., 0, :] = np.maximum(edges[..., 0, :] / 2, 1e-300)
        others = np.log(middle).sum(-1, keepdims=True) - np.log(middle)
        best = (steps * np.exp(others)).sum(-2)  # (N, R, K+1)
        best /= best.sum(-1, keepdims=True)
        return (shares[..., None] * best).sum(1)
