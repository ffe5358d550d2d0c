"""A supervised projection of the raw hidden view to the few dimensions that the generative model explains.

With labels or known mixtures: ridge regression of the known weights (equivalent to shrunken discriminant analysis up to
a rotation; Hastie, Buja and Tibshirani 1995), rotated and whitened within class, then filled with the principal
directions of what is left of the within-class variation. Without: principal components. Both are divided by the largest
total sd.

The supervised directions look sharper on the prompts they were fitted on than on new ones. Therefore the fit also
returns *out-of-fold* features of its own prompts, which are as noisy as new ones: the generative model learns from
those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh

from bayes_dispatch.arguments import real, set_whole, several
from bayes_dispatch.dispatcher.arrays import distinct_rows
from bayes_dispatch.errors import ConfigError, TensorError

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

__all__ = ["FeatureMap", "FeatureSettings", "fit_feature_map", "spread_of"]

ROUNDING = 1e-6  # of weights


@dataclass(frozen=True)
class FeatureSettings:
    """How the hidden view is projected.

    Args:
        dimensions: features that are kept, D; fewer where the view or the number of prompts is smaller. By default
            twelve, or four more than experts where that is more: with fewer than experts, some could not be told apart.
        folds: folds of the out-of-fold features.
        penalties: ridge penalties that cross-validation chooses from, for standardised features.
    """

    dimensions: int | None = None
    folds: int = 5
    penalties: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4)

    def __post_init__(self) -> None:
        set_whole(self, folds=2)
        if self.dimensions is not None:
            set_whole(self, dimensions=1)
        object.__setattr__(
            self,
            "penalties",
            tuple(real("a penalty", each, 0, above=True) for each in several("penalties", self.penalties)),
        )
        if not self.penalties:
            raise ConfigError("expected at least one penalty, got none")

    def kept(self, n_experts: int) -> int:
        """D for so many experts."""
        return max(12, n_experts + 4) if self.dimensions is None else self.dimensions


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """The affine map ``(hidden − center) @ projection``.

    Args:
        center: ``(F,)`` subtracted first.
        projection: ``(F, D)``.
    """

    center: np.ndarray
    projection: np.ndarray

    def __call__(self, hidden: Float[np.ndarray, "prompt raw"]) -> Float[np.ndarray, "prompt feature"]:
        """Project raw features ``(N, F)`` to ``(N, D)``.

        Raises:
            TensorError: another number of raw features than the map was fitted on.
        """
        if hidden.shape[1] != len(self.center):
            raise TensorError(f"expected {len(self.center)} features in the hidden view, got {hidden.shape[1]}")
        return (hidden - self.center) @ self.projection


def fit_feature_map(
    hidden: Float[np.ndarray, "prompt raw"],
    targets: Float[np.ndarray, "prompt weight"],
    settings: FeatureSettings,
    random_state: int,
) -> tuple[FeatureMap, Float[np.ndarray, "prompt feature"]]:
    """Fit the projection, and give the out-of-fold features of its own prompts.

    Args:
        hidden: ``(N, F)`` raw features.
        targets: ``(N, K+1)`` known weights (one-hot for labels), NaN rows where unknown.
        settings: the projection's settings.
        random_state: seed of the folds.

    Returns:
        The map, and ``(N, D)`` features: out-of-fold for prompts with targets, the map's own for the others. Copies of
        a prompt are in one fold.
    """
    from sklearn.linear_model import Ridge, RidgeCV  # slow to import, and for fits alone
    from sklearn.model_selection import KFold

    dimensions = settings.kept(targets.shape[1] - 1)
    if np.ptp(hidden, axis=0).max() == 0:  # nothing to project
        count = min(dimensions, hidden.shape[1])
        return FeatureMap(hidden[0], np.zeros((hidden.shape[1], count))), np.zeros((len(hidden), count))
    known = np.isfinite(targets).all(axis=1)
    seen = targets[:, np.nansum(targets, axis=0) > 0] if known.any() else targets[:, :0]
    rows = np.flatnonzero(known)
    of = distinct_rows(hidden[rows])
    count = int(of.max(initial=-1)) + 1
    spare = count - seen.shape[1]  # prompts beyond one for each class: without any, nothing is within a class
    if seen.shape[1] < 2 or count < 4 * settings.folds or spare < 1:
        return _principal(hidden, dimensions)
    if np.ptp(seen[known], axis=0).max() < ROUNDING:  # all of one mixture: no direction tells them apart
        return _principal(hidden, dimensions)
    center, spread = hidden[known].mean(axis=0), spread_of(hidden[known])
    x, y = (hidden - center) / spread, seen[known]
    split = KFold(settings.folds, shuffle=True, random_state=random_state % 2**32).split(range(count))
    folds = [(np.flatnonzero(~held), np.flatnonzero(held)) for held in (np.isin(of, some) for _, some in split)]
    alone = count == len(rows)  # each is no copy: it may be left out by itself
    penalty = RidgeCV(list(settings.penalties), cv=None if alone else folds).fit(x[known], y).alpha_
    coefficients = Ridge(penalty).fit(x[known], y).coef_.T  # (F, K')
    scores = x @ coefficients  # (N, K')
    for train, test in folds:
        fold = Ridge(penalty).fit(x[rows[train]], y[train])
        scores[rows[test]] = fold.predict(x[rows[test]]) - y.mean(axis=0)

    # Rotate to discriminant axes of the out-of-fold scores, unit variance within class.
    means, *_ = np.linalg.lstsq(y, scores[known], rcond=None)
    between, within = np.cov((y @ means).T), np.cov((scores[known] - y @ means).T)
    within += 1e-6 * np.trace(within) / len(within) * np.eye(len(within))
    kept = min(dimensions, seen.shape[1] - 1)
    axes = eigh(between, within)[1][:, ::-1][:, :kept]  # (K', kept)
    directions, features = coefficients @ axes, scores @ axes

    fill = min(dimensions, x.shape[1], spare) - kept  # what is within class has no more directions
    if fill > 0:
        extra = _residual_directions(x[known], y, directions, fill)
        directions, features = np.hstack([directions, extra]), np.hstack([features, x @ extra])
    scale = features[known].std(axis=0).max()
    return FeatureMap(center, directions / spread[:, None] / scale), features / scale


def spread_of(values: Float[np.ndarray, "prompt raw"]) -> Float[np.ndarray, " raw"]:
    """``(F,)`` the sd of each column, whatever its unit; of one that varies within rounding alone, its size."""
    size = np.abs(values).max(axis=0)
    spread = values.std(axis=0)
    return np.where(spread > 1e-9 * size, spread, np.where(size > 0, size, 1.0))


def _residual_directions(x: np.ndarray, y: np.ndarray, directions: np.ndarray, count: int) -> np.ndarray:
    """``(F, count)``: principal directions of x within class, uncorrelated with the given ones, of unit variance.

    Where x has fewer, the others stay as they are: what varies within rounding alone is not made large.
    """
    within = x - y @ np.linalg.lstsq(y, x, rcond=None)[0]
    explained, *_ = np.linalg.lstsq(within @ directions, within, rcond=None)  # (kept, F)
    pca = _fitted_pca(within - within @ directions @ explained, count)
    extra = pca.components_.T - directions @ (explained @ pca.components_.T)
    spread = (within @ extra).std(axis=0)
    return extra / np.where(spread > 1e-9 * np.abs(within).max(), spread, 1.0)


def _principal(hidden: np.ndarray, dimensions: int) -> tuple[FeatureMap, np.ndarray]:
    pca = _fitted_pca(hidden, min(dimensions, *hidden.shape))
    features = pca.transform(hidden)
    scale = features.std(axis=0).max() or 1.0
    return FeatureMap(pca.mean_, pca.components_.T / scale), features / scale


def _fitted_pca(values: np.ndarray, count: int) -> PCA:
    from sklearn.decomposition import PCA

    return PCA(count, svd_solver="full").fit(values)
