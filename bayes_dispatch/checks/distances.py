"""How far one posterior of the weights is from another, beside what two runs of the same sampler would show.

A distance between two samples is never zero, so each is read beside its Monte Carlo floor: the same statistic between
two halves of the reference. Posterior and floor are compared like for like: ``m`` draws of one side with half of the
reference's draws on the other, where ``m`` is the number of draws of the posterior, or of half the reference if that
is fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, TensorError

__all__ = ["Agreement", "agreement"]

BINS = 20  # of total variation
REPEATS = 8  # at most so many subsets of one half are compared with the other


@dataclass(frozen=True, eq=False)
class Agreement:
    """Distances of each prompt and component, all ``(prompt, K+1)``, and their Monte Carlo floors.

    Args:
        ks: Kolmogorov–Smirnov distance, the largest gap of the two distribution functions.
        ks_floor: the same between halves of the reference.
        total_variation: between histograms of 20 bins at equally spaced quantiles of the reference.
        total_variation_floor: the same between halves of the reference.
        mean_ratio: mean of the posterior by mean of the reference.
        mean_ratio_floor: the factor (≥ 1) by which the means of halves differ.
        sd_ratio: standard deviation of the posterior by that of the reference.
        sd_ratio_floor: the factor (≥ 1) by which the standard deviations of halves differ.
        draws: how many draws were compared with how many.
    """

    ks: np.ndarray
    ks_floor: np.ndarray
    total_variation: np.ndarray
    total_variation_floor: np.ndarray
    mean_ratio: np.ndarray
    mean_ratio_floor: np.ndarray
    sd_ratio: np.ndarray
    sd_ratio_floor: np.ndarray
    draws: tuple[int, int]

    @property
    def excess_ks(self) -> float:
        """Mean KS distance above its floor, over prompts and components."""
        return float((self.ks - self.ks_floor).mean())

    @property
    def excess_total_variation(self) -> float:
        """Mean total variation above its floor, over prompts and components."""
        return float((self.total_variation - self.total_variation_floor).mean())


def agreement(posterior: DispatchPosterior, reference: DispatchPosterior, resolution: float = 0.0) -> Agreement:
    """Compare a posterior with a reference, prompt by prompt and component by component.

    Args:
        posterior: independent draws, such as the guide's.
        reference: at least 8 draws, such as NUTS's: its first half and its second half (different chains, when their
            number is even) are taken for two independent runs.
        resolution: weights below it count as equal to it.

    Returns:
        Distances and floors ``(prompt, K+1)``. When both come from one distribution, distances and floors have the same
        mean; autocorrelation within chains raises the floors.

    Raises:
        TensorError: other prompts or components, or fewer than 2 draws, or 8 of the reference.
        ConfigError: a resolution outside [0, 1).
    """
    ours, theirs = posterior.weights, reference.weights
    if ours.shape[1:] != theirs.shape[1:] or posterior.experts != reference.experts:
        raise TensorError(
            f"expected the same prompts and components, got {ours.shape[1]} prompts of {list(posterior.experts)} "
            f"and {theirs.shape[1]} of {list(reference.experts)}"
        )
    if len(ours) < 2 or len(theirs) < 8:
        raise TensorError(f"expected at least 2 draws and 8 of the reference, got {len(ours)} and {len(theirs)}")
    if not 0 <= resolution < 1:
        raise ConfigError(f"expected a resolution from 0 to below 1, got {resolution}")
    ours, theirs = np.maximum(ours, resolution), np.maximum(theirs, resolution)
    half = len(theirs) // 2
    first, second = theirs[:half], theirs[half : 2 * half]
    size = min(len(ours), half)
    edges = np.quantile(theirs, np.linspace(0, 1, BINS + 1)[1:-1], axis=0)  # (BINS − 1, prompt, K+1)

    def both(distance: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Distance of the posterior, and floor: means over subsets of ``size`` draws and over the two halves."""
        halves = ((first, second), (second, first))
        value = [distance(part, half) for part in _subsets(ours, size) for half in (first, second)]
        floor = [distance(part, other) for one, other in halves for part in _subsets(one, size)]
        return np.mean(value, axis=0), np.mean(floor, axis=0)

    ks, ks_floor = both(_kolmogorov_smirnov)
    variation, variation_floor = both(lambda a, b: np.abs(_histogram(a, edges) - _histogram(b, edges)).sum(0) / 2)
    _, mean_floor = both(lambda a, b: np.abs(_log_ratio(a.mean(0), b.mean(0))))
    _, sd_floor = both(lambda a, b: np.abs(_log_ratio(a.std(0), b.std(0))))
    return Agreement(
        ks,
        ks_floor,
        variation,
        variation_floor,
        np.exp(_log_ratio(ours.mean(0), theirs.mean(0))),
        np.exp(mean_floor),
        np.exp(_log_ratio(ours.std(0), theirs.std(0))),
        np.exp(sd_floor),
        (size, half),
    )


def _subsets(weights: np.ndarray, size: int) -> list[np.ndarray]:
    """Disjoint subsets of ``size`` draws, each spread evenly over all: close draws of a chain are alike."""
    count = min(len(weights) // size, REPEATS)
    stride = len(weights) // size
    return [weights[: stride * size][start::stride] for start in range(count)]


def _kolmogorov_smirnov(
    a: Float[np.ndarray, "m prompt weight"], b: Float[np.ndarray, "n prompt weight"]
) -> Float[np.ndarray, "prompt weight"]:
    """The largest gap of the empirical distribution functions, ties and all."""
    values = np.concatenate([a, b])  # (m + n, prompt, weight)
    order = values.argsort(axis=0, kind="stable")
    steps = np.where(order < len(a), 1 / len(a), -1 / len(b)).cumsum(axis=0)
    ordered = np.take_along_axis(values, order, axis=0)
    last = np.concatenate([ordered[1:] != ordered[:-1], np.ones((1, *a.shape[1:]), bool)])  # of equal values
    return np.abs(np.where(last, steps, 0.0)).max(axis=0)


def _histogram(
    values: Float[np.ndarray, "draw prompt weight"], edges: Float[np.ndarray, "edge prompt weight"]
) -> Float[np.ndarray, "bin prompt weight"]:
    """Share of draws up to each edge and above the one before it."""
    below = np.stack([(values <= edge).mean(0) for edge in edges])
    return np.diff(below, axis=0, prepend=0.0, append=1.0)


def _log_ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Log a/b; 0 where both are 0."""
    tiny = np.finfo(np.float64).tiny
    return np.log(np.maximum(a, tiny)) - np.log(np.maximum(b, tiny))
