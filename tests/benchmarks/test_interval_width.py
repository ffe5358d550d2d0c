"""The benchmark of interval widths runs, its scores are what they say, and conformal intervals hold the truth."""

import sys
from pathlib import Path

import numpy as np
import pytest
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import interval_width
from interval_width import LEVELS, SCALES, conformal, scores


def test_the_smoke_test_prints_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    interval_width.main(quick=True)
    printed = capsys.readouterr().out
    for name in ("posterior", "calibrated", *(f"LogisticRegression, {scale}" for scale in SCALES)):
        assert printed.count(f"| {name} |") == len(LEVELS)
    assert "nan" not in printed


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_conformal_intervals_hold_the_truth_whatever_the_predictions(scale: interval_width.Scale) -> None:
    """1,000 prompts calibrate, 4,000 are judged on one counted component each: 4 standard errors of both."""
    rng = np.random.default_rng(0)
    truth, means = rng.dirichlet(np.full(2, 0.5), 5000), rng.dirichlet(np.full(2, 20.0), 5000)  # both are counted
    lengths = np.full(5000, 9.0)
    ends = conformal(scale, (means[:1000], truth[:1000]), lengths[:1000], means[1000:], lengths[1000:])
    for level in LEVELS:
        low, high = ends(level)
        assert low.min() >= 0
        assert high.max() <= 1
        error = (level * (1 - level) * (1 / 1000 + 1 / 4000)) ** 0.5
        found = scores(np.stack([low, high]), level, means[1000:], truth[1000:])
        assert found.covers == pytest.approx(level, abs=4 * error)


def test_scores_by_hand() -> None:
    """The second prompt misses by .1 at level .9, which costs 20 times as much; components of no account are left."""
    truth, mean = np.array([[0.6, 0.4, 0], [1.0, 0, 0]]), np.array([[0.5, 0.46, 0.04], [0.5, 0.46, 0.04]])
    low, high = np.array([[0.5, 0.4, 0], [0.5, 0, 0.9]]), np.array([[0.7, 0.6, 1], [0.9, 0.8, 1]])
    found = scores(np.stack([low, high]), 0.9, mean, truth)
    assert found == pytest.approx((0.75, 0.4, 0.5, 0.3, 0.5 * (0.2 + 0.4 + 2)))


def test_unknown_data_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="expected one of simulated, shipped, got 'real'"):
        interval_width.main(on="real")
