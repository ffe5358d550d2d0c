"""Coverage, Brier score and reliability: cases worked out by hand, exact posteriors, calibrated systems.

Laws: coverage by hand, exact posteriors cover their level, a curve is coverage at each level, simulations are at the
given weights and nearly nominal; ECE, Brier and reliability by hand, calibrated probabilities are within their errors
and sharpened ones are not, the order of prompts does not matter; what is no probability or label is refused.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.checks.coverage import calibrated_coverage, coverage_curve, interval_coverage, simulated_coverage
from bayes_dispatch.checks.reliability import (
    brier_score,
    confidence_curve,
    expected_calibration_error,
    reliability_curve,
)
from bayes_dispatch.dispatcher.conformal import Conformal, ConformalIntervals
from bayes_dispatch.dispatcher.fitting.flat import Dirichlets, FlatProgram
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.errors import ConfigError, NotFittedError, TensorError

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.estimator import Dispatcher


def spread(low: float, high: float, prompts: int = 1) -> DispatchPosterior:
    """First weight evenly between two ends, the second what is left."""
    first = np.linspace(low, high, 101)
    return DispatchPosterior(np.tile(np.stack([first, 1 - first], -1)[:, None], (1, prompts, 1)), ("a", "base"))


def test_coverage_by_hand() -> None:
    """Intervals .3–.5 and .5–.7: both truths are inside, none is; of the third prompt one component counts."""
    posterior = DispatchPosterior.concatenate([spread(0.2, 0.6, 2), spread(0.95, 0.97)])
    truth = np.array([[0.4, 0.6], [0.9, 0.1], [0.96, 0.04]])
    coverage = interval_coverage(posterior, truth, 0.5)
    assert coverage[:1] + coverage[2:] == (pytest.approx(3 / 5), 5, pytest.approx((4 * 0.2 + 0.01) / 5))
    residuals = np.array([2 - 0.6 * 2, 0 - 0.6 * 2, 1 - 0.6 * 1])
    assert coverage.standard_error == pytest.approx(np.sqrt((residuals**2).sum()) / 5)
    one = interval_coverage(spread(0.2, 0.6), truth[:1], 0.5)
    assert one[:3] == (1, 0, 2)
    assert one.width == pytest.approx(0.2)


def test_a_true_zero_is_not_always_inside() -> None:
    """Draws that are all next to 0 tie with it: it is inside half the intervals of level one half."""
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((400, 2_000)) < 0.9, 1e-9, 0.9)  # a mean of .09
    posterior = DispatchPosterior(np.stack([weights, 1 - weights], -1), ("a", "base"))
    truth = np.tile([0.0, 1.0], (2_000, 1))
    coverage = interval_coverage(posterior, truth, 0.5)
    assert abs(coverage.value - 0.5 / 0.9) < 5 * coverage.standard_error


def sparse(rng: np.random.Generator, prompts: int, words: int = 12) -> tuple[np.ndarray, DispatchPosterior]:
    """True weights of which many are next to 0, and draws from their exact posterior given some words."""
    alpha = np.full(8, 0.15)
    truth = rng.dirichlet(alpha, prompts)
    counts = np.stack([rng.multinomial(words, row) for row in truth])
    draws = np.stack([rng.dirichlet(alpha + row, 400) for row in counts], 1)
    return truth, DispatchPosterior(draws, (*"abcdefg", "base"))


def test_an_exact_posterior_covers_its_level() -> None:
    """Sparse weights and their exact posterior: every level within 4 standard errors; false alarms in 1 of 4,000 seeds.

    Among components chosen by their true weights it would cover less: 90% intervals hold fewer than 85%.
    """
    truth, posterior = sparse(np.random.default_rng(0), 2_000)
    for level in (0.1, 0.5, 0.9, 0.95):
        coverage = interval_coverage(posterior, truth, level)
        assert coverage.standard_error < 0.01
        assert abs(coverage.value - level) < 4 * coverage.standard_error
    low, high = posterior.interval(0.9)
    assert ((low <= truth) & (truth <= high))[truth > 0.02].mean() < 0.85


def test_bad_truth() -> None:
    with pytest.raises(TensorError, match=r"expected true weights of shape \(1, 2\), got \(2, 2\)"):
        interval_coverage(spread(0, 1), np.full((2, 2), 0.5))
    with pytest.raises(TensorError, match="do not sum to 1"):
        interval_coverage(spread(0, 1), np.full((1, 2), 0.6))
    with pytest.raises(TensorError, match="expected true weights on the simplex, got rows that are negative"):
        interval_coverage(spread(0, 1), np.array([[1.5, -0.5]]))
    many = DispatchPosterior(np.full((2, 1, 60), 1 / 60), tuple(map(str, range(60))))
    with pytest.raises(TensorError, match=r"expected a posterior mean above 0\.05, got none in 1 prompts"):
        interval_coverage(many, np.full((1, 60), 1 / 60))
    for levels in ([], [0.5, 0.5], [0.0, 0.5], [0.5, 1.0], [0.9, 0.5], [float("nan")]):
        with pytest.raises(ConfigError, match="expected levels that ascend between 0 and 1, got"):
            coverage_curve(spread(0, 1), np.full((1, 2), 0.5), levels)


def test_coverage_curve_is_coverage_at_each_level() -> None:
    rng = np.random.default_rng(0)
    posterior = DispatchPosterior(rng.dirichlet(np.ones(4), (100, 50)), (*"abc", "base"))
    truth = rng.dirichlet(np.ones(4), 50)
    curve = coverage_curve(posterior, truth, [0.3, 0.8])
    for index, level in enumerate([0.3, 0.8]):
        found = interval_coverage(posterior, truth, level)
        assert (curve.values[index], curve.standard_errors[index], curve.count, curve.widths[index]) == found
    np.testing.assert_array_equal(curve.levels, [0.3, 0.8])
    assert (np.diff(coverage_curve(posterior, truth, np.linspace(0.1, 0.9, 5)).values) > 0).all()


def test_calibration_error_by_hand() -> None:
    """Two bins: confidence .6 with accuracy 1/2, confidence .9 with accuracy 1."""
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.6, 0.4]])
    labels = np.array([0, 1, 1, 1])
    assert expected_calibration_error(probabilities, labels, bins=2) == pytest.approx((0.1 * 2 + 0.1 * 2) / 4)
    assert expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(abs(0.75 - 0.75))
    assert expected_calibration_error(np.eye(2), np.array([0, 1])) == 0  # more bins than prompts
    assert expected_calibration_error(np.eye(2), np.array([1, 0])) == 1


def test_brier_by_hand() -> None:
    assert brier_score(np.array([[0.8, 0.2], [0.5, 0.5]]), np.array([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(0.04)
    assert brier_score(np.eye(3), np.eye(3)[[1, 2, 0]]) == 2


def test_scores_refuse_what_is_no_probability(unchecked: None) -> None:
    half = np.full((2, 2), 0.5)
    for score, wanted in ((brier_score, half), (reliability_curve, np.array([0, 1]))):
        with pytest.raises(TensorError, match="expected probabilities on the simplex, got rows that are negative"):
            score(np.array([[0.5, 0.6], [0.5, 0.5]]), wanted)
        with pytest.raises(TensorError, match="expected probabilities on the simplex, got rows that are negative"):
            score(np.array([[1.5, -0.5], [0.5, 0.5]]), wanted)
        with pytest.raises(
            TensorError, match=r"expected probabilities of shape \(N, classes\), N ≥ 1, got shape \(2,\)"
        ):
            score(np.array([0.5, 0.5]), wanted)
    with pytest.raises(TensorError, match=r"expected truth of shape \(2, 2\), got \(1, 2\)"):
        brier_score(half, half[:1])
    for score in (reliability_curve, expected_calibration_error):
        with pytest.raises(TensorError, match=r"expected 2 integer labels, got int64 of shape \(3,\)"):
            score(half, np.array([0, 1, 0]))
        with pytest.raises(TensorError, match=r"expected 2 integer labels, got float64 of shape \(2,\)"):
            score(half, np.array([0.0, 1.0]))
        with pytest.raises(TensorError, match="expected labels from 0 to 1, got -1 to 0"):
            score(half, np.array([0, -1]))
    with pytest.raises(ConfigError, match="expected bins to be a whole number ≥ 1, got 0"):
        reliability_curve(half, np.array([0, 1]), 0)
    with pytest.raises(TensorError, match=r"expected 2 booleans as what is correct"):
        confidence_curve(np.array([0.5, 0.5]), np.array([True]))


def test_reliability_by_hand() -> None:
    """Three bins of two prompts; the errors are those of a calibrated system, not 0 where all are right."""
    top = np.array([0.9, 0.6, 0.5, 0.8, 1.0, 0.7])
    curve = reliability_curve(np.stack([top, 1 - top], 1), np.array([0, 1, 0, 1, 0, 0]), bins=3)
    np.testing.assert_array_equal(curve.counts, [2, 2, 2])
    np.testing.assert_allclose(curve.confidence, [0.55, 0.75, 0.95])
    np.testing.assert_allclose(curve.accuracy, [0.5, 0.5, 1.0])
    expected = np.sqrt([0.25 + 0.24, 0.21 + 0.16, 0.09]) / 2
    np.testing.assert_allclose(curve.standard_errors, expected)
    assert curve.expected_calibration_error == pytest.approx((0.05 + 0.25 + 0.05) / 3)


def test_error_by_chance_is_that_of_a_calibrated_system() -> None:
    """400 times 300 answers that are right as often as their confidence says; the mean is within four of its errors."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1.0, (400, 300))
    curves = [confidence_curve(each, rng.random(300) < each, bins=10) for each in confidence]
    found = np.array([[curve.expected_calibration_error, curve.error_by_chance] for curve in curves])
    error = found[:, 0].std() / 400**0.5
    assert abs(found[:, 0].mean() - found[:, 1].mean()) < 4 * error
    assert found[:, 1].mean() > 0.04  # what an ECE of .04 may be worth


