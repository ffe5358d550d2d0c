"""Classifiers with the same information as the dispatcher: hidden vectors, counts, surprise, lengths, known mixtures.

What a classifier cannot be told is left out: calibration in folds and Gaussians see pure prompts alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.inference.scoring.evidence_sets import KnownEvidence
from dispatching.methods import Answer

__all__ = ["FITS", "Classifier", "Fit", "Fitted", "fit_classifier"]

PENALTIES = (0.01, 0.1, 1.0, 10.0)
NEIGHBOURS = (5, 10, 20, 40)
HELD_OUT = 0.2  # of the prompts to fit on, which choose penalties, neighbours and temperatures

Numbers = Callable[[np.ndarray], np.ndarray]


class Fitted(NamedTuple):
    """What a fit gives: scaled features ``(N, F)`` to probabilities ``(N, K+1)``, and to −log density ``(N,)``."""

    probabilities: Numbers
    surprise: Numbers | None = None


Fit = Callable[[np.ndarray, np.ndarray, int], Fitted]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier of K+1 classes; its probabilities pass for shares."""

    scaler: StandardScaler
    fitted: Fitted

    def __call__(self, evidence: Evidence) -> Answer:
        x = self.scaler.transform(encoded(evidence))
        shares = self.fitted.probabilities(x)
        surprise = None if self.fitted.surprise is None else self.fitted.surprise(x)
        return Answer(shares, shares, 1 - shares[:, :-1].max(1), surprise)


def fit_classifier(fit: Fit, train: KnownEvidence, seed: int) -> Classifier:
    """Fit one to evidence of known weights."""
    x = encoded(train.evidence)
    scaler = StandardScaler().fit(x)
    return Classifier(scaler, fit(scaler.transform(x), targets(train), seed))


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


def replicated(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, classes and sample weights: a mixture is there once for each of its components."""
    rows, classes = np.nonzero(y > 1e-3)
    return x[rows], classes, y[rows, classes]


def cross_entropy(probabilities: np.ndarray, y: np.ndarray) -> float:
    """Mean −log probability of the components of ``y (N, K+1)``."""
    return float(-(y * np.log(np.maximum(probabilities, 1e-12))).sum(1).mean())


def logistic(x: np.ndarray, y: np.ndarray, penalty: float) -> LogisticRegression:
    """A logistic regression that takes known mixtures at their shares."""
    rows, classes, shares = replicated(x, y)
    return LogisticRegression(C=penalty, max_iter=1000).fit(rows, classes, sample_weight=shares)


def logistic_regression(x: np.ndarray, y: np.ndarray, seed: int) -> Fitted:
    """At the penalty of least held-out cross-entropy."""
    return Fitted(logistic(x, y, chosen_penalty(x, y, seed)[0]).predict_proba)


def temperature_scaled(x: np.ndarray, y: np.ndarray, seed: int) -> Fitted:
    """Logistic regression whose logits are divided by a temperature that held-out prompts choose (Guo et al. 2017)."""
    penalty, train, rest = chosen_penalty(x, y, seed)
    model = logistic(x[train], y[train], penalty)

    def scaled(inputs: np.ndarray, log_temperature: float) -> np.ndarray:
        logits = model.decision_function(inputs) / np.exp(log_temperature)
        raised = np.exp(logits - logits.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)

    found = minimize_scalar(lambda t: cross_entropy(scaled(x[rest], t), y[rest]), bounds=(-3, 3), method="bounded")
    return Fitted(lambda inputs: scaled(inputs, float(found.x)))


def calibrated(x: np.ndarray, y: np.ndarray, seed: int) -> Fitted:
    """Platt scaling in five folds, on pure prompts: the folds of a mixture's copies would overlap."""
    pure = y.max(1) == 1
    base = LogisticRegression(C=chosen_penalty(x, y, seed)[0], max_iter=1000)
    return Fitted(CalibratedClassifierCV(base, cv=5).fit(x[pure], y[pure].argmax(1)).predict_proba)


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


def chosen_penalty(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The penalty of least held-out cross-entropy, and the rows of both parts."""
    train, rest = split(len(x), seed)
    loss = {c: cross_entropy(logistic(x[train], y[train], c).predict_proba(x[rest]), y[rest]) for c in PENALTIES}
    return min(loss, key=lambda c: loss[c]), train, rest


def split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to choose by."""
    order = np.random.default_rng([seed, 8]).permutation(count)
    return order[int(HELD_OUT * count) :], order[: int(HELD_OUT * count)]


FITS: dict[str, Fit] = {
    "LogisticRegression": logistic_regression,
    "CalibratedClassifierCV": calibrated,
    "temperature-scaled softmax": temperature_scaled,
    "k nearest neighbours": nearest_neighbours,
    "GaussianMixture": gaussian_mixture,
}
