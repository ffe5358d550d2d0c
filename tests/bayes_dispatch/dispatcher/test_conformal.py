"""Calibrated intervals and sets hold the truth as often as stated, of an overconfident posterior too; they are what
scipy's quantiles say, feedback moves none, and they stay with the fit that they are of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta, betabinom

from bayes_dispatch.dispatcher.conformal import Conformal, conformal_quantile
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.exact.cells import Cells
from bayes_dispatch.dispatcher.exact.quadrature import Quadrature
from bayes_dispatch.dispatcher.fitting.flat import Dirichlets
from bayes_dispatch.dispatcher.gate import GateDecision
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.errors import BundleError, ConfigError, NotFittedError, TensorError
from bayes_dispatch.storage import read_directory, write_directory
from tests.bayes_dispatch.conftest import EXPERTS, Sample, coarsely

FALSE_ALARM = 1e-4  # of each two-sided band
Known = tuple[Evidence, np.ndarray]


@pytest.fixture(scope="module")
def known(make_sample: Callable[..., Any]) -> Callable[..., Known]:
    """Prompts in random order, and their weights: mixtures of all components, or three in four of one expert."""

    def make(count: int, seed: int, mixed: int = 1) -> Known:
        some, order = make_sample(count, seed, mixed), np.random.default_rng(seed).permutation(count)
        return some.evidence.select(order), some.weights[order]

    return make


@pytest.fixture
def dispatcher(fitted: Dispatcher) -> Dispatcher:
    """One to be calibrated."""
    return coarsely(fitted)


@pytest.fixture
def overconfident(fitted: Dispatcher) -> Dispatcher:
    """The same with a thirtieth of the noise."""
    return coarsely(fitted, temper=fitted.state.temper / 30)


@pytest.fixture
def sharp(fitted: Dispatcher) -> Dispatcher:
    """The overconfident one with cells as narrow as its intervals."""
    return coarsely(fitted, rounds=2, temper=fitted.state.temper / 30)


def held(posterior: DispatchPosterior, known: Known, ends: np.ndarray, seed: int = 0) -> np.ndarray:
    """Of each prompt, whether the interval of a counted expert, taken at random, holds its share."""
    weights = known[1]
    random, mean = np.random.default_rng(seed), posterior.mean
    chosen = [random.choice(np.flatnonzero(row >= min(0.05, row.max()))) for row in mean]
    low, share, high = (each[np.arange(len(weights)), chosen] for each in (ends[0], weights, ends[1]))
    return (low <= share) & (share <= high)


def band(prompts: int, calibrated: int, probability: float) -> np.ndarray:
    """Of the count of prompts that are held: beta-binomial, exactly, where scores have no ties."""
    rank = int(np.ceil(round((calibrated + 1) * probability, 9)))
    return betabinom(prompts, rank, calibrated + 1 - rank).ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2])


def bins(calibrated: Known, fresh: Known) -> tuple[np.ndarray, np.ndarray]:
    """Of 500 prompts of a calibration, and of fresh ones: whether they are longer than the median of those."""
    median = np.quantile(calibrated[0].known_lengths(), 0.5)
    longer, others = (each[0].known_lengths() >= median for each in (calibrated, fresh))
    assert min(longer.sum(), (~longer).sum()) >= 200
    return longer, others


@pytest.mark.parametrize("name", ["dispatcher", "sharp"])
def test_intervals_hold_as_often_as_stated(
    name: str, known: Callable[..., Known], request: pytest.FixtureRequest
) -> None:
    """The short ones, and the long ones."""
    dispatcher, fresh, calibration = request.getfixturevalue(name), known(600, 12), known(500, 11)
    posterior = dispatcher.calibrate(calibration[0], mixtures=calibration[1]).posterior(fresh[0])
    longer, others = bins(calibration, fresh)
    for probability in (0.5, 0.9, 0.99):
        hits = held(posterior, fresh, posterior.calibrated_interval(probability))
        wider = posterior.interval(probability) + np.array([-0.001, 0.001])[:, None, None]  # no miss by the resolution
        for bin_ in (False, True):
            low, high = band((others == bin_).sum(), (longer == bin_).sum(), probability)
            assert low <= hits[others == bin_].sum() <= high
            if name == "sharp" and probability > 0.5:
                assert held(posterior, fresh, wider)[others == bin_].sum() < low


def test_lengths_are_told_apart(known: Callable[..., Known], overconfident: Dispatcher) -> None:
    """Long prompts are judged by long ones: were short ones as unlike the posterior as can be, nothing changed."""
    evidence, weights = known(500, 11)
    long = evidence.known_lengths() >= np.quantile(evidence.known_lengths(), 0.5)
    ends = overconfident.calibrate(evidence, mixtures=weights).posterior(evidence).calibrated_interval(0.9)
    spoilt = np.where(long[:, None], weights, np.roll(weights, 1, axis=1))
    others = overconfident.calibrate(evidence, mixtures=spoilt).posterior(evidence).calibrated_interval(0.9)
    np.testing.assert_array_equal(others[:, long], ends[:, long])
    wider, narrower = ((high - low)[~long] for low, high in (others, ends))
    assert (wider >= narrower).all()
    assert wider.mean() > 1.1 * narrower.mean()


def test_on_average_over_calibrations_of_nineteen_prompts(
    overconfident: Dispatcher, known: Callable[..., Known]
) -> None:
    """120 calibrations and 20 fresh prompts of each: at 18 / 20, by 4.5 standard errors of independent calibrations,
    which 7 of a million seeds miss. Eight prompts cannot tell.
    """
    (evidence, weights), rates = known(120 * 39, 21), []
    for start in range(0, len(weights), 39):
        rows = np.arange(start, start + 39)
        overconfident.calibrate(evidence.select(rows[:19]), mixtures=weights[rows[:19]])
        fresh = evidence.select(rows[19:]), weights[rows[19:]]
        posterior = overconfident.posterior(fresh[0])
        rates.append(held(posterior, fresh, posterior.calibrated_interval(0.9), start).mean())
    assert abs(np.mean(rates) - 0.9) < 4.5 * np.std(rates) / np.sqrt(len(rates))
    evidence = evidence.select(range(9))
    overconfident.calibrate(evidence, mixtures=weights[:9]).predict_set(evidence, 0.9)
    overconfident.calibrate(evidence.select(range(8)), mixtures=weights[:8])
    for ask in (overconfident.posterior(evidence).calibrated_interval, partial(overconfident.predict_set, evidence)):
        with pytest.raises(ConfigError, match=r"^expected 9 or more calibration prompts for 0.9, got 8$"):
            ask(0.9)


def test_sets_hold_as_often_as_stated(overconfident: Dispatcher, known: Callable[..., Known]) -> None:
    """The largest share, of prompts of one expert and of mixtures. The likeliest expert alone does not."""
    evidence, weights = known(500, 31, 4)
    fresh, truth = known(1000, 32, 4)
    overconfident.calibrate(evidence, mixtures=weights)
    best, proba = truth.argmax(1), overconfident.predict_proba(fresh)
    rows, (longer, others) = np.arange(len(truth)), bins((evidence, weights), (fresh, truth))
    assert (proba.argmax(1) == best).sum() < band(1000, 500, 0.99)[0]
    for probability in (0.95, 0.99):
        sets = overconfident.predict_set(fresh, probability)
        for bin_ in (False, True):
            low, high = band((others == bin_).sum(), (longer == bin_).sum(), probability)
            assert low <= sets[rows, best][others == bin_].sum() <= high
        assert sets[rows, proba.argmax(1)].all()
        assert (np.where(sets, proba, 1).min(1) >= np.where(sets, 0, proba).max(1)).all()  # the likeliest, no others


def test_bins_have_the_prompts_that_it_takes() -> None:
    """Of lengths that tie, and for probabilities near 1, there are fewer bins; any length, and none, is in one."""
    scores = np.linspace(0, 1, 1000)
    asked = np.array([0.0, 3.0, 300.0, 511.0, 512.0, 9999.0])
    for shorter in (0, 3, 199, 200, 500):
        lengths = np.concatenate([np.linspace(8, 500, shorter), np.full(1000 - shorter, 512.0)])
        known = Conformal(np.full(3, 1 / 3), scores, scores, lengths)
        found = known.quantiles("levels", asked, 0.9).ravel()
        bins = len(np.unique(found))
        assert bins == {0: 1, 3: 1, 199: 1, 200: 2, 500: 3}[shorter]
        assert known.quantiles("levels", asked, 0.999).ravel() == pytest.approx(1.0)
        with pytest.raises(ConfigError, match=r"^expected 1999 or more calibration prompts for 0.9995, got 1000$"):
            known.quantiles("levels", asked, 0.9995)
        with pytest.raises(ConfigError, match=r"^expected a probability between 0 and 1, got 7.0$"):
            known.quantiles("levels", asked[:0], 7.0)


@pytest.mark.parametrize("level", [0.0, 0.5, 0.9, 0.998, 1 - 1e-7, 1.0])
def test_ends_are_quantiles(level: float) -> None:
    """Scipy's of one Beta, a thousandth further out, at levels that no 64 draws can tell."""
    alpha = np.array([[0.1, 1.0, 3.0], [0.3, 0.3, 0.3], [40.0, 2.0, 2.0]])
    rest = alpha.sum(1, keepdims=True) - alpha
    known = Conformal(np.full(3, 1 / 3), np.full(10, level), np.zeros(10), np.zeros(10))
    ends = known.ends(Dirichlets(alpha), np.zeros(3), 0.9)
    expected = np.clip(
        [beta.ppf((1 - level) / 2, alpha, rest) - 1e-3, beta.ppf((1 + level) / 2, alpha, rest) + 1e-3], 0, 1
    )
    assert (ends[0] <= expected[0] + 1e-12).all()
    assert (ends[1] >= expected[1] - 1e-12).all()
    np.testing.assert_allclose(ends, expected, atol=1e-4)


