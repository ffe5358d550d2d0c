"""Risk–coverage curves by hand, ties averaged, no excess for the oracle. The abstention threshold keeps its guarantee
by repetition, and smaller demands serve more."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from bayes_dispatch.checks.selective import Abstention, RiskCoverage, abstention_threshold, risk_coverage
from bayes_dispatch.errors import ConfigError, TensorError

RISK, DELTA, SPLITS = 0.1, 0.1, 400


def test_curve_by_hand() -> None:
    """Served in the order right, wrong, right, wrong, given in another order."""
    curve = risk_coverage(np.array([0.7, 0.9, 0.6, 0.8]), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.confidence, [0.9, 0.8, 0.7, 0.6])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3, 2 / 4])
    np.testing.assert_allclose(curve.oracle_risk, [0, 0, 1 / 3, 2 / 4])
    assert curve.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert curve.excess_aurc == pytest.approx((1 / 2) / 4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.floats(-1, 5)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_ties_are_averaged_over_their_orders(rows: list[tuple[int, float]], seed: int) -> None:
    """The curve is the mean over all orders of the prompts, of a plain curve that breaks ties by position."""
    confidence, losses = np.array([float(c) for c, _ in rows]), np.array([loss for _, loss in rows])
    plain = []
    for order in map(list, permutations(range(len(rows)))):
        served = np.argsort(-confidence[order], kind="stable")
        plain.append(losses[order][served].cumsum() / np.arange(1, len(rows) + 1))
    curve = risk_coverage(confidence, losses)
    np.testing.assert_allclose(curve.risk, np.mean(plain, axis=0), atol=1e-9)
    assert curve.excess_aurc >= -1e-9
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    np.testing.assert_allclose(risk_coverage(confidence[shuffled], losses[shuffled]).risk, curve.risk, atol=1e-9)


def test_the_oracle_has_no_excess() -> None:
    losses = np.random.default_rng(0).random(50)
    assert risk_coverage(-losses, losses).excess_aurc == pytest.approx(0)
    assert risk_coverage(losses, losses).excess_aurc > 0.1


def world(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Confidences of two bumps and errors more frequent than they say; risk does not grow steadily as they fall."""
    confidence = np.where(rng.random(count) < 0.6, rng.beta(12, 1.5, count), rng.beta(3, 3, count))
    wrong = 0.02 + 0.7 * (1 - confidence) + 0.25 * (np.abs(confidence - 0.8) < 0.04)
    return confidence, rng.random(count) < wrong


def empirical(confidence: np.ndarray, errors: np.ndarray) -> float:
    """What one would do without a guarantee: the least threshold whose risk on the split is small enough."""
    curve = risk_coverage(confidence, errors)
    return float(curve.confidence[np.flatnonzero(curve.risk <= RISK)[-1]])


def test_the_guarantee_holds_and_is_not_vacuous() -> None:
    """400 splits of 1,000: the risk of 400,000 fresh prompts is over .1 in no more than .1 of the splits.

    By chance more exceed in fewer than 1 of 10,000 seeds, and the seed is fixed. The same check fails for the threshold
    without a guarantee, nearly all splits certify one, and they serve most of what could be served.
    """
    rng = np.random.default_rng(0)
    fresh = risk_coverage(*world(400_000, rng))
    ascending = fresh.confidence[::-1]

    def served(threshold: float) -> int:
        return len(ascending) - int(np.searchsorted(ascending, threshold))

    certified, plain, coverage = [], [], []
    for _ in range(SPLITS):
        split = world(1_000, rng)
        rule = abstention_threshold(*split, RISK, DELTA)
        certified.append(rule is not None and fresh.risk[served(rule.threshold) - 1] > RISK)
        plain.append(fresh.risk[served(empirical(*split)) - 1] > RISK)
        coverage.append(0 if rule is None else served(rule.threshold) / len(ascending))
    allowed = binom.isf(1e-4, SPLITS, DELTA)
    assert sum(certified) <= allowed < sum(plain)
    assert np.mean(np.array(coverage) > 0) > 0.85
    possible = fresh.coverage[np.flatnonzero(fresh.risk <= RISK)[-1]]
    assert np.median(coverage) > 0.75 * possible


@pytest.mark.parametrize("delta", [0.05, 0.3])
def test_one_threshold_errs_at_most_at_its_level(delta: float) -> None:
    """A single candidate whose risk is a hair above the chosen one is certified in ≤ delta, and nearly that, of splits.

    Exact, not simulated: sum over the numbers of errors that the rule accepts, with everybody served.
    """
    accepted = [
        abstention_threshold(np.ones(200), np.arange(200) < errors, 0.2, delta, [0.5]) is not None
        for errors in range(201)
    ]
    chance = binom.pmf(np.arange(201), 200, 0.2)[np.array(accepted)].sum()
    assert 0.6 * delta < chance <= delta


