"""The dispatcher's benchmarks run, and what they compare with is what it says."""

import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from sklearn.linear_model import LogisticRegression

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import dispatch
from dispatching.classifiers import FITS, Fit, encoded, fit_classifier, replicated, targets
from dispatching.data import Sizes, World, simulated
from dispatching.judging import SCORES

SIZES = Sizes(pure=20, mixed=30, judged=10, mixtures=40)


def test_the_smoke_test_prints_every_score_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch.main(seeds=1, data=["simulated"], quick=True)
    printed = capsys.readouterr().out
    for name in (*SCORES, *FITS, dispatch.REFERENCE):
        assert name in printed
    assert "nan" not in printed


def test_classifiers_answer_on_the_simplex_and_beat_chance() -> None:
    problem = simulated(0, SIZES)
    known = problem.pure[128]
    for fit in FITS.values():
        answer = fit_classifier(fit, problem.train, 0)(known.evidence)
        np.testing.assert_allclose(answer.shares.sum(1), 1)
        assert (answer.best.argmax(1) == known.labels).mean() > 0.7  # chance is .125
        foreign = fit_classifier(fit, problem.train, 0)(problem.foreign.evidence)
        assert answer.foreign.mean() < foreign.foreign.mean()


def test_replicated_rows_weigh_like_shares() -> None:
    """A logistic regression that cannot tell rows apart gives the shares that they were given at."""
    x = np.tile([[1.0]], (200, 1))
    y = np.tile([[0.9, 0.1]], (200, 1))
    rows, classes, shares = replicated(y)
    assert shares.sum() == pytest.approx(200)
    model = LogisticRegression(C=1e4).fit(x[rows], classes, sample_weight=shares)
    np.testing.assert_allclose(model.predict_proba(x[:1]), [[0.9, 0.1]], atol=1e-3)


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_which_component_it_is_follows_from_prompts_of_one_alone(fit: Fit) -> None:
    """Base's own are among these; shares follow from all."""
    train = simulated(0, SIZES).train
    found, y = fit_classifier(fit, train, 0), targets(train)
    x, answer = found.scaler.transform(encoded(train.evidence)), found(train.evidence)
    known = np.nan_to_num(train.mixtures)
    pure = (train.labels >= 0) | (known.max(1) == 1)
    np.testing.assert_array_equal(answer.best, fit(x[pure], y[pure], 0).probabilities(x))
    np.testing.assert_array_equal(answer.shares, fit(x, y, 0).probabilities(x))
    assert (known[pure, -1] == 1).any()
    if fit is not FITS["GaussianMixture"]:  # takes prompts of one component alone
        assert np.abs(answer.best - answer.shares).max() > 0.01


@pytest.mark.parametrize("name", ["LogisticRegression", "temperature-scaled softmax"])
def test_what_no_prompt_had_has_no_probability(name: str) -> None:
    train = simulated(0, SIZES).train
    without = train.select(np.flatnonzero(np.nan_to_num(train.mixtures)[:, -1] < 1e-3))
    answer = fit_classifier(FITS[name], without, 0)(train.evidence)
    for given in (answer.best, answer.shares):
        assert given.shape == (len(train.labels), 9)
        assert (given[:, -1] == 0).all()
        np.testing.assert_allclose(given.sum(1), 1)


def test_a_temperature_is_of_a_fit_to_all_prompts() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 5)), (np.arange(60) % 5 == 0).astype(int)
    fits = [FITS[name](x, np.eye(2)[labels], 0) for name in ("LogisticRegression", "temperature-scaled softmax")]
    plain, scaled = (np.log(fit.probabilities(x)) @ [1, -1] for fit in fits)
    np.testing.assert_allclose(plain / scaled, plain[0] / scaled[0])
    assert abs(plain[0] / scaled[0] - 1) > 0.05


def test_a_simulated_problem_is_a_function_of_its_seed() -> None:
    first, again, other = (simulated(seed, SIZES) for seed in (0, 0, 1))
    hidden = [problem.train.evidence.views["hidden"] for problem in (first, again, other)]
    np.testing.assert_array_equal(hidden[0], hidden[1])
    assert (hidden[0] != hidden[2]).all()
    assert not np.array_equal(first.mixed.evidence.views["hidden"][:10], hidden[0][:10])


def test_prompts_of_a_world_lie_at_the_means_of_its_experts() -> None:
    """Means over 4,000 prompts; 5 standard errors, 12 means: false alarms below 1e-5."""
    world = World(8, seed=0)
    values = world.draw(np.tile(np.eye(9)[2], (4000, 1)), np.full(4000, 128), seed=1).views["hidden"]
    error = values.std(0) / len(values) ** 0.5
    assert (np.abs(values.mean(0) - world.sites["M"][2].numpy()) < 5 * error).all()


def test_unknown_data_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="expected data sets of simulated, shipped, got 'real'"):
        dispatch.main(data=["real"])
