"""The projection of the hidden view: affine, out of fold for its own prompts, indifferent to units, principal
components without targets. Bad settings are refused."""

import numpy as np
import pytest

from bayes_dispatch.dispatcher.evidence.projection import FeatureMap, FeatureSettings, fit_feature_map
from bayes_dispatch.errors import ConfigError, TensorError

SETTINGS = FeatureSettings(dimensions=3, folds=4)


def world(count: int = 120, raw: int = 10, signal: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Raw features of three classes, one-hot targets; every fifth target is unknown."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % 3
    targets = np.eye(4)[classes]
    hidden = signal * rng.normal(size=(3, raw))[classes] + rng.normal(size=(count, raw))
    targets[::5] = np.nan
    return hidden, targets


def test_shapes_and_scale() -> None:
    hidden, targets = world()
    feature_map, features = fit_feature_map(hidden, targets, SETTINGS, 0)
    assert features.shape == feature_map(hidden).shape == (120, 3)
    known = np.isfinite(targets[:, 0])
    assert features[known].std(axis=0).max() == pytest.approx(1)
    np.testing.assert_allclose(features[~known], feature_map(hidden[~known]), atol=1e-9)


def test_classes_part() -> None:
    """Within-class variation is a small share along the discriminant axes of classes that are far apart."""
    hidden, targets = world()
    feature_map, _ = fit_feature_map(hidden, targets, SETTINGS, 0)
    classes = np.arange(120) % 3
    scores = feature_map(hidden)[:, :2]
    within = scores - np.stack([scores[classes == k].mean(0) for k in range(3)])[classes]
    assert (within.std(0) < 0.3 * scores.std(0)).all()


def test_own_features_are_out_of_fold() -> None:
    """On pure noise the map parts the prompts that it was fitted on; out-of-fold features do not.

    Fixed seed; with 60 raw features of 80 prompts the map's own separation is large beyond doubt.
    """
    rng = np.random.default_rng(0)
    hidden, classes = rng.normal(size=(80, 60)), np.arange(80) % 2
    settings = FeatureSettings(dimensions=1, folds=5, penalties=(1.0,))
    feature_map, own = fit_feature_map(hidden, np.eye(3)[classes], settings, 0)
    inside, outside = (abs(np.corrcoef(f[:, 0], classes)[0, 1]) for f in (feature_map(hidden), own))
    assert inside > 0.8
    assert outside < 0.4


def test_by_default_all_experts_can_be_told_apart() -> None:
    """Twenty classes at the corners of a simplex need nineteen directions; fixed seed."""
    rng, classes = np.random.default_rng(0), np.arange(600) % 20
    hidden = 4.0 * np.eye(20, 30)[classes] + rng.normal(size=(600, 30))

    def right(settings: FeatureSettings) -> float:
        _, own = fit_feature_map(hidden, np.eye(21)[classes], settings, 0)
        means = np.stack([own[classes == k].mean(0) for k in range(20)])
        return float((np.square(own[:, None] - means).sum(-1).argmin(1) == classes).mean())

    assert FeatureSettings().kept(8) == FeatureSettings().kept(2) == 12
    assert 1 - right(FeatureSettings()) < 0.5 * (1 - right(FeatureSettings(dimensions=12)))


@pytest.mark.parametrize(("count", "classes"), [(40, 20), (60, 30), (20, 10)])
def test_few_prompts_of_many_experts(count: int, classes: int) -> None:
    """Directions within class are no more than there are: none is noise of rounding, beside which all else vanishes."""
    hidden = np.random.default_rng(0).normal(size=(count, 200))
    feature_map, own = fit_feature_map(hidden, np.eye(classes + 1)[np.arange(count) % classes], FeatureSettings(), 0)
    for features in (feature_map(hidden), own):
        assert features.std(0).min() > 1e-2 * features.std(0).max()


def test_units_do_not_matter() -> None:
    """Shifting and scaling each raw feature leaves the features as they are, up to their signs."""
    hidden, targets = world()
    rng = np.random.default_rng(1)
    scaled = hidden * rng.uniform(0.1, 10, 10) + rng.normal(size=10) * 100
    (a, own_a), (b, own_b) = (fit_feature_map(h, targets, SETTINGS, 0) for h in (hidden, scaled))
    np.testing.assert_allclose(np.abs(own_a), np.abs(own_b), atol=1e-5)
    np.testing.assert_allclose(np.abs(a(hidden)), np.abs(b(scaled)), atol=1e-5)


def test_without_targets_it_is_principal_components() -> None:
    hidden, targets = world()
    feature_map, features = fit_feature_map(hidden, np.full_like(targets, np.nan), SETTINGS, 0)
    np.testing.assert_allclose(features, feature_map(hidden), atol=1e-9)
    left, singular, _ = np.linalg.svd(hidden - hidden.mean(0), full_matrices=False)
    scores = left[:, :3] * singular[:3]
    np.testing.assert_allclose(np.abs(features), np.abs(scores / scores.std(0).max()), atol=1e-9)


def test_few_prompts_give_few_features() -> None:
    hidden, targets = world()
    assert fit_feature_map(hidden[:2], targets[:2], SETTINGS, 0)[1].shape == (2, 2)


def test_the_same_seed_gives_the_same_folds() -> None:
    hidden, targets = world(signal=0.5)
    first, second, other = (fit_feature_map(hidden, targets, SETTINGS, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_another_width() -> None:
    with pytest.raises(TensorError, match="expected 2 features in the hidden view, got 3"):
        FeatureMap(np.zeros(2), np.eye(2))(np.zeros((4, 3)))


@pytest.mark.parametrize("changes", [{"dimensions": 0}, {"folds": 1}, {"penalties": ()}, {"penalties": (0.0,)}])
def test_bad_settings(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^expected .* got [^\n]+$"):
        FeatureSettings(**changes)  # type: ignore[arg-type]


def test_a_constant_view_tells_nothing() -> None:
    """No direction varies: features are zero, not NaN."""
    hidden, targets = np.ones((60, 4)), np.eye(4)[np.arange(60) % 3]
    feature_map, own = fit_feature_map(hidden, targets, FeatureSettings(dimensions=3), 0)
    assert np.isfinite(feature_map(hidden)).all()
    np.testing.assert_allclose(own, 0, atol=1e-6)


def test_one_mixture_of_all_prompts_tells_nothing_apart() -> None:
    """It is as if no weights were known."""
    hidden, _ = world()
    found, features = fit_feature_map(hidden, np.tile([0.5, 0.5, 0.0, 0.0], (120, 1)), SETTINGS, 0)
    expected, without = fit_feature_map(hidden, np.full((120, 4), np.nan), SETTINGS, 0)
    np.testing.assert_array_equal(found.projection, expected.projection)
    np.testing.assert_array_equal(features, without)


@pytest.mark.filterwarnings("error")
def test_rounding_is_no_direction() -> None:
    """Where columns repeat each other, features beyond what they tell vary by nothing."""
    hidden, targets = world(raw=2)
    feature_map, features = fit_feature_map(np.tile(hidden, 4), targets, FeatureSettings(dimensions=5, folds=4), 0)
    assert (features[:, :2].std(axis=0) > 0.1).all()
    np.testing.assert_allclose(features[:, 2:], 0, atol=1e-6)
    assert np.abs(feature_map(np.tile(world(raw=2, seed=1)[0], 4))).max() < 100


def test_copies_of_a_prompt_are_in_one_fold() -> None:
    """Features of labels drawn by chance tell next to nothing of them, however often a prompt is there."""
    random = np.random.default_rng(0)
    hidden, classes = random.normal(size=(60, 40)), random.integers(2, size=60)
    told = []
    for copies in (1, 4):
        rows = random.permutation(np.repeat(np.arange(60), copies))
        settings = FeatureSettings(dimensions=1, penalties=(1.0,))
        _, features = fit_feature_map(hidden[rows], np.eye(3)[classes[rows]], settings, 0)
        told.append(abs(np.corrcoef(features[:, 0], classes[rows])[0, 1]))
    assert max(told) < 0.5


def test_copies_do_not_choose_the_penalty() -> None:
    """Of labels drawn by chance the largest one is best, under which all features count alike."""
    random = np.random.default_rng(1)
    hidden, classes = random.normal(size=(60, 40)), random.integers(2, size=60)
    rows, settings = np.repeat(np.arange(60), 4), FeatureSettings(dimensions=1, penalties=(1e-3, 1e6))
    alone, copied = (fit_feature_map(hidden[n], np.eye(3)[classes[n]], settings, 0)[0] for n in (rows[::4], rows))
    assert abs(np.corrcoef(alone.projection[:, 0], copied.projection[:, 0])[0, 1]) > 0.99


def test_copies_are_no_more_prompts() -> None:
    """As few as have no supervised projection have none when they are copied."""
    hidden, targets = world(15)
    few, copied = (fit_feature_map(np.repeat(hidden, n, 0), np.repeat(targets, n, 0), SETTINGS, 0)[0] for n in (1, 9))
    np.testing.assert_allclose(few.projection, copied.projection)