def test_scores_of_shares_of_0_and_1() -> None:
    """The least level whose interval holds the truth: none, where half of the posterior is exactly there."""
    corners = np.zeros((1, 2, 3, 3))
    corners[0, 0, 0, 0] = 1  # alone
    corners[0, 1, 0, 0] = corners[0, 1, 1, 1] = 1  # with another, in any proportion
    mass, sizes, supports = np.array([[0.7, 0.3]]), np.array([[1, 2]]), np.tile(np.arange(3), (1, 2, 1))
    answer = Cells(3, mass, sizes, supports, corners, np.zeros((1, 2)), np.zeros(1))
    for own, least in ((1.0, 0.0), (0.9, 0.46), (0.5, 0.7), (0.1, 0.94)):  # of .3 of the mass, the part below
        truth, found = np.array([[own, 1 - own, 0.0]]), []
        for seed in range(20):  # one of the two that are counted
            scores = Conformal.of([answer], truth, np.full(3, 1 / 3), np.zeros(1), seed)
            found.append(scores.levels[0])
            for level, inside in ((least - 0.01, False), (least + 0.01, True)):
                known = Conformal(np.full(3, 1 / 3), np.full(10, max(0.0, level)), np.zeros(10), np.zeros(10))
                low, high = known.ends(answer, np.zeros(1), 0.9)
                held = (low <= truth) & (truth <= high)
                assert (held[0, :2] == (inside or level < 0)).all()
        np.testing.assert_allclose(found, least, atol=0.002)


