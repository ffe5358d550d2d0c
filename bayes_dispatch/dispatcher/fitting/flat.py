"""What a dispatcher knows of experts that nobody has examples of: that every mixture may be."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import betainc, gammainc

from bayes_dispatch.arguments import real
from bayes_dispatch.dispatcher.arrays import Frozen, on_simplex
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.settings import Admixture

__all__ = ["Dirichlets", "FlatProgram"]

NODES = 96  # of the quadrature of the largest weight


@dataclass(frozen=True, eq=False)
class Dirichlets(Frozen):
    """A Dirichlet over the weights of each of N prompts; what there is of :class:`Cells`, where nothing was read.

    Args:
        concentration: ``(N, K+1)``, positive.
    """

    concentration: np.ndarray
    log_evidence: ClassVar[None] = None

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
        steps, middle = np.diff(edges, axis=1), np.maximum((edges[:, 1:] + edges[:, :-1]) / 2, 1e-300)
        others = np.log(middle).sum(-1, keepdims=True) - np.log(middle)
        below = edges[:, 0].prod(-1, keepdims=True) * on_simplex(rows)  # F_k(g) is in proportion to g^α_k near 0
        return on_simplex((steps * np.exp(others)).sum(1) + below)[place.reshape(-1)]

    def draw(
        self, draws: int, generators: Sequence[np.random.Generator]
    ) -> tuple[Float[np.ndarray, "draw prompt weight"], None]:
        """``(S, N, K+1)`` draws, and no ratios to a prior; those of a prompt depend on its own generator only."""
        logs = np.empty((len(self), draws, self.concentration.shape[1]))
        for n, random in enumerate(generators):
            alpha = np.tile(self.concentration[n], (draws, 1))
            # A gamma variate of shape a is one of shape a + 1 times u^(1/a): its log never underflows.
            logs[n] = np.log(random.standard_gamma(alpha + 1)) - random.standard_exponential(alpha.shape) / alpha
        return on_simplex(np.exp(logs - logs.max(-1, keepdims=True))).swapaxes(0, 1), None


@dataclass(frozen=True)
class FlatProgram:
    """A Dirichlet over the weights that reads no evidence, with what a dispatcher asks of :class:`FittedDispatcher`.

    Args:
        experts: K names. concentration: of each of the K + 1 components.

    Raises:
        ConfigError: a concentration that is not positive.
    """

    experts: Sequence[str]
    concentration: float
    kind: ClassVar[str] = "flat"
    views: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "concentration", real("concentration", self.concentration, 0, above=True))

    @property
    def fingerprint(self) -> str:
        """A digest of all there is to it."""
        return hashlib.sha256(repr((self.kind, tuple(self.experts), self.concentration)).encode()).hexdigest()

    @property
    def initial(self) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` concentration of the serving prior before any event."""
        return np.full(len(self.experts) + 1, self.concentration)

    def prompts(self, evidence: Evidence) -> Prompts:
        """How long the prompts are: no view is read."""
        return Prompts(torch.from_numpy(evidence.known_lengths().copy()), {}, {})

    def labels(self, pi: Float[np.ndarray, " weight"]) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` label shares under ``pi``: the same."""
        return pi

    def prior_mean(self, labels: Float[np.ndarray, " weight"]) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` mean of the weights, under label shares."""
        return labels

    def answer(self, prompts: Prompts, labels: Float[np.ndarray, " weight"]) -> Dirichlets:
        """The Dirichlet of as much concentration in all, its mean the label shares, for each prompt."""
        return Dirichlets(np.tile(self.concentration * len(labels) * labels, (len(prompts), 1)))

    def pack(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What JSON holds, and no arrays."""
        return {"concentration": self.concentration}, {}

    @classmethod
    def unpack(
        cls, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray], experts: Sequence[str], program: Admixture
    ) -> FlatProgram:
        """The inverse of :meth:`pack`; arrays and program say nothing of it."""
        return cls(experts, document["concentration"])
