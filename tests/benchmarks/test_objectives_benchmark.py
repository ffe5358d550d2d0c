"""The benchmark of objectives runs, and its tables say what was measured."""

import sys
from pathlib import Path

import pytest
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import objectives
from objectives import OBJECTIVES, Outcome


def test_the_smoke_test_prints_all_objectives(capsys: pytest.CaptureFixture[str]) -> None:
    objectives.main(seeds=1, domain=["add"], quick=True)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*OBJECTIVES, "add", "base"))
    assert "nan" not in printed


def test_means_and_errors() -> None:
    """Over seeds where there are several, else over documents."""
    one = Outcome((0.2, 0.02), (0.6, 0.03), 0.5, 10.0)
    other = Outcome((0.2, 0.02), (0.8, 0.03), 0.7, 30.0)
    exact, harm, seconds = objectives.tables({"add": {name: [one, other] for name in OBJECTIVES}})
    assert exact.rows[0][1:3] == ["0.200", "0.700 ± 0.100"]
    assert harm.rows[0][1] == "0.600 ± 0.100"
    assert seconds.rows[0][1] == "20"
    exact, _, _ = objectives.tables({"add": {name: [one] for name in OBJECTIVES}})
    assert exact.rows[0][1:3] == ["0.200 ± 0.020", "0.600 ± 0.030"]


def test_unknown_domains_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match=r"expected domains of .* got 'subtract'"):
        objectives.main(domain=["subtract"], quick=True)
