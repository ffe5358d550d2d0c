"""The dispatcher as a scikit-learn classifier: one view, an array; classes for experts; no base."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from bayes_dispatch.arguments import whole
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.errors import LabelError

__all__ = ["DispatcherClassifier"]

MOST_ROWS = 10_000_000  # rows, which are repeated as often as they count


class DispatcherClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Posterior probabilities of classes, and expected shares of them, from vectors.

    A thin wrapper of :class:`Dispatcher` for use in pipelines and searches. Each class is an expert. What the
    dispatcher gives to base is dropped, and the rest renormalised.

    Args:
        n_components: number of classes where no label is known; ``None`` where labels are.
        unlabelled: the value in ``y`` that marks an unknown label; ``None`` where every value is a class. ``-1`` is
            scikit-learn's convention for semi-supervised fits, but a class of its own by default.
        dimensions: features that the vectors are projected to; by default twelve, or four more than classes.
        svi_steps: optimiser steps of the program's globals.
        svi_learning_rate: of them, at the start.
        random_state: seed, NumPy ``RandomState``, or ``None`` for another fit each time.

    Attributes:
        classes_: ``(K,)`` the classes in order; 0 … K−1 where no label was known.
        n_features_in_: width of the vectors.
        dispatcher_: the fitted dispatcher, which alone is to be saved; its experts have the classes' names.

    Example:
        >>> X, y = load_iris(return_X_y=True)  # doctest: +SKIP
        >>> cross_val_score(make_pipeline(StandardScaler(), DispatcherClassifier()), X, y)  # doctest: +SKIP
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        unlabelled: Any = None,
        dimensions: int | None = None,
        svi_steps: int = 200,
        svi_learning_rate: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.unlabelled = unlabelled
        self.dimensions = dimensions
        self.svi_steps = svi_steps
        self.svi_learning_rate = svi_learning_rate
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.n_components is None
        return tags

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DispatcherClassifier:
        """Fit to vectors, with all, some or no labels; the order of the rows does not matter.

        Args:
            X: ``(N, F)`` finite numbers.
            y: ``(N,)`` classes, ``unlabelled`` where unknown; ``None`` for no labels.
            sample_weight: ``(N,)`` whole numbers: how often each row counts, 0 for not at all, 10,000,000 together at
                most. 1 each by default.

        Raises:
            LabelError: labels of fewer than two classes, neither labels nor ``n_components``, or weights that are no
                counts.
            ConfigError: a setting or seed outside its range.
            ValueError: whatever else scikit-learn refuses in ``X`` or ``y``.
        """
        given = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        X, y = (given, None) if y is None else given
        if sample_weight is not None:
            rows = np.repeat(np.arange(len(X)), _counts(sample_weight, X))
            X, y = X[rows], None if y is None else y[rows]
        classes, codes = self._classes(y, len(X))
        given_seed = self.random_state
        if not (given_seed is None or isinstance(given_seed, np.random.RandomState)):
            given_seed = whole("random_state", given_seed, 0, 2**32 - 1)
        seed = int(check_random_state(given_seed).randint(2**31 - 1))
        dispatcher = Dispatcher(
            [f"class {label}" for label in classes],  # the prefix lets a class be called "base"
            seed,
            SVISettings(self.svi_steps, self.svi_learning_rate),
            FeatureSettings(self.dimensions),
            Admixture(temper=1.0),  # rows of one class each cannot tell how wide the noise of mixtures is
        )
        order = np.lexsort((codes, *X.T))
        self.classes_, self.dispatcher_ = classes, dispatcher.fit(X[order], codes[order])
        return self

    def predict_proba(self, X: Any) -> Float[np.ndarray, "prompt class"]:
        """``(N, K)`` probability that each class has the largest weight.

        Raises:
            ValueError: before ``fit``, or whatever scikit-learn refuses in ``X``.
        """
        X = self._checked(X)
        return _without_base(self.dispatcher_.predict_proba(X))

    def weights(self, X: Any) -> Float[np.ndarray, "prompt class"]:
        """``(N, K)`` posterior mean weights: the expected share of each class, where vectors mix several.

        Raises:
            ValueError: before ``fit``, or whatever scikit-learn refuses in ``X``.
        """
        evidence = Evidence.from_array(self._checked(X))
        return _without_base(self.dispatcher_.mean(evidence))

    def predict(self, X: Any) -> Shaped[np.ndarray, " prompt"]:
        """``(N,)`` the most probable class.

        Raises:
            ValueError: before ``fit``, or whatever scikit-learn refuses in ``X``.
        """
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def _classes(self, y: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The classes ``(K,)``, and the index of each label among them ``(N,)``, −1 where unknown."""
        codes = np.full(count, -1)
        if y is not None:
            check_classification_targets(y)
            marks = [self.unlabelled is not None and bool(label == self.unlabelled) for label in y.tolist()]
            known = ~np.array(marks)
            if known.any():
                classes, codes[known] = np.unique(y[known], return_inverse=True)
                if len(classes) < 2:
                    raise LabelError(f"expected labels of at least two classes, got one class, {classes[0]}")
                return classes, codes
        if self.n_components is None:
            raise LabelError("expected known labels, or n_components classes to find without any, got neither")
        return np.arange(whole("n_components", self.n_components, 2)), codes

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "dispatcher_")
        return validate_data(self, X, dtype=np.float64, reset=False)


def _counts(sample_weight: Any, X: np.ndarray) -> np.ndarray:
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    if (fractions := weights[weights % 1 != 0]).size:
        raise LabelError(f"expected sample_weight of whole numbers, how often each row counts, got {fractions[0]:g}")
    if not 2 <= weights.sum() <= MOST_ROWS:
        raise LabelError(f"expected sample_weight that counts 2 to {MOST_ROWS:,} rows, got {weights.sum():.10g}")
    return weights.astype(np.int64)


def _without_base(weights: np.ndarray) -> np.ndarray:
    """``(N, K)`` of ``(N, K+1)``; equal shares where base has all."""
    classes = weights[:, :-1] + np.finfo(float).tiny
    return classes / classes.sum(axis=1, keepdims=True)
