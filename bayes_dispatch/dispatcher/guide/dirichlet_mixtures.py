"""The guide's answer: for each prompt a mixture of Dirichlets over the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from scipy.special import gammainc, gammaln, logsumexp

from bayes_dispatch.dispatcher.guide.importance_kernels import draw_weights

__all__ = ["DirichletMixtures"]

MEMORY = 2**22  # numbers of a quadrature at a time
NO_FAMILIES = (np.zeros(0, np.int64), np.zeros((0, 0)))


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

    def draw(self, draws: int, keys: Shaped[np.ndarray, " prompt"]) -> Float[np.ndarray, "draw prompt weight"]:
        """``(S, N, K+1)`` draws; those of a prompt depend on its own key ``(N,)`` (32 bits) only."""
        rows, _, width = self.concentration.shape
        weights = np.empty((rows, draws, width))
        families, top = NO_FAMILIES
        nothing = np.zeros((0, width))
        draw_weights(
            keys, self.shares, self.concentration, np.zeros(0), nothing, families, top, weights, np.zeros((0, 0))
        )
        return weights.swapaxes(0, 1)

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
