"""The drift monitor: p-values are uniform and alarms as rare as stated while nothing changes; a shift is found soon,
and the alarm stays. A stream can be cut, stored and resumed."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, kstest

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.dispatcher.drift import JUMPS, STAKES, DriftMonitor, drift_monitor, watch
from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.experts.domains import EXPERT_DOMAINS
from bayes_dispatch.inference.scoring.evidence_sets import pure_evidence


@pytest.fixture
def monitor() -> DriftMonitor:
    return drift_monitor(np.random.default_rng(0).normal(size=200))


def test_p_values_by_hand() -> None:
    """Four of 20 scores make the edges, 16 fill the bins; an arrival counts itself."""
    scores = np.where(
        np.arange(20) % 4 == 0, np.arange(20) // 4, 1.5
    )  # edges between 0 and 4, the others in the middle
    monitor = drift_monitor(scores, bins=2)
    np.testing.assert_array_equal(monitor.edges, [2.0])
    np.testing.assert_array_equal(monitor.counts, [15, 0])
    tie = [np.random.default_rng([0, arrival]).random() for arrival in range(3)]
    _, report = watch(monitor, np.array([-9.0, 2.0, 9.0]))
    np.testing.assert_allclose(report.p_values, [tie[0], (16 + tie[1]) / 17, (16 + 2 * tie[2]) / 18], rtol=1e-12)


def test_martingale_is_the_composite_jumper() -> None:
    """Against the definition: for each jump rate, the mean over all paths of stakes, by a loop over stakes."""
    monitor, report = watch(drift_monitor(np.arange(40.0), seed=3), np.random.default_rng(1).normal(20, 5, 30))
    capitals = []
    for jump in JUMPS:
        capital = {stake: 1 / len(STAKES) for stake in STAKES}
        path = []
        for p_value in report.p_values:
            total = sum(capital.values())
            for stake in STAKES:
                moved = (1 - jump) * capital[stake] + jump / len(STAKES) * total
                capital[stake] = moved * (1 + stake * (p_value - 0.5))
            path.append(sum(capital.values()))
        capitals.append(path)
    np.testing.assert_allclose(report.martingale, np.mean(capitals, axis=0), rtol=1e-10)
    assert np.exp(monitor.log_martingale) == pytest.approx(report.martingale[-1])
    assert np.exp(monitor.log_highest) == pytest.approx(max(1, report.martingale.max()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 29))
def test_stream_can_be_cut_stored_and_resumed(seed: int, cut: int) -> None:
    """Anywhere, through JSON: the same p-values and the same capital, bit for bit. A step changes no monitor."""
    rng = np.random.default_rng(seed)
    start, scores = drift_monitor(rng.normal(size=50), seed=seed % 7), rng.normal(size=30)
    packed = json.dumps(start.pack())
    whole, report = watch(start, scores)
    half, first = watch(start, scores[:cut])
    end, second = watch(DriftMonitor.unpack(json.loads(json.dumps(half.pack()))), scores[cut:])
    np.testing.assert_array_equal(np.append(first.p_values, second.p_values), report.p_values)
    np.testing.assert_array_equal(np.append(first.martingale, second.martingale), report.martingale)
    assert json.dumps(end.pack()) == json.dumps(whole.pack())
    assert json.dumps(start.pack()) == packed
    assert start.arrived == 0
    assert end.arrived == 30


def test_only_the_order_of_scores_counts() -> None:
    """A monotone function of all scores changes no p-value, where the edges lie at scores and not between two."""
    rng = np.random.default_rng(0)
    calibration, scores = rng.normal(size=4 * 64 + 1), rng.normal(size=50)
    plain, bent = (watch(drift_monitor(f(calibration)), f(scores))[1] for f in (np.asarray, np.exp))
    np.testing.assert_array_equal(plain.p_values, bent.p_values)


def test_equal_scores_are_no_drift() -> None:
    """All tie, so that ranks are random."""
    monitor, report = watch(drift_monitor(np.zeros(40)), np.zeros(300))
    assert not monitor.alarmed
    assert kstest(report.p_values, "uniform").pvalue > 0.001


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_shift_is_found(shift: float) -> None:
    """By one standard deviation, either way, after 300 ordinary prompts, with 400 held out: within 100."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        monitor, _ = watch(drift_monitor(rng.normal(size=400), seed=seed), rng.normal(size=300))
        assert not monitor.alarmed
        monitor, report = watch(monitor, rng.normal(size=100) + shift)
        assert monitor.alarmed
        assert report.first_alarm is not None
        assert (report.martingale[: report.first_alarm] < 100).all()
        assert report.martingale[report.first_alarm] >= 100


def test_strange_prompts_are_found_at_once_and_the_alarm_stays(monitor: DriftMonitor) -> None:
    monitor, report = watch(monitor, np.full(20, -50.0))
    assert report.first_alarm is not None
    assert report.first_alarm < 12
    poor, report = watch(
        DriftMonitor.unpack({**monitor.pack(), "log_martingale": 0.0}), np.random.default_rng(1).normal(size=50)
    )
    assert report.first_alarm is None
    assert poor.alarmed