def test_the_quantile_is_the_least_that_will_do() -> None:
    """Of 99 scores the 90th at .9, whatever the rounding of 100 · p."""
    scores = np.arange(1, 100) / 100
    for hundredth in range(1, 100):
        assert conformal_quantile(scores, hundredth / 100) == hundredth / 100
    with pytest.raises(ConfigError, match=r"expected 999 or more calibration prompts for 0.999, got 99$"):
        conformal_quantile(scores, 0.999)


def test_labels_are_mixtures_of_one(dispatcher: Dispatcher, fresh: Sample) -> None:
    by_both = dispatcher.calibrate(fresh.evidence, fresh.labels, fresh.mixtures).predict_set(fresh.evidence)
    by_mixtures = dispatcher.calibrate(fresh.evidence, mixtures=fresh.weights).predict_set(fresh.evidence)
    np.testing.assert_array_equal(by_both, by_mixtures)


def test_feedback_moves_the_posterior_alone(dispatcher: Dispatcher, fresh: Sample) -> None:
    dispatcher.calibrate(fresh.evidence, mixtures=fresh.weights)
    before, sets = dispatcher.posterior(fresh.evidence), dispatcher.predict_set(fresh.evidence)
    dispatcher.update([1] * 50)
    after = dispatcher.posterior(fresh.evidence)
    np.testing.assert_array_equal(after.calibrated_interval(), before.calibrated_interval())
    assert not np.array_equal(after.interval(), before.interval())
    np.testing.assert_array_equal(dispatcher.predict_set(fresh.evidence), sets)


