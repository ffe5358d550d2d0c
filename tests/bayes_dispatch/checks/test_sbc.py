"""Ranks and their bands: exact posteriors pass at the stated rate, wrong ones fail.

Laws: ranks by hand, ties at random, ranks follow components and not the order of draws; a band's probability by
enumeration and by simulation, between pointwise and Bonferroni; wrong width, bias and one bad component are found.
"""

from dataclasses import dataclass
from itertools import product
from math import factorial
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from bayes_dispatch.checks.sbc import (
    posterior_ranks,
    probability_inside,
    rank_band,
    rank_uniformity,
    simulation_based_calibration,
)
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, NotFittedError, TensorError

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.estimator import Dispatcher

NAMES = ("a", "b", "c", "base")


@dataclass(frozen=True)
class Conjugate:
    """Weights from a Dirichlet, seen through 30 multinomial counts; the posterior is exact where nothing is wrong.

    ``sharpened`` multiplies its concentration, ``bias`` adds counts of the first component that nobody saw.
    """

    sharpened: float = 1.0
    bias: float = 0.0
    prior: tuple[float, ...] = (0.8, 1.5, 3.0, 0.6)

    def simulate(self, count: int, draws: int, seed: int) -> tuple[np.ndarray, DispatchPosterior]:
        rng = np.random.default_rng([seed, 1])
        truth = rng.dirichlet(self.prior, count)
        concentration = self.prior + rng.multinomial(30, truth)
        concentration[:, 0] += self.bias
        gammas = rng.standard_gamma(self.sharpened * concentration, (draws, *concentration.shape))
        return truth, DispatchPosterior(gammas / gammas.sum(-1, keepdims=True), NAMES)


@pytest.mark.parametrize("resolution", [1e-6, 0.1])
def test_exact_posterior_passes(resolution: float) -> None:
    """At a false-alarm rate of .001, with and without many ties, and the seed is fixed."""
    result = simulation_based_calibration(Conjugate(), 1_000, 63, 0, 0.001, resolution)
    assert result.passed
    assert [c.component for c in result.components] == list(NAMES)
    assert all(c.inside and c.excess == 0 for c in result.components)
    assert (result.draws, result.false_alarm_rate, result.ranks.shape) == (63, 0.001, (1_000, 4))


def test_exact_posterior_fails_at_the_stated_rate() -> None:
    """Of 300 runs at a rate of .2, Bonferroni lets through .2 at most and, with four near-independent bands, over .1.

    Either bound is broken by chance in fewer than 1 of 1,000 seeds, and the seeds are fixed.
    """
    runs = [simulation_based_calibration(Conjugate(), 60, 15, seed, false_alarm_rate=0.2) for seed in range(300)]
    failed = sum(not run.passed for run in runs)
    assert binom.ppf(1e-3, 300, 0.1) <= failed <= binom.isf(1e-3, 300, 0.2)


@pytest.mark.parametrize("sharpened", [2.0, 0.5])
def test_wrong_width_fails_in_every_component(sharpened: float) -> None:
    """Over- and underconfident posteriors leave the bands on both sides of the diagonal."""
    result = simulation_based_calibration(Conjugate(sharpened=sharpened), 1_000, 63, seed=0, false_alarm_rate=0.001)
    assert not any(component.inside for component in result.components)
    for component in result.components:
        assert component.excess > 0
        low = component.ecdf[:32] - component.points[:32]  # too many low ranks if too narrow, too few if too wide
        assert np.sign(low[np.abs(low).argmax()]) == np.sign(sharpened - 1)


def test_biased_posterior_fails_where_it_is_biased() -> None:
    """Unseen counts of the first component put its truth too low among the draws."""
    result = simulation_based_calibration(Conjugate(bias=3.0), 1_000, 63, seed=0, false_alarm_rate=0.001)
    first = result.components[0]
    assert not first.inside
    assert not result.passed
    assert (first.ecdf - first.points).mean() > 0.1


