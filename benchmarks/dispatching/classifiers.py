"""Classifiers with the same information as the dispatcher: hidden vectors, counts, surprise, lengths, known mixtures.

Each is fitted twice: to prompts of one component, for which component that is, and to all, for shares. A fit to shares
blurs the probabilities of classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.inference.scoring.evidence_sets import KnownEvidence
from dispatching.methods import Answer

__all__ = ["FITS", "Classifier", "Fit", "Fitted", "fit_classifier"]

PENALTIES = (0.01, 0.1, 1.0, 10.0)
NEIGHBOURS = (5, 10, 20, 40)
HELD_OUT = 0.2  # of the prompts to fit on, which choose penalties and neighbours
FOLDS = 5

Numbers = Callable[[np.ndarray], np.ndarray]


class Fitted(NamedTuple):
    """What a fit gives: scaled features ``(N, F)`` to probabilities ``(N, K+1)``, and to −log density ``(N,)``."""

    probabilities: Numbers
    surprise: Numbers | None = None


Fit = Callable[[np.ndarray, np.ndarray, int], Fitted]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier of K+1 classes: ``best`` was fitted to prompts of one component, ``shares`` to all."""

    scaler: StandardScaler
    best: Fitted
    shares: Fitted

    def __call__(self, evidence: Evidence) -> Answer:
        x = self.scaler.transform(encoded(evidence))
        best = self.best.probabilities(x)
        surprise = None if self.best.surprise is None else self.best.surprise(x)
        return Answer(self.shares.probabilities(x), best, 1 - best[:, :-1].max(1), surprise)


def fit_classifier(fit: Fit, train: KnownEvidence, seed: int) -> Classifier:
    """Fit one to the evidence of known weights."""
    y = targets(train)
    known = np.isfinite(y).all(1)
    x, y = encoded(train.evidence)[known], y[known]
    scaler = StandardScaler().fit(x)
    x, pure = scaler.transform(x), y.max(1) == 1
    return Classifier(scaler, fit(x[pure], y[pure], seed), fit(x, y, seed))


def encoded(evidence: Evidence) -> np.ndarray:
    """``(N, F)`` what the dispatcher reads: hidden vectors, roots of count shares, surprise and log length."""
    columns = [evidence.views["hidden"]]
    if "counts" in evidence.views:
        counts = evidence.views["counts"]
        columns.append(np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1)))
    if "surprise" in evidence.views:
        columns.append(evidence.views["surprise"])
    columns.append(np.log(np.maximum(evidence.known_lengths(), 1))[:, None])
    return np.hstack(columns)


def targets(known: KnownEvidence) -> np.ndarray:
    """``(N, K+1)`` known weights, one-hot for labels."""
    one_hot = np.eye(known.mixtures.shape[1])[np.maximum(known.labels, 0)]
    return np.where(known.labels[:, None] >= 0, one_hot, known.mixtures)


def replicated(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, classes and sample weights: a mixture is there once for each of its components."""
    rows, classes = np.nonzero(y > 1e-3)
    return rows, classes, y[rows, classes]


def cross_entropy(probabilities: np.ndarray, y: np.ndarray) -> float:
    """Mean −log probability of the components of ``y (N, K+1)``."""
    return float(-(y * np.log(np.maximum(probabilities, 1e-12))).sum(1).mean())


def logistic(x: np.ndarray, y: np.ndarray, penalty: float) -> Numbers:
    """A logistic regression that takes known mixtures at their shares."""
    rows, classes, shares = replicated(y)
    model = LogisticRegression(C=penalty, max_iter=1000).fit(x[rows], classes, sample_weight=shares)
    return of_all_classes(model, y.shape[1])


def of_all_classes(model: LogisticRegression | CalibratedClassifierCV, count: int) -> Numbers:
    """Its probabilities ``(N, count)``: 0 of a class that no prompt had, such as base."""

    def probabilities(inputs: np.ndarray) -> np.ndarray:
        found = np.zeros((len(inputs), count))
        found[:, model.classes_] = model.predict_proba(inputs)
        return found

    return probabilities


def logistic_regression(x: np.ndarray, y: np.ndarray, seed: int) -> Fitted:
    """At the penalty of least held-out cross-entropy."""
    return Fitted(logistic(x, y, chosen_penalty(x, y, seed)))


def temperature_scaled(x: np.ndarray, y: np.ndarray, seed: int) -> Fitted:
    """The same with its logits over a temperature (Guo et al. 2017), which prompts choose that a fold did not fit."""
    rows, classes, shares = replicated(y)
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(x[rows], classes, rows)
    base = LogisticRegression(C=chosen_penalty(x, y, seed), max_iter=1000)
    model = CalibratedClassifierCV(base, method="temperature", cv=list(folds), ensemble=False)
    return Fitted(of_all_classes(model.fit(x[rows], classes, sample_weight=shares), y.shape[1]))


def nearest_neighbours(x: np.ndarray, y: np.ndarray, seed: int) -> Fitted:
    """Mean weights of the nearest prompts, mixtures among them, with one prompt's worth of uniform ones."""
    train, rest = split(len(x), seed)

    def smoothed(model: KNeighborsRegressor, inputs: np.ndarray) -> np.ndarray:
        k = model.n_neighbors
        return (k * model.predict(inputs) + 1 / y.shape[1]) / (k + 1)

    def loss(k: int) -> float:
        return cross_entropy(smoothed(KNeighborsRegressor(k).fit(x[train], y[train]), x[rest]), y[rest])

    model = KNeighborsRegressor(min((k for k in NEIGHBOURS if k <= len(train)), key=loss)).fit(x, y)
    return Fitted(lambda inputs: smoothed(model, inputs))


def gaussian_mixture(x: np.ndarray, y: np.ndarray, seed: int) -> Fitted:
    """A Gaussian for each label (and base) with a tied covariance, started at the labels' moments and fitted by EM."""
    pure = y.max(1) == 1
    inputs, labels = x[pure], y[pure].argmax(1)
    means = np.stack([inputs[labels == k].mean(0) for k in range(y.shape[1])])
    within = np.cov((inputs - means[labels]).T) + 1e-2 * np.eye(x.shape[1])
    weights = np.bincount(labels, minlength=y.shape[1]) / len(labels)
    model = GaussianMixture(
        y.shape[1],
        covariance_type="tied",
        reg_covar=1e-2,
        max_iter=500,
        weights_init=weights,
        means_init=means,
        precisions_init=np.linalg.inv(within),
        random_state=seed,
    ).fit(inputs)
    return Fitted(model.predict_proba, lambda rows: -model.score_samples(rows))


def chosen_penalty(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """The penalty of least held-out cross-entropy."""
    train, rest = split(len(x), seed)
    return min(PENALTIES, key=lambda c: cross_entropy(logistic(x[train], y[train], c)(x[rest]), y[rest]))


def split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to choose by."""
    order = np.random.default_rng([seed, 8]).permutation(count)
    return order[int(HELD_OUT * count) :], order[: int(HELD_OUT * count)]


FITS: dict[str, Fit] = {
    "LogisticRegression": logistic_regression,
    "temperature-scaled softmax": temperature_scaled,
    "k nearest neighbours": nearest_neighbours,
    "GaussianMixture": gaussian_mixture,
}
