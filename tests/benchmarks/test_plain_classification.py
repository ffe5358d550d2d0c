"""Logistic regression's scores are scikit-learn's own; so many labels of each class are known as was asked for."""

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import plain_classification as plain

TINY = {"svi_steps": 2}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kept", [None, 3])
def test_every_method_is_scored(kept: int | None) -> None:
    found = plain.scores("iris", 1, kept, **TINY)
    X, y = load_iris(return_X_y=True)
    rows, held_out, labels, truth = train_test_split(X, y, test_size=0.3, random_state=1, stratify=y)
    some = np.concatenate([np.flatnonzero(labels == k)[:kept] for k in range(3)])
    scaler = StandardScaler().fit(rows[some])
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(rows[some]), labels[some])
    theirs = model.predict_proba(scaler.transform(held_out))
    score = found["logistic regression"]
    assert score.log_score == pytest.approx(log_loss(truth, theirs), rel=1e-3)
    assert score.accuracy == (theirs.argmax(1) == truth).mean()
    inside, ours = found["Dispatcher, with base"], found["DispatcherClassifier"]
    assert inside.log_score > ours.log_score  # what base has, the right class lacks
    assert [row[0] for row in plain.table("iris", [found]).rows] == list(found)


def test_labels_are_kept_class_by_class() -> None:
    labels = np.array([2, 0, 2, 2, 1, 0])
    assert plain.first_of_each(labels, 2).tolist() == [True, True, True, False, True, True]