def test_resolution_overlooks_only_what_is_below_it() -> None:
    """Draws whose weights below .01 are squared fail, but pass where these are ties."""

    class Squared(Conjugate):
        def simulate(self, count: int, draws: int, seed: int) -> tuple[np.ndarray, DispatchPosterior]:
            truth, posterior = super().simulate(count, draws, seed)
            weights = np.where(posterior.weights < 0.01, posterior.weights**2, posterior.weights)
            return truth, DispatchPosterior(weights / weights.sum(-1, keepdims=True), NAMES)

    assert not simulation_based_calibration(Squared(), 1_000, 63, 0, 0.001).passed
    assert simulation_based_calibration(Squared(), 1_000, 63, 0, 0.001, resolution=0.02).passed


def test_one_bad_component_is_enough() -> None:
    """Uniform ranks but for a base that always ranks in the middle."""
    ranks = np.random.default_rng(0).integers(0, 64, (500, 3))
    ranks[:, 2] = 31
    result = rank_uniformity(ranks, 63, ("a", "b", "base"), false_alarm_rate=0.001)
    assert [component.inside for component in result.components] == [True, True, False]
    assert not result.passed


def test_ranks_by_hand() -> None:
    """.5 has one of the draws .2, .6, .7 below it; its complement has the two others."""
    draws = np.array([0.2, 0.6, 0.7])
    posterior = DispatchPosterior(np.stack([draws, 1 - draws], -1)[:, None], ("a", "base"))
    np.testing.assert_array_equal(posterior_ranks(posterior, np.array([[0.5, 0.5]])), [[1, 2]])
    np.testing.assert_array_equal(posterior_ranks(posterior, np.array([[0.0, 1.0]])), [[0, 3]])


def test_ties_rank_at_random() -> None:
    """A truth equal to all three draws has each rank from 0 to 3 a quarter of the time, within 5 standard errors."""
    posterior = DispatchPosterior(np.full((3, 4_000, 2), 0.5), ("a", "base"))
    ranks = posterior_ranks(posterior, np.full((4_000, 2), 0.5), seed=1)
    shares = np.bincount(ranks[:, 0], minlength=4) / 4_000
    assert len(shares) == 4
    assert np.abs(shares - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4_000)
    np.testing.assert_array_equal(ranks, posterior_ranks(posterior, np.full((4_000, 2), 0.5), seed=1))
    assert (ranks != posterior_ranks(posterior, np.full((4_000, 2), 0.5), seed=2)).any()


def test_ends_of_the_simplex_tie() -> None:
    """A truth rounded to 1 does not outrank draws of 1 − 10⁻⁹, unless the resolution is said to be finer."""
    posterior = DispatchPosterior(np.tile([1 - 1e-9, 1e-9], (9, 100, 1)), ("a", "base"))
    truth = np.tile([1.0, 0.0], (100, 1))
    assert len(np.unique(posterior_ranks(posterior, truth))) == 10
    np.testing.assert_array_equal(posterior_ranks(posterior, truth, resolution=0.0), np.tile([9, 0], (100, 1)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), draws=st.integers(1, 12))
def test_ranks_do_not_depend_on_the_order_of_draws_and_follow_components(seed: int, draws: int) -> None:
    rng = np.random.default_rng(seed)
    weights, truth = rng.dirichlet(np.full(4, 2.0), (draws, 5)), rng.dirichlet(np.full(4, 2.0), 5)
    ranks = posterior_ranks(DispatchPosterior(weights, NAMES), truth)
    assert ((ranks >= 0) & (ranks <= draws)).all()
    shuffled = DispatchPosterior(rng.permutation(weights, axis=0), NAMES)
    np.testing.assert_array_equal(posterior_ranks(shuffled, truth), ranks)
    swapped = DispatchPosterior(weights[..., ::-1], NAMES)
    np.testing.assert_array_equal(posterior_ranks(swapped, truth[:, ::-1]), ranks[:, ::-1])


