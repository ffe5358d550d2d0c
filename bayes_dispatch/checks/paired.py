"""Two systems on the same prompts: the mean difference of their scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from scipy.stats import t

from bayes_dispatch.arguments import fraction
from bayes_dispatch.dispatcher.arrays import as_values
from bayes_dispatch.errors import TensorError

__all__ = ["PairedComparison", "paired_comparison"]


@dataclass(frozen=True)
class PairedComparison:
    """Mean of one system's scores minus another's.

    Attributes:
        difference: the mean.
        standard_error: of it.
        count: prompts. clusters: independent groups of them; as many as prompts where each stands alone.
    """

    difference: float
    standard_error: float
    count: int
    clusters: int

    def interval(self, probability: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the difference, by Student's t with one degree of freedom less than clusters.

        Raises:
            ConfigError: a probability outside 0 to 1.
        """
        half = float(t.ppf((1 + fraction("a probability", probability)) / 2, self.clusters - 1)) * self.standard_error
        return self.difference - half, self.difference + half


def paired_comparison(
    one: Float[np.ndarray, " prompt"],
    other: Float[np.ndarray, " prompt"],
    clusters: Shaped[np.ndarray, " prompt"] | None = None,
) -> PairedComparison:
    """Compare two systems by their scores of the same prompts.

    With clusters, prompts within one may be correlated in any way (Liang & Zeger 1986, scaled by G / (G − 1)).

    Args:
        one, other: ``(N,)`` scores of each prompt under the two systems.
        clusters: ``(N,)`` which group each prompt belongs to, such as its document or the seed of its system; any
            values. Each prompt stands alone by default.

    Returns:
        The mean of ``one − other`` with its standard error.

    Raises:
        TensorError: other lengths, scores that are not finite, or fewer than two prompts or clusters.
    """
    first = as_values(one, "scores")
    difference = first - as_values(other, "scores of the other system", len(first))
    names = np.arange(len(first)) if clusters is None else np.asarray(clusters)
    if names.shape != first.shape:
        raise TensorError(f"expected clusters of shape {first.shape}, got {names.shape}")
    unique, group = np.unique(names, return_inverse=True)
    if len(unique) < 2:
        raise TensorError(f"expected at least 2 {'prompts' if clusters is None else 'clusters'}, got {len(unique)}")
    mean = difference.mean()
    sums = np.bincount(group, difference - mean)
    error = np.sqrt(len(unique) / (len(unique) - 1) * (sums**2).sum()) / len(first)
    return PairedComparison(float(mean), float(error), len(first), len(unique))