def test_rule_by_hand() -> None:
    """60 right at .9, 40 wrong at .2: 0 errors of 60 certify .05 at delta .1, as .95⁶⁰ < .1/2, but not all 100."""
    confidence = np.repeat([0.9, 0.2], [60, 40])
    rule = abstention_threshold(confidence, confidence < 0.5, 0.05, 0.1, [0.8, 0.1])
    assert rule is not None
    assert (rule.threshold, rule.count, rule.served, rule.errors) == (0.8, 100, 60, 0)
    assert (rule.risk, rule.delta, rule.coverage) == (0.05, 0.1, 0.6)
    assert rule.upper_bound == pytest.approx(1 - 0.05 ** (1 / 60))
    np.testing.assert_array_equal(rule.serves(np.array([0.9, 0.8, 0.79])), [True, True, False])


def test_levels_carry_over_rejections() -> None:
    """At risk .05, 0 errors of 60 have a chance of .046 and 1 of 94 one of .048; each threshold has .047 of its own."""
    confidence, errors = np.repeat([0.9, 0.6], [60, 34]), np.repeat([0, 1, 0], [60, 1, 33])
    assert binom.cdf([0, 1], [60, 94], 0.05) == pytest.approx([0.046, 0.048], abs=5e-4)
    carried = abstention_threshold(confidence, errors, 0.05, 0.094, [0.8, 0.5])
    assert carried is not None
    assert (carried.threshold, carried.errors) == (0.5, 1)
    assert carried.upper_bound <= 0.05
    assert abstention_threshold(confidence, errors, 0.05, 0.094, [0.95, 0.5]) is None  # nobody reaches .95
    alone = abstention_threshold(confidence, errors, 0.05, 0.094, [0.5])
    assert alone == carried


def test_a_sequence_begins_anew_at_each_start() -> None:
    """50 right at .6: .95⁵⁰ = .077 is within .1 but not .1/2, so the second of two thresholds needs all of delta."""
    confidence, right = np.full(50, 0.6), np.zeros(50)
    candidates = [0.8, 0.7, 0.5, 0.4]
    assert abstention_threshold(confidence, right, 0.05, 0.1, candidates, starts=1) is None
    assert abstention_threshold(confidence, right, 0.05, 0.1, candidates, starts=2) is None
    again = abstention_threshold(confidence, right, 0.05, 0.16, candidates, starts=2)
    assert again is not None
    assert again.threshold == 0.4  # the sequence that begins at .5 goes on to the end
    assert abstention_threshold(confidence, right, 0.05, 0.16, candidates, starts=4) is None
    assert abstention_threshold(confidence, right, 0.05, 0.1, [0.5, 0.4], starts=1) is not None


def test_nothing_to_certify() -> None:
    assert abstention_threshold(np.linspace(0, 1, 500), np.ones(500), 0.2) is None  # always wrong
    assert abstention_threshold(np.ones(5), np.zeros(5), 0.2) is None  # never wrong, but too few


def test_smaller_demands_serve_more() -> None:
    rng = np.random.default_rng(1)
    split = world(2_000, rng)
    rules = [abstention_threshold(*split, risk, 0.1) for risk in (0.08, 0.12, 0.2)]
    coverages = [rule.coverage for rule in rules if rule is not None]
    assert len(coverages) == 3
    assert coverages == sorted(coverages)
    assert coverages[0] < coverages[-1]


def test_bad_input(unchecked: None) -> None:
    half = np.full(4, 0.5)
    with pytest.raises(TensorError, match=r"expected losses of shape \(4,\), got shape \(3,\)"):
        risk_coverage(half, np.zeros(3))
    with pytest.raises(TensorError, match=r"expected confidences of shape \(N,\), N ≥ 1, got shape \(0,\)"):
        risk_coverage(np.zeros(0), np.zeros(0))
    with pytest.raises(TensorError, match="expected finite confidences, got 1 that are NaN or infinite"):
        risk_coverage(np.array([0.5, np.nan]), np.zeros(2))
    with pytest.raises(TensorError, match="expected numbers as losses, got list"):
        risk_coverage(half, ["a", "b", "c", "d"])
    with pytest.raises(TensorError, match=r"expected 4 booleans as errors, got float64 of shape \(4,\)"):
        abstention_threshold(half, half, 0.1)
    with pytest.raises(ConfigError, match="expected delta between 0 and 1, got 1"):
        abstention_threshold(half, np.zeros(4), 0.1, 1)
    with pytest.raises(ConfigError, match="expected risk between 0 and 1, got 'a'"):
        abstention_threshold(half, np.zeros(4), "a", None)
    with pytest.raises(ConfigError, match="expected 2 thresholds in descending order"):
        abstention_threshold(half, np.zeros(4), 0.1, 0.1, [0.1, 0.9])
    with pytest.raises(ConfigError, match="expected starts to be a whole number ≥ 1, got 0"):
        abstention_threshold(half, np.zeros(4), 0.1, starts=0)
    with pytest.raises(ConfigError, match=r"expected thresholds of shape \(N,\), N ≥ 1, got shape \(0,\)"):
        abstention_threshold(half, np.zeros(4), 0.1, 0.1, [])
    assert isinstance(risk_coverage(half, half), RiskCoverage)
    assert isinstance(abstention_threshold(np.ones(99), np.zeros(99), 0.2), Abstention)