def test_it_never_changes(monitor: DriftMonitor) -> None:
    with pytest.raises(ValueError, match="read-only"):
        monitor.counts[0] = 9


def test_capital_is_never_lost_nor_overflows(monitor: DriftMonitor) -> None:
    """A fifth is not bet; after thousands of strange prompts the martingale is infinite and its log is not."""
    _, report = watch(monitor, np.random.default_rng(1).normal(size=1_000))
    assert report.martingale.min() >= 0.2
    rich, _ = watch(monitor, np.linspace(10, 11, 2_500))
    rich = DriftMonitor.unpack({**rich.pack(), "log_martingale": 800.0, "log_highest": 800.0})
    rich, report = watch(rich, np.full(10, 12.0))
    assert np.isinf(report.martingale).all()
    assert np.isfinite(rich.log_martingale)
    assert rich.capital.sum() == pytest.approx(1)


@pytest.mark.slow
def test_p_values_of_exchangeable_scores_are_uniform_and_independent() -> None:
    """12,000 from 40 streams of scores that share a random mean; Kolmogorov–Smirnov and lag-1 correlation.

    Each would fail in 1 of 1,000 seeds, and the seeds are fixed.
    """
    p_values = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = rng.normal(rng.normal(), 1, 60 + 300)
        p_values.append(watch(drift_monitor(scores[:60], seed=seed), scores[60:])[1].p_values)
    assert kstest(np.concatenate(p_values), "uniform").pvalue > 0.001
    pairs = np.concatenate([np.stack([p[:-1], p[1:]], axis=1) for p in p_values])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 3.3 / np.sqrt(len(pairs))


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [20, 200])
def test_false_alarms_are_as_rare_as_stated(held_out: int) -> None:
    """300 streams of 300 at a rate of .1, few or many held out: no more alarms than one of 1,000 seeds has at .1."""
    alarms = 0
    for seed in range(300):
        rng = np.random.default_rng([seed, held_out])
        monitor, _ = watch(drift_monitor(rng.normal(size=held_out), 0.1, seed=seed), rng.normal(size=300))
        alarms += monitor.alarmed
    assert 0 < alarms <= binom.isf(0.001, 300, 0.1)


def test_bad_input(unchecked: None, monitor: DriftMonitor) -> None:
    with pytest.raises(ConfigError, match="expected at least 20 calibration scores, got 19"):
        drift_monitor(np.zeros(19))
    with pytest.raises(TensorError, match="expected finite calibration scores, got 1 that are NaN or infinite"):
        drift_monitor(np.append(np.zeros(30), np.nan))
    for rate in (0.0, 1.0, np.nan, "a", None):
        with pytest.raises(ConfigError, match="expected a false-alarm rate between 0 and 1, got"):
            drift_monitor(np.zeros(30), rate)
    with pytest.raises(ConfigError, match="expected bins to be a whole number ≥ 2, got 1"):
        drift_monitor(np.zeros(30), bins=1)
    with pytest.raises(ConfigError, match="expected seed to be a whole number"):
        drift_monitor(np.zeros(30), seed=-1)
    with pytest.raises(TensorError, match="expected finite scores, got 1"):
        watch(monitor, np.array([np.inf]))
    with pytest.raises(TensorError, match=r"expected scores of shape \(N,\), N ≥ 1, got shape \(0,\)"):
        watch(monitor, np.zeros(0))
    packed = monitor.pack()
    for change in (
        {"edges": [2.0, 1.0]},
        {"edges": ["x"]},
        {"counts": [1, 2]},
        {"counts": [-1, *packed["counts"][1:]]},
        {"capital": [[1.0]]},
        {"capital": (np.array(packed["capital"]) * 2).tolist()},
        {"log_martingale": float("nan")},
        {"log_martingale": 1.0},
        {"log_highest": float("inf")},
        {"arrived": -1},
        {"false_alarm_rate": 2},
        {"seed": None},
    ):
        with pytest.raises(ConfigError, match=r"^expected [^\n]*, got [^\n]+$"):
            DriftMonitor.unpack({**packed, **change})
    with pytest.raises(ConfigError, match="expected a drift monitor, got KeyError: 'counts'"):
        DriftMonitor.unpack({name: value for name, value in packed.items() if name != "counts"})


@pytest.mark.slow
def test_traffic_of_the_shipped_bundle_takes_nothing_from_its_dispatcher() -> None:
    """Without labels and one expert; or of ten labels. Before, .99 of 480 prompts of 64 bytes go to their expert."""
    bundle = load_bundle()
    seen = pure_evidence(bundle.model, EXPERT_DOMAINS, 40, (64, 64), "train", 9)
    asked = pure_evidence(bundle.model, EXPERT_DOMAINS, 60, (64, 64), "held_out", 10)
    lacking, few = np.flatnonzero(seen.labels != 1), np.random.default_rng(0).permutation(len(seen.labels))[:10]
    for rows, labels in ((lacking, None), (few, seen.labels[few])):
        later = bundle.dispatcher.recalibrate(seen.evidence.select(rows), labels)
        assert (later.predict_proba(asked.evidence).argmax(1) == asked.labels).mean() > 0.93
