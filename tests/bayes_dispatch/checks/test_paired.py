"""Paired comparisons: by hand, by scipy's t-test, with clusters of copies that add nothing; intervals cover."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, ttest_rel

from bayes_dispatch.checks.paired import PairedComparison, paired_comparison
from bayes_dispatch.errors import ConfigError, TensorError


def test_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1."""
    found = paired_comparison(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert found == PairedComparison(2.0, found.standard_error, 3, 3)
    assert found.standard_error == pytest.approx(1 / np.sqrt(3))


def test_clusters_by_hand() -> None:
    """Differences 0, 2 | 4 | 2, 2: mean 2, sums of residuals −2, 2, 0."""
    found = paired_comparison(np.array([0.0, 2, 4, 2, 2]), np.zeros(5), np.array(["x", "x", "y", "z", "z"]))
    assert found == PairedComparison(2.0, found.standard_error, 5, 3)
    assert found.standard_error == pytest.approx(np.sqrt(3 / 2 * 8) / 5)


def test_interval_is_that_of_the_t_test() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 30))
    expected = ttest_rel(one, other).confidence_interval(0.9)
    assert paired_comparison(one, other).interval(0.9) == pytest.approx((expected.low, expected.high))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 20), copies=st.integers(1, 4))
def test_copies_of_a_prompt_add_nothing(seed: int, count: int, copies: int) -> None:
    """Each prompt repeated within its own cluster: the same mean and error; systems swapped: the other sign."""
    one, other = np.random.default_rng(seed).normal(size=(2, count))
    alone = paired_comparison(one, other)
    copied = paired_comparison(
        np.repeat(one, copies), np.repeat(other, copies), np.repeat(np.arange(count)[::-1], copies)
    )
    assert copied.difference == pytest.approx(alone.difference)
    assert copied.standard_error == pytest.approx(alone.standard_error)
    assert (copied.count, copied.clusters) == (count * copies, count)
    assert paired_comparison(other, one).difference == pytest.approx(-alone.difference)


def test_clustered_intervals_cover() -> None:
    """600 worlds of 25 clusters of 8 with a shared effect: 90% intervals hold 0 at that rate, and plain ones do not.

    Within 4 standard errors and .02 for the approximation; false alarms in fewer than 1 of 10,000 seeds, and the seed
    is fixed.
    """
    rng = np.random.default_rng(0)
    clusters, zero = np.repeat(np.arange(25), 8), np.zeros(200)
    hits = {True: 0, False: 0}
    for _ in range(600):
        scores = rng.normal(size=200) + rng.normal(size=25)[clusters]
        for known in hits:
            low, high = paired_comparison(scores, zero, clusters if known else None).interval(0.9)
            hits[known] += low <= 0 <= high
    assert abs(hits[True] / 600 - 0.9) < 0.02 + 4 * np.sqrt(0.9 * 0.1 / 600)
    assert hits[False] < binom.ppf(1e-4, 600, 0.9)


def test_bad_input(unchecked: None) -> None:
    with pytest.raises(TensorError, match=r"expected scores of the other system of shape \(3,\), got shape \(2,\)"):
        paired_comparison(np.zeros(3), np.zeros(2))
    with pytest.raises(TensorError, match=r"expected clusters of shape \(3,\), got \(2,\)"):
        paired_comparison(np.zeros(3), np.zeros(3), np.zeros(2))
    with pytest.raises(TensorError, match="expected at least 2 prompts, got 1"):
        paired_comparison(np.zeros(1), np.zeros(1))
    with pytest.raises(TensorError, match="expected at least 2 clusters, got 1"):
        paired_comparison(np.zeros(3), np.zeros(3), np.zeros(3))
    with pytest.raises(ConfigError, match=r"expected a probability between 0 and 1, got 1\.2"):
        paired_comparison(np.zeros(3), np.zeros(3)).interval(1.2)
