"""What a dispatcher is fitted on: evidence with labels and known weights, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.errors import TensorError

__all__ = ["TrainingSet"]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Evidence of N prompts, and what is known of them.

    Args:
        evidence: the prompts.
        labels: ``(N,)`` expert index, −1 where unknown or where the weights are known.
        known: ``(N, K+1)`` known weights, NaN rows where unknown.
    """

    evidence: Evidence
    labels: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, evidence: Evidence, labels: object, mixtures: object, n_experts: int) -> TrainingSet:
        """Check labels and mixtures as users give them, ``None`` for none; known mixtures win over labels.

        Raises:
            TensorError: labels outside −1 … K−1, mixtures off the simplex, or another N.
        """
        given = _labels(labels, len(evidence), n_experts)
        known = _mixtures(mixtures, len(evidence), n_experts + 1)
        return cls(evidence, np.where(np.isfinite(known).all(1), -1, given), known)

    @property
    def targets(self) -> np.ndarray:
        """``(N, K+1)`` known weights, one-hot for labels, NaN rows where neither is known."""
        out, labelled = self.known.copy(), self.labels >= 0
        out[labelled] = np.eye(self.known.shape[1])[self.labels[labelled]]
        return out

    def observed(self, prompts: Prompts) -> Prompts:
        """The N prompts with their labels and known weights."""
        known = torch.as_tensor(self.known, dtype=prompts.lengths.dtype)
        return replace(
            prompts,
            labels=torch.from_numpy(self.labels) if (self.labels >= 0).any() else None,
            known=known if torch.isfinite(known).any() else None,
        )


def _labels(y: object, count: int, n_experts: int) -> np.ndarray:
    if y is None:
        return np.full(count, -1)
    labels = np.asarray(y)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise TensorError(f"expected {count} integer labels, got {labels.dtype} of shape {labels.shape}")
    if count and (labels.min() < -1 or labels.max() >= n_experts):
        raise TensorError(f"expected labels from -1 to {n_experts - 1}, got {labels.min()} to {labels.max()}")
    return labels.astype(np.int64)


def _mixtures(mixtures: object, count: int, width: int) -> np.ndarray:
    if mixtures is None:
        return np.full((count, width), np.nan)
    known = np.array(mixtures, dtype=np.float64)
    if known.shape != (count, width):
        raise TensorError(f"expected mixtures of shape {(count, width)}, base last, got {known.shape}")
    rows = known[~np.isnan(known).all(1)]
    if not (np.isfinite(rows).all() and (rows >= 0).all() and np.allclose(rows.sum(1), 1, atol=1e-4)):
        raise TensorError("expected mixtures on the simplex or rows of NaN, got rows that do not sum to 1")
    return known / known.sum(1, keepdims=True)