def test_intervals_cost_nothing_until_they_are_asked_for(
    dispatcher: Dispatcher, fresh: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are summed out once, also after feedback, and a posterior keeps no more than its prompts' evidence."""
    plain = len(pickle.dumps(dispatcher.posterior(fresh.evidence)))
    dispatcher.calibrate(fresh.evidence, mixtures=fresh.weights)
    calls, answer = list[int](), Quadrature.__call__

    def counted(self: Quadrature, prompts: Prompts, shares: np.ndarray) -> Cells:
        calls.append(len(prompts))
        return answer(self, prompts, shares)

    monkeypatch.setattr(Quadrature, "__call__", counted)
    dispatcher.update([1] * 5)
    posterior = dispatcher.posterior(fresh.evidence)
    assert sum(calls) == 60
    of_many = DispatchPosterior.concatenate([posterior] * 20)
    assert len(pickle.dumps(of_many)) < 1.5 * 20 * plain
    posterior.calibrated_interval()
    assert sum(calls) == 2 * 60


def test_prompts_keep_their_own(dispatcher: Dispatcher, fresh: Sample) -> None:
    """In any order, one by one, sent elsewhere, and behind a gate; not beside those of another calibration."""
    dispatcher.calibrate(fresh.evidence, mixtures=fresh.weights)
    posterior = dispatcher.posterior(fresh.evidence)
    ends = posterior.calibrated_interval(0.8)
    np.testing.assert_array_equal(posterior.select([5, 2]).calibrated_interval(0.8), ends[:, [5, 2]])
    backwards = posterior.select(slice(None, None, -1))
    np.testing.assert_allclose(backwards.calibrated_interval(0.8), ends[:, ::-1], atol=1e-4)
    halves = [posterior.select(range(20, 60)), posterior.select([]), posterior.select(range(20))]
    np.testing.assert_array_equal(
        DispatchPosterior.concatenate(halves).calibrated_interval(0.8), np.roll(ends, -20, axis=1)
    )
    one = dispatcher.posterior(fresh.evidence.select([7])).calibrated_interval(0.8)
    np.testing.assert_allclose(one, ends[:, [7]], atol=1e-4)
    gated = GateDecision(np.zeros(60), np.ones(60, bool), 0.1).to_base(posterior)
    np.testing.assert_array_equal(gated.calibrated_interval(0.8), ends)
    other = dispatcher.calibrate(fresh.evidence.select(range(30)), mixtures=fresh.weights[:30])
    for part in (other.posterior(fresh.evidence), replace(posterior, calibrated=None)):
        assert DispatchPosterior.concatenate([posterior, part]).calibrated is None
    with pytest.raises(TensorError, match="expected calibrated of 60 prompts, got 3"):
        replace(posterior, calibrated=halves[0].select([0, 1, 2]).calibrated)


def test_a_posterior_sent_elsewhere_keeps_its_intervals(fitted: Dispatcher, fresh: Sample) -> None:
    dispatcher = copy.copy(fitted).calibrate(fresh.evidence, mixtures=fresh.weights)
    posterior = dispatcher.posterior(fresh.evidence.select(range(4)))
    sent = pickle.loads(pickle.dumps(posterior))
    np.testing.assert_array_equal(sent.calibrated_interval(0.8), posterior.calibrated_interval(0.8))


def test_it_is_saved_and_belongs_to_one_fit(
    fitted: Dispatcher, fresh: Sample, sample: Sample, settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    dispatcher, fingerprint = copy.copy(fitted), fitted.fingerprint
    dispatcher.save(tmp_path / "without")
    dispatcher.calibrate(fresh.evidence, mixtures=fresh.weights).save(tmp_path / "with")
    assert dispatcher.fingerprint == fingerprint
    ends = dispatcher.posterior(fresh.evidence).calibrated_interval()
    again = Dispatcher.load(tmp_path / "with")
    assert again.fingerprint == fingerprint
    np.testing.assert_array_equal(again.posterior(fresh.evidence).calibrated_interval(), ends)
    np.testing.assert_array_equal(again.predict_set(fresh.evidence), dispatcher.predict_set(fresh.evidence))
    refitted = Dispatcher(EXPERTS, **settings()).fit(sample.evidence, sample.labels)
    refitted.calibrate(fresh.evidence, mixtures=fresh.weights).fit(sample.evidence, sample.labels)
    for none in (Dispatcher.load(tmp_path / "without"), refitted, refitted.recalibrate(fresh.evidence)):
        with pytest.raises(NotFittedError, match=r"^expected a calibrated dispatcher, got one before calibrate\(\)$"):
            none.predict_set(fresh.evidence)
        with pytest.raises(NotFittedError, match=r"^expected a posterior of a calibrated dispatcher, got one without"):
            none.posterior(fresh.evidence).calibrated_interval()
    document, arrays = read_directory(tmp_path / "with", "dispatcher")
    levels = arrays["conformal.levels"]
    spoilt: list[dict[str, np.ndarray]] = [
        {"conformal.levels": levels + 1},
        {"conformal.lengths": levels - 1},
        {"conformal.levels": levels[:-1]},
        {"conformal.doubts": np.full(60, np.nan)},
        {"conformal.shares": np.full(3, 1 / 3)},
        {"conformal.shares": np.full(4, 1.0)},
    ]
    for wrong in spoilt:
        write_directory(tmp_path / "spoilt", "dispatcher", document, arrays | wrong)
        with pytest.raises(BundleError, match=r"^expected a calibration in [^\n]+$"):
            Dispatcher.load(tmp_path / "spoilt")
    del arrays["conformal.doubts"]
    write_directory(tmp_path / "spoilt", "dispatcher", document, arrays)
    with pytest.raises(BundleError, match=r"^expected a calibration in [^\n]+$"):
        Dispatcher.load(tmp_path / "spoilt")


def test_without_examples(tmp_path: Path) -> None:
    """A flat posterior is far off for prompts of one expert, and its calibrated intervals say so."""
    nothing = Evidence.from_array(np.zeros((40, 1)))
    flat = Dispatcher.flat(EXPERTS, concentration=30.0).calibrate(nothing, y=np.arange(40) % 3)
    flat.save(tmp_path)
    for dispatcher in (flat, Dispatcher.load(tmp_path)):
        low, high = dispatcher.posterior(nothing).calibrated_interval(0.9)
        assert low.max() == 0
        assert high.min() == 1


@pytest.mark.usefixtures("unchecked")
def test_bad_input(dispatcher: Dispatcher, fresh: Sample) -> None:
    with pytest.raises(ConfigError, match=r"^expected prompts whose mixtures are known, got 45 of 60 that are$"):
        dispatcher.calibrate(fresh.evidence, fresh.labels)
    with pytest.raises(ConfigError, match=r"^expected prompts whose mixtures are known, got 0 of 0 that are$"):
        dispatcher.calibrate(fresh.evidence.select([]), mixtures=fresh.weights[:0])
    with pytest.raises(TensorError, match="expected mixtures of shape"):
        dispatcher.calibrate(fresh.evidence, mixtures=fresh.weights[:5])
    with pytest.raises(ConfigError, match="expected seed"):
        dispatcher.calibrate(fresh.evidence, mixtures=fresh.weights, seed=-1)
    with pytest.raises(NotFittedError):
        Dispatcher(EXPERTS).calibrate(fresh.evidence, mixtures=fresh.weights)
    dispatcher.calibrate(fresh.evidence, mixtures=fresh.weights)
    probabilities: list[Any] = [0, 1, 1.5, "x", float("nan")]
    for probability in probabilities:
        for ask in (
            dispatcher.posterior(fresh.evidence).calibrated_interval,
            partial(dispatcher.predict_set, fresh.evidence),
        ):
            with pytest.raises(ConfigError, match=r"^expected a probability between 0 and 1, got "):
                ask(probability)
