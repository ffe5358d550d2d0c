"""Tables of scores say what the single bytes say: means, pooled calibration, paired differences, arviz data. What was
not compared is refused."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from bayes_dispatch.checks.paired import paired_comparison
from bayes_dispatch.errors import ConfigError, TensorError, UnknownNameError
from bayes_dispatch.inference.scoring.scores import METRICS, Comparison, Score, ScoredTokens

DOCUMENTS, BYTES = 40, 60


def scored(rng: np.random.Generator, count: int, overconfident: float = 0.0) -> ScoredTokens:
    """Bytes whose confidence is too high by ``overconfident``."""
    confidence = rng.uniform(0.5, 0.8, count)
    right = rng.random(count) < confidence
    entropy = rng.uniform(0.5, 1, count)
    given = confidence + overconfident
    return ScoredTokens(
        np.log(np.where(right, given, (1 - given) / 2)),
        given,
        right,
        entropy,
        entropy * rng.uniform(0, 0.5, count),
        count,
    )


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    sizes = [2] * (BYTES // 2)
    return Comparison(
        tuple(
            Score.of(n, blend, scored(rng, BYTES, too_high), sizes, rows)
            for blend, too_high, rows in (("sure", 0.15, 1), ("calibrated", 0.0, 16))
            for n in range(DOCUMENTS)
        )
    )


def test_comparisons_of_some_documents_each_are_one(comparison: Comparison) -> None:
    def part(first: int, last: int) -> Comparison:
        """Documents that are numbered from 0, as they are when these alone are compared."""
        own = [score for score in comparison.scores if first <= score.document < last]
        return Comparison(tuple(replace(score, document=score.document - first) for score in own))

    assert Comparison.concatenate([part(0, 7), part(7, 8), part(8, DOCUMENTS)]) == comparison
    other = Comparison(comparison.of("sure"))
    for parts in ([], [comparison, other]):
        with pytest.raises(ConfigError, match="expected comparisons of the same blends"):
            Comparison.concatenate(parts)


def test_a_score_is_the_mean_of_its_bytes() -> None:
    log_p = np.log([0.9, 0.8, 0.5, 0.25])
    bytes_ = ScoredTokens(
        log_p,
        np.array([0.9, 0.8, 0.5, 0.6]),
        np.array([True, True, True, False]),
        np.array([0.4, 0.6, 1.0, 1.2]),
        np.array([0.1, 0.1, 0.2, 0.4]),
        4,
    )
    score = Score.of(3, "max", bytes_, [1, 1, 2], 1)
    assert (score.document, score.blend, score.rows) == (3, "max", 1)
    assert score.nll == pytest.approx(-log_p.mean())
    assert score.exact_match == pytest.approx(2 / 3)
    assert score.entropy == pytest.approx(0.8)
    assert score.mutual_information == pytest.approx(0.2)
    assert score.aleatoric == pytest.approx(0.6)
    assert score.ece == pytest.approx((0.1 + 0.2 + 0.5 + 0.6) / 4)  # four bytes, a bin for each


def test_summary(comparison: Comparison) -> None:
    table = comparison.summary().set_index("blend")
    assert list(table.index) == ["sure", "calibrated"]
    assert list(table.documents) == [DOCUMENTS] * 2
    assert list(table["rows"]) == [1, 16]
    for metric in set(METRICS) - {"ece"}:
        values = comparison.values("sure", metric)
        assert table.loc["sure", metric] == pytest.approx(values.mean())
        assert table.loc["sure", f"{metric}_se"] == pytest.approx(values.std(ddof=1) / DOCUMENTS**0.5)


def test_ece_is_pooled_over_documents(comparison: Comparison) -> None:
    """2,400 bytes tell .15 too much from none; 60 of one document, in five bins, are off by noise alone."""
    pooled = comparison.summary().set_index("blend").ece
    assert pooled["sure"] == pytest.approx(0.15, abs=0.03)
    assert pooled["calibrated"] < 0.05
    assert comparison.values("calibrated", "ece").mean() > 2 * pooled["calibrated"]


def test_differences_are_paired(comparison: Comparison) -> None:
    table = comparison.differences("calibrated")
    assert list(zip(table.blend, table.metric, strict=True)) == [
        ("sure", metric) for metric in ("nll", "exact_match", "ece")
    ]
    found = paired_comparison(comparison.values("sure", "nll"), comparison.values("calibrated", "nll"))
    row = table.iloc[0]
    assert (row.difference, row.standard_error, row.documents) == (
        found.difference,
        found.standard_error,
        DOCUMENTS,
    )
    assert (row.low, row.high) == found.interval(0.95)
    narrow = comparison.differences("calibrated", ["ece"], probability=0.5).iloc[0]
    assert row.documents == narrow.documents
    assert table.iloc[2].low < narrow.low < narrow.difference < narrow.high < table.iloc[2].high
    assert table.iloc[2].low > 0


def test_arviz_data_have_the_scores_by_name(comparison: Comparison) -> None:
    data = comparison.to_arviz()
    tree = data if isinstance(data, xr.DataTree) else data.to_datatree()
    assert list(tree.children) == ["scores"]  # no likelihood of a single draw, which LOO would take
    scores = tree["scores"]
    means = scores["log_probability"].sel(blend="sure") / scores["scored_bytes"]
    np.testing.assert_allclose(-means, comparison.values("sure", "nll"))
    for metric in METRICS:
        np.testing.assert_array_equal(scores[metric].sel(blend="sure"), comparison.values("sure", metric))


def test_what_was_not_compared(comparison: Comparison) -> None:
    with pytest.raises(UnknownNameError, match="expected a blend of sure, calibrated, got 'max'"):
        comparison.differences("max")
    with pytest.raises(UnknownNameError, match=r"expected a metric of nll, .*got 'rows'"):
        comparison.differences("sure", ["rows"])
    alone = Comparison(comparison.of("sure")[:1] + comparison.of("calibrated")[:1])
    assert np.isnan(alone.summary().nll_se).all()
    with pytest.raises(TensorError, match="expected at least 2 prompts, got 1"):
        alone.differences("sure")
