"""Plain classification, for which a dispatcher is not made: ``DispatcherClassifier`` beside logistic regression.

    python benchmarks/plain_classification.py            # a minute on one core, nearly all of it the dispatcher's
    python benchmarks/plain_classification.py --labels 3 # of each class; regression sees these rows alone
    python benchmarks/plain_classification.py --quick    # a smoke test; the numbers mean nothing

scikit-learn's own data sets, every row of one class; three tenths of the rows are held out. With the classifier comes
the ``Dispatcher`` inside of it, which also gives base a share: a row that it gives to base counts as wrong. Times are
of this process on the CPU, one thread.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.reliability import expected_calibration_error
from bayes_dispatch.dispatcher.classifier import DispatcherClassifier

__all__ = ["SETS", "Score", "first_of_each", "main", "scores", "table"]

SETS = {"iris": load_iris, "wine": load_wine, "breast_cancer": load_breast_cancer, "digits": load_digits}
HELD_OUT = 0.3


class Score(NamedTuple):
    """One method on one split.

    Attributes:
        accuracy, ece: of the held-out rows. log_score: their mean negative log probability, nats: less is better.
        fit: seconds. predict: milliseconds for all held-out rows.
    """

    accuracy: float
    log_score: float
    ece: float
    fit: float
    predict: float


def scores(name: str, seed: int, kept: int | None = None, **settings: int) -> dict[str, Score]:
    """Every method on one split, ``kept`` labels of each class known, or all; ``settings`` are the dispatcher's."""
    X, y = SETS[name](return_X_y=True)
    rows, held_out, labels, truth = train_test_split(X, y, test_size=HELD_OUT, random_state=seed, stratify=y)
    known = first_of_each(labels, kept or len(labels))
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    ours = DispatcherClassifier(unlabelled=-1, random_state=seed, **settings)
    scaled = make_pipeline(StandardScaler(), ours)  # as its own projection does, where labels are many
    few = rows[known], labels[known]
    methods: dict[str, Any] = {
        "logistic regression": (logistic, few),
        "the same, calibrated": (CalibratedClassifierCV(logistic, method="temperature", cv=min(5, kept or 5)), few),
        "DispatcherClassifier": (scaled, (rows, np.where(known, labels, -1))),
    }
    found = {}
    for method, (model, data) in methods.items():
        _, seconds = _timed(partial(model.fit, *data))
        found[method] = _judged(model.predict_proba, held_out, truth, seconds)
    inside = ours.dispatcher_.predict_proba
    found["Dispatcher, with base"] = _judged(lambda X: inside(scaled[0].transform(X)), held_out, truth, seconds)
    return found


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """``(N,)`` whether a row is among the first ``count`` of its class."""
    return np.array([np.sum(labels[:row] == label) < count for row, label in enumerate(labels)])


def _judged(predict: Callable[[np.ndarray], np.ndarray], X: np.ndarray, truth: np.ndarray, fit: float) -> Score:
    probabilities, seconds = _timed(lambda: predict(X))
    right = probabilities.argmax(1) == truth
    loss = log_loss(truth, probabilities, labels=range(probabilities.shape[1]))
    ece = expected_calibration_error(probabilities, truth)
    return Score(float(right.mean()), loss, ece, fit, 1e3 * seconds)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def table(name: str, splits: list[dict[str, Score]]) -> Table:
    """Means over splits, ± standard errors where there are several; times are medians."""
    rows = []
    for method in splits[0]:
        values = np.array([split[method] for split in splits])  # (splits, scores)
        error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
        cells = [f"{mean:.3f}" for mean in values[:, :3].mean(0)]
        if error is not None:
            cells = [f"{cell} ± {each:.3f}" for cell, each in zip(cells, error, strict=False)]
        fit, predict = np.median(values[:, 3:], axis=0)
        rows.append([method, *cells, f"{fit:.3g}", f"{predict:.3g}"])
    columns = ["", "accuracy", "log score", "ECE", "fit, s", "predict, ms"]
    return Table(f"{name}, splits: {len(splits)}", columns, rows)


def main(
    seeds: Annotated[int, typer.Option(help="how many splits", min=1)] = 3,
    labels: Annotated[int | None, typer.Option(help="known ones of each class; all by default", min=2)] = None,
    data: Annotated[list[str] | None, typer.Option(help="data sets; all by default")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke test")] = False,
) -> None:
    """Print a Markdown table for each data set."""
    torch.set_num_threads(1)
    names, settings = data or list(SETS), {}
    if quick:
        names, seeds, settings = names[:1], 1, {"svi_steps": 20}
    for name in names:
        splits = [scores(name, seed, labels, **settings) for seed in range(seeds)]
        print(f"{table(name, splits).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