def test_reliability_of_choices_is_that_of_the_top_class() -> None:
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(4), 50), rng.integers(0, 4, 50)
    whole = reliability_curve(probabilities, labels, bins=7)
    kept = confidence_curve(probabilities.max(1), probabilities.argmax(1) == labels, bins=7)
    for field in ("counts", "confidence", "accuracy", "standard_errors"):
        np.testing.assert_array_equal(getattr(kept, field), getattr(whole, field))
    with pytest.raises(TensorError, match=r"expected confidences in 0 … 1, got 0.5 to 1.5"):
        confidence_curve(np.array([0.5, 1.5]), np.array([True, False]))


def test_reliability_of_a_calibrated_system() -> None:
    """Labels drawn from 20,000 given probabilities: no bin's accuracy is more than 4.5 errors off; sharpened ones are.

    The mean of the errors is out of its range in 5 of 1,000 seeds, a bin in none of 1,500; the seed is fixed.
    """
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(4, 0.7), 20_000)
    labels = (rng.random((20_000, 1)) > probabilities.cumsum(1)[:, :-1]).sum(1)
    curve = reliability_curve(probabilities, labels)
    off = np.abs(curve.accuracy - curve.confidence) / curve.standard_errors
    assert off.max() < 4.5
    assert 0.4 < off.mean() < 1.3  # .8 for normal errors
    sharp = probabilities**1.5 / (probabilities**1.5).sum(1, keepdims=True)
    worse = reliability_curve(sharp, labels)
    assert (np.abs(worse.accuracy - worse.confidence) / worse.standard_errors).max() > 6


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(5, 10), st.booleans()), min_size=1, max_size=30),
    bins=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_reliability_does_not_depend_on_the_order_of_prompts(
    rows: list[tuple[int, bool]], bins: int, seed: int
) -> None:
    """Few distinct confidences, so that most prompts are tied; counts and means are those of all prompts."""
    top, labels = np.array([c / 10 for c, _ in rows]), np.array([int(wrong) for _, wrong in rows])
    probabilities = np.stack([top, 1 - top], 1)
    curve = reliability_curve(probabilities, labels, bins)
    assert curve.counts.sum() == len(rows)
    assert 1 <= len(curve.counts) <= bins
    assert (np.diff(curve.confidence) > 0).all()
    assert (curve.counts @ curve.accuracy, curve.counts @ curve.confidence) == pytest.approx(
        ((labels == 0).sum(), top.sum())
    )
    order = np.random.default_rng(seed).permutation(len(rows))
    again = reliability_curve(probabilities[order], labels[order], bins)
    np.testing.assert_array_equal(again.counts, curve.counts)
    np.testing.assert_allclose(again.accuracy, curve.accuracy)


