"""The benchmark of selective generation: its areas are those of the library, and its tables tell the better order."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import selective_generation
from bayes_dispatch.checks.selective import risk_coverage
from selective_generation import CONFIDENCES, FIRST, Answered, table


def made_up(count: int, seed: int) -> list[Answered]:
    """Mutual information tells wrong bytes; the other numbers are noise."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        wrong = rng.random(12) < 0.3
        confidence = {name: rng.normal(size=12) for name in CONFIDENCES}
        confidence[FIRST] = rng.normal(size=12) - 3.0 * wrong
        found.append(Answered(wrong, float(wrong.mean()), confidence))
    return found


def test_the_better_order_has_the_smaller_area() -> None:
    documents = made_up(40, 0)
    printed = table("made-up", documents, 100, 0)
    first, *others = printed.rows
    wrong = np.concatenate([each.wrong for each in documents])
    expected = risk_coverage(np.concatenate([each.confidence[FIRST] for each in documents]), wrong).aurc
    assert str(first[1]).startswith(f"{expected:.4f} [")
    assert first[2] == first[4] == ""
    for row in others:  # intervals that leave out 0: so are true gains of .2, at 5 standard errors and more
        assert float(str(row[2]).split(", ")[1].rstrip("]")) < 0
    again = table("made-up", documents, 100, 0)
    assert again.rows == printed.rows


@pytest.mark.slow
def test_the_smoke_test_prints_all_orders(capsys: pytest.CaptureFixture[str]) -> None:
    selective_generation.main(quick=True)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*CONFIDENCES, "pure documents", "switching documents", "all documents"))
    assert "nan" not in printed
