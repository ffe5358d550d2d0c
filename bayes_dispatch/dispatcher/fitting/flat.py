"""What a dispatcher knows of experts that nobody has examples of: that every mixture may be."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import betainc, gammainc

from bayes_dispatch.dispatcher.arrays import Frozen, on_simplex
from bayes_dispatch.dispatcher.evidence.evidence import Evidence

__all__ = ["Dirichlets", "FlatProgram"]

NODES = 96  # of the quadrature of the largest weight


@dataclass(frozen=True, eq=False)
class Dirichlets(Frozen):
    """A Dirichlet over the weights of each of N prompts.

    Args:
        concentration: ``(N, K+1)``, positive.
    """

    concentration: np.ndarray

    def __post_init__(self) -> None:
        self.__setstate__(vars(self))

    def __len__(self) -> int:
        return len(self.concentration)

    @property
    def mean(self) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` exact mean."""
        return on_simplex(self.concentration)

    def below(self, weights: Float[np.ndarray, "prompt weight"]) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` probability that each weight is at most the given one."""
        alpha = self.concentration
        return betainc(alpha, alpha.sum(-1, keepdims=True) - alpha, np.clip(weights, 0, 1)) * (weights >= 0)

    def probability_best(self) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` P(argmax w = k), ``∫ Π_{j≠k} F_j(g) dF_k(g)`` over independent gamma variates, at points spaced
        evenly in ``log g``."""
        rows, place = np.unique(self.concentration, axis=0, return_inverse=True)
        top = rows.max(-1)[:, None]
        low = np.log(top) - np.minimum(8.0 / np.sqrt(top) + 8.0 / top, 60.0)
        high = np.log(top + 8.0 * np.sqrt(top) + 25.0)
        grid = low + (high - low) * np.linspace(0.0, 1.0, NODES)  # (U, G)
        edges = gammainc(rows[:, None], np.exp(grid)[..., None])  # (U, G, K+1)
        steps = np.diff(edges, axis=1, prepend=0.0)
        before = np.concatenate([np.zeros_like(edges[:, :1]), edges[:, :-1]], axis=1)
        middle = np.maximum((edges + before) / 2, 1e-300)
        others = np.log(middle).sum(-1, keepdims=True) - np.log(middle)
        return on_simplex((steps * np.exp(others)).sum(1))[place.reshape(-1)]

    def draw(self, draws: int, generators: Sequence[np.random.Generator]) -> Float[np.ndarray, "draw prompt weight"]:
        """``(S, N, K+1)`` draws; those of a prompt depend on its own generator only."""
        logs = np.empty((len(self), draws, self.concentration.shape[1]))
        for n, random in enumerate(generators):
            alpha = np.tile(self.concentration[n], (draws, 1))
            # A gamma variate of shape a is one of shape a + 1 times u^(1/a): its log never underflows.
            logs[n] = np.log(random.standard_gamma(alpha + 1)) - random.standard_exponential(alpha.shape) / alpha
        return on_simplex(np.exp(logs - logs.max(-1, keepdims=True))).swapaxes(0, 1)

    def select(self, rows: Int[np.ndarray, " selected"]) -> Dirichlets:
        """Those of some prompts."""
        return Dirichlets(self.concentration[rows])

    @classmethod
    def concatenate(cls, parts: Sequence[Dirichlets]) -> Dirichlets:
        """Those of all prompts."""
        return cls(np.concatenate([part.concentration for part in parts]))


@dataclass(frozen=True)
class FlatProgram:
    """A Dirichlet over the weights that reads no evidence.

    Attributes:
        experts: K names. concentration: of each of the K + 1 components, > 0.
    """

    experts: Sequence[str]
    concentration: float

    @property
    def fingerprint(self) -> str:
        """A digest of all there is to it."""
        return hashlib.sha256(repr(("flat", tuple(self.experts), self.concentration)).encode()).hexdigest()

    def answer(self, evidence: Evidence, pi: Float[np.ndarray, " component"]) -> Dirichlets:
        """The Dirichlet of as much concentration in all, its mean the prior's shares, for each prompt."""
        return Dirichlets(np.tile(self.concentration * (len(self.experts) + 1) * pi, (len(evidence), 1)))