@pytest.mark.parametrize(("count", "draws"), [(1, 1), (3, 2), (4, 3)])
def test_probability_inside_by_enumeration(count: int, draws: int) -> None:
    """Sum of the multinomial probabilities of all numbers of ranks whose running sums stay inside."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        lower = np.sort(rng.integers(0, count + 1, draws))
        upper = np.maximum(np.sort(rng.integers(0, count + 1, draws)), lower)
        total = 0.0
        for numbers in product(range(count + 1), repeat=draws + 1):
            below = np.cumsum(numbers)[:-1]
            if sum(numbers) == count and ((lower <= below) & (below <= upper)).all():
                total += factorial(count) / np.prod([factorial(n) for n in numbers]) / (draws + 1) ** count
        assert probability_inside(count, lower, upper) == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(("count", "draws", "level"), [(200, 31, 0.9), (50, 255, 0.8)])
def test_band_holds_uniform_ranks_at_its_level(count: int, draws: int, level: float) -> None:
    """20,000 ECDFs of uniform ranks: within 4 standard errors of the level, of which discreteness may add .01.

    False alarms in fewer than 1 of 10,000 seeds, and the seed is fixed.
    """
    lower, upper = rank_band(count, draws, level)
    rng = np.random.default_rng(0)
    below = rng.multinomial(count, np.full(draws + 1, 1 / (draws + 1)), 20_000).cumsum(1)[:, :-1]
    share = ((lower <= below) & (below <= upper)).all(1).mean()
    error = 4 * np.sqrt(level * (1 - level) / 20_000)
    assert level - error < share < level + 0.01 + error


def test_bands_are_wider_than_pointwise_and_narrower_than_bonferroni() -> None:
    """The adjustment is neither absent nor the crudest one; a higher level holds a lower one."""
    band = rank_band(400, 99, 0.95)
    points = np.arange(1, 100) / 100
    for tail, sign in ((0.05, 1), (0.05 / 99, -1)):
        pointwise = binom.ppf(tail / 2, 400, points), binom.isf(tail / 2, 400, points)
        assert (sign * (pointwise[0] - band[0]) >= 0).all()
        assert (sign * (band[1] - pointwise[1]) >= 0).all()
        assert np.abs(pointwise[0] - band[0]).sum() > 100
    wider = rank_band(400, 99, 0.99)
    assert (wider[0] <= band[0]).all()
    assert (wider[1] >= band[1]).all()


def test_dispatcher_is_a_simulator(fitted: "Dispatcher") -> None:
    """Every component, base included; the same seed gives the same ranks."""
    result = simulation_based_calibration(fitted, 50, draws=15, seed=3)
    assert [c.component for c in result.components] == [*fitted.experts, "base"]
    truth, posterior = fitted.simulate(50, 15, 3)
    np.testing.assert_array_equal(result.ranks, posterior_ranks(posterior, truth, 3))
    assert (result.ranks != simulation_based_calibration(fitted, 50, draws=15, seed=4).ranks).any()


def test_bad_input(unchecked: None) -> None:
    from bayes_dispatch.dispatcher.estimator import Dispatcher

    posterior = DispatchPosterior(np.full((3, 2, 2), 0.5), ("a", "base"))
    with pytest.raises(TensorError, match=r"expected true weights of shape \(2, 2\), got \(1, 2\)"):
        posterior_ranks(posterior, np.full((1, 2), 0.5))
    with pytest.raises(TensorError, match="expected true weights on the simplex"):
        posterior_ranks(posterior, np.full((2, 2), np.nan))
    with pytest.raises(ConfigError, match=r"expected resolution to be a finite number ≥ 0 and ≤ 0\.5, got 0\.7"):
        posterior_ranks(posterior, np.full((2, 2), 0.5), resolution=0.7)
    with pytest.raises(TensorError, match=r"expected ranks of shape \(N, 2\), N ≥ 1, got shape \(5, 3\)"):
        rank_uniformity(np.zeros((5, 3), int), 9, ("a", "base"))
    with pytest.raises(TensorError, match=r"expected integer ranks from 0 to 9, got int64 from 0 to 10"):
        rank_uniformity(np.array([[0, 10]]), 9, ("a", "base"))
    with pytest.raises(ConfigError, match="expected a false-alarm rate between 0 and 1, got 1"):
        rank_uniformity(np.zeros((5, 2), int), 9, ("a", "base"), 1)
    with pytest.raises(ConfigError, match="expected draws to be a whole number ≥ 1, got 0"):
        rank_uniformity(np.zeros((5, 2), int), 0, ("a", "base"))
    with pytest.raises(ConfigError, match="expected count to be a whole number ≥ 1, got 0"):
        simulation_based_calibration(Conjugate(), 0, 63)
    with pytest.raises(ConfigError, match=r"expected seed to be a whole number from 0 .*, got -1"):
        simulation_based_calibration(Conjugate(), seed=-1)
    with pytest.raises(NotFittedError):
        simulation_based_calibration(Dispatcher(["a", "b"]))