@pytest.mark.usefixtures("unchecked")
def test_simulated_coverage_is_at_the_given_weights(fitted: "Dispatcher") -> None:
    """Rows of the given truth fill the simulations, and the curve is that of what is simulated."""
    truth = np.array([[0.6, 0.4, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    curve = simulated_coverage(fitted, truth.tolist(), [0.5, 0.9], count=40, draws=32, seed=1)
    drawn, posterior = fitted.simulate(40, draws=32, seed=1, weights=np.tile(truth, (20, 1)))
    np.testing.assert_allclose(drawn, np.tile(truth, (20, 1)), atol=1e-6)
    found = interval_coverage(posterior, drawn)
    assert found == (curve.values[1], curve.standard_errors[1], curve.count, curve.widths[1])


def test_calibrated_coverage_is_of_the_intervals_as_they_stand(fitted: "Dispatcher") -> None:
    drawn, posterior = fitted.simulate(60, draws=64, seed=2)
    with pytest.raises(NotFittedError, match="expected"):
        calibrated_coverage(posterior, drawn)
    truth = drawn[:30]
    known = Conformal(np.full(4, 0.25), np.linspace(0.1, 0.9, 30), np.zeros(30), np.ones(30))
    prompts = Prompts(torch.ones(60), {}, {})
    able = replace(posterior, calibrated=ConformalIntervals(known, FlatProgram(("a", "b", "c"), 2.0), prompts))
    coverage = calibrated_coverage(able.select(range(30)), truth, 0.8)
    low, high = able.calibrated_interval(0.8)
    assert coverage.value == pytest.approx(((low[:30] <= truth) & (truth <= high[:30])).mean())
    assert coverage.width == pytest.approx((high - low)[:30].mean())
    with pytest.raises(TensorError, match="expected true weights of shape"):
        calibrated_coverage(able, truth)
    alpha = np.tile([[2.0, 1.0, 0.01, 0.01], [9.0, 0.01, 0.01, 0.01]], (15, 1))  # two are counted, and one

    class Given(FlatProgram):
        def answer(self, prompts: Prompts, labels: np.ndarray) -> Dirichlets:
            return Dirichlets(alpha)

    intervals = ConformalIntervals(known, Given(("a", "b", "c"), 1.0), Prompts(torch.ones(30), {}, {}))
    able = replace(able.select(range(30)), calibrated=intervals)
    low, high = able.calibrated_interval(0.8)
    held = (low <= truth) & (truth <= high)
    each = np.stack([held[::2, :2].mean(1), held[1::2, 0]])  # a prompt counts as much as another
    assert calibrated_coverage(able, truth, 0.8).value == pytest.approx(each.mean())


@pytest.mark.slow
def test_simulated_coverage_is_near_nominal(fitted: "Dispatcher") -> None:
    """On weights from the prior, intervals hold as many as they say, within two standard errors; the seed is fixed."""
    coverage = simulated_coverage(fitted, levels=[0.5, 0.9], count=2_000, draws=200, seed=0)
    assert coverage.standard_errors.max() < 0.015
    assert np.abs(coverage.values - [0.5, 0.9]).max() < 0.03
