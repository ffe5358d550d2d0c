"""The dispatcher keeps scikit-learn's protocol, with all, some or no labels.

Laws: scikit-learn's own checks; probabilities and weights are the dispatcher's without base; blends between classes;
permuted or renamed labels permute predictions; any number of rows per class; bad input leaves the former fit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from bayes_dispatch.dispatcher.classifier import DispatcherClassifier
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.errors import BayesDispatchError, ConfigError, LabelError

FAST: dict[str, Any] = {
    "dimensions": 4,
    "svi_steps": 5,
    "random_state": 0,
}
GOOD = FAST | {"svi_steps": 60}
NAMES = np.array(["sort", "base", "add"])


@pytest.mark.usefixtures("unchecked")  # it passes settings of wrong types
@pytest.mark.slow
@parametrize_with_checks([DispatcherClassifier(**FAST)])
def test_scikit_learn_accepts_it(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """(150, 5) vectors of three classes that are far apart, and the classes."""
    return make_blobs(150, 5, centers=3, cluster_std=1.0, random_state=3)


@pytest.fixture(scope="module")
def labelled(blobs: tuple[np.ndarray, np.ndarray]) -> DispatcherClassifier:
    """Fitted on all labels; not to be changed."""
    return DispatcherClassifier(**GOOD).fit(*blobs)


def test_probabilities_and_weights(labelled: DispatcherClassifier, blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs
    assert labelled.score(X, y) > 0.97
    assert labelled.classes_.tolist() == [0, 1, 2]
    assert labelled.n_features_in_ == 5
    raw = labelled.dispatcher_.predict_proba(X)
    np.testing.assert_allclose(labelled.predict_proba(X), raw[:, :3] / (1 - raw[:, 3:]), rtol=0, atol=1e-12)
    mean = labelled.dispatcher_.posterior(X, draws=4_000).mean
    np.testing.assert_allclose(labelled.weights(X), mean[:, :3] / (1 - mean[:, 3:]), rtol=0, atol=0.04)


def test_half_way_between_two_classes_is_half_of_each(labelled: DispatcherClassifier) -> None:
    centers = make_blobs(3, 5, centers=3, random_state=3, return_centers=True)[2]
    weights = labelled.weights(centers[:2].mean(0, keepdims=True))[0]
    assert weights[2] < min(weights[0], weights[1])
    assert weights.max() < labelled.weights(centers[:1]).max() - 0.2


def test_far_from_everything_is_still_a_distribution(labelled: DispatcherClassifier) -> None:
    for found in (labelled.predict_proba, labelled.weights):
        np.testing.assert_allclose(found(np.full((2, 5), 1e9)).sum(1), 1, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_names_of_classes_do_not_matter(labelled: DispatcherClassifier, blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs
    named = clone(labelled).fit(X, np.sort(NAMES)[y])  # in the order of the integers
    assert named.classes_.tolist() == ["add", "base", "sort"]
    np.testing.assert_array_equal(named.predict_proba(X), labelled.predict_proba(X))
    assert named.predict(X).tolist() == np.sort(NAMES)[labelled.predict(X)].tolist()


def test_permuted_labels_permute_predictions(
    labelled: DispatcherClassifier, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    X, y = blobs
    permuted = clone(labelled).fit(X, NAMES[y])
    assert (permuted.predict(X) == NAMES[labelled.predict(X)]).mean() > 0.97
    columns = np.searchsorted(permuted.classes_, NAMES)
    np.testing.assert_allclose(permuted.weights(X)[:, columns], labelled.weights(X), rtol=0, atol=0.3)


def test_some_labels(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs
    some = np.where(np.arange(150) < 30, NAMES[y], "?")
    fitted = DispatcherClassifier(**GOOD, unlabelled="?").fit(X, some)
    assert fitted.classes_.tolist() == sorted(NAMES.tolist())
    assert fitted.score(X, NAMES[y]) > 0.9
    assert DispatcherClassifier(**FAST).fit(X, some).classes_.tolist() == sorted([*NAMES.tolist(), "?"])


def test_a_weight_says_how_often_a_row_counts(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    """As if it were there so often, wherever it stands; without weight it may have a class of its own."""
    X, y = blobs[0][:40], blobs[1][:40]
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 3, 40)
    weights[0], labels = 0, np.where(np.arange(40) == 0, 7, y)
    weighted = DispatcherClassifier(**FAST).fit(X, labels, sample_weight=weights)
    rows = rng.permutation(np.repeat(np.arange(40), weights))
    repeated = DispatcherClassifier(**FAST).fit(X[rows], y[rows])
    np.testing.assert_array_equal(weighted.classes_, repeated.classes_)
    np.testing.assert_array_equal(weighted.predict_proba(X), repeated.predict_proba(X))
    for bad, message in (
        (weights / 2, "got 0.5"),
        (np.eye(40)[0], "counts 2 to 10,000,000 rows, got 1"),
        (np.full(40, 1e6), "counts 2 to 10,000,000 rows, got 40000000"),
        (np.full(40, 1e300), r"counts 2 to 10,000,000 rows, got 4e\+301"),
        (-weights, "egative"),
    ):
        with pytest.raises(ValueError, match=message):
            DispatcherClassifier(**FAST).fit(X, y, bad)


@pytest.mark.filterwarnings("ignore:The number of unique classes")
@pytest.mark.parametrize(("rows", "classes"), [(20, 20), (21, 20)])
def test_as_many_classes_as_rows(rows: int, classes: int) -> None:
    """Nothing varies within a class of one row, so that nothing can be told of the directions between classes."""
    X = np.random.default_rng(0).normal(size=(rows, 5))
    found = DispatcherClassifier(**FAST).fit(X, np.arange(rows) % classes).predict_proba(X)
    np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-12)


def test_no_labels(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs
    fitted = DispatcherClassifier(3, **GOOD, unlabelled=-1).fit(X)
    assert fitted.classes_.tolist() == [0, 1, 2]
    assert adjusted_rand_score(y, fitted.predict(X)) > 0.8  # 0 by chance
    marked = clone(fitted).fit(X, np.full(150, -1))
    np.testing.assert_array_equal(marked.predict_proba(X), fitted.predict_proba(X))


@pytest.mark.slow
def test_randomness(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs

    def found(random_state: Any) -> np.ndarray:
        return DispatcherClassifier(**FAST | {"random_state": random_state}).fit(X, y).predict_proba(X)

    three, fresh = found(3), found(None)
    np.testing.assert_array_equal(three, found(np.random.RandomState(3)))
    assert not np.array_equal(three, found(4))
    assert not np.array_equal(fresh, found(None))


@pytest.mark.slow
def test_in_a_pipeline_and_a_search(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs
    pipeline = make_pipeline(StandardScaler(), DispatcherClassifier(**FAST))
    assert pipeline.fit(X * [1, 10, 100, 1, 1], y).score(X * [1, 10, 100, 1, 1], y) > 0.9
    search = GridSearchCV(pipeline, {"dispatcherclassifier__dimensions": [1, 3]}, cv=2, error_score="raise")
    search.fit(X, y)
    assert search.best_params_ == {"dispatcherclassifier__dimensions": 3}
    assert search.best_estimator_[-1].dispatcher_.features.dimensions == 3


def test_clone_keeps_the_settings_alone(labelled: DispatcherClassifier) -> None:
    again = clone(labelled)
    assert again.get_params() == labelled.get_params()
    assert not hasattr(again, "dispatcher_")


def test_a_saved_dispatcher_gives_the_same_probabilities(
    labelled: DispatcherClassifier, blobs: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    X, _ = blobs
    labelled.dispatcher_.save(tmp_path / "dispatcher")
    loaded = Dispatcher.load(tmp_path / "dispatcher")
    assert loaded.experts == ("class 0", "class 1", "class 2")
    np.testing.assert_array_equal(loaded.predict_proba(X), labelled.dispatcher_.predict_proba(X))


@pytest.mark.parametrize(
    ("settings", "y", "error", "message"),
    [
        ({}, [1] * 150, LabelError, "labels of at least two classes, got one class, 1"),
        ({"unlabelled": -1}, [1] * 149 + [-1], LabelError, "labels of at least two classes, got one class, 1"),
        ({"unlabelled": -1}, [-1] * 150, LabelError, "n_components classes to find without any, got neither"),
        ({"n_components": 1}, None, ConfigError, "expected n_components to be a whole number ≥ 2, got 1"),
        (
            {"random_state": -1},
            [0, 1] * 75,
            ConfigError,
            "expected random_state to be a whole number from 0 .*, got -1",
        ),
        ({"random_state": 1.5}, [0, 1] * 75, ConfigError, "expected random_state to be a whole number .*, got 1.5"),
        ({"dimensions": 0}, [0, 1] * 75, ConfigError, "expected dimensions to be a whole number from 1 .*, got 0"),
        ({"svi_steps": 0}, [0, 1] * 75, ConfigError, "expected steps to be a whole number from 1 "),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(
    blobs: tuple[np.ndarray, np.ndarray],
    settings: dict[str, Any],
    y: list[int] | None,
    error: type[BayesDispatchError],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        DispatcherClassifier(**FAST | settings).fit(blobs[0], y)
    assert "\n" not in str(caught.value)


def test_a_fit_that_fails_leaves_the_former_one(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs
    fitted = DispatcherClassifier(**FAST).fit(X, y)
    before = fitted.predict_proba(X)
    with pytest.raises(LabelError):
        fitted.fit(X, np.zeros(150, int))
    np.testing.assert_array_equal(fitted.predict_proba(X), before)
    fresh = DispatcherClassifier(**FAST)
    with pytest.raises(LabelError):
        fresh.fit(X, np.zeros(150, int))
    with pytest.raises(NotFittedError):
        fresh.predict(X)


def test_a_label_error_is_a_value_error(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="requires y to be passed"):
        DispatcherClassifier(**FAST).fit(blobs[0])
    with pytest.raises(ValueError, match="one class"):
        DispatcherClassifier(**FAST).fit(blobs[0], np.zeros(150))
