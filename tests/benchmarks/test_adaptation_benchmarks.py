"""The benchmarks of adaptation run, and every method that they compare is in their tables."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import adapters
import few_shot
import strategies
import switching
from bayes_dispatch.experts.domains import CONVENTIONS
from few_shot import QUICK, Result, pairs_of


@pytest.mark.slow
def test_few_shot(capsys: pytest.CaptureFixture[str]) -> None:
    few_shot.main(seeds=1, quick=True)
    printed = capsys.readouterr().out
    for name in (*(method.name for method in QUICK.methods), "best single", "uniform", "base", "true shares"):
        assert f"| {name}" in printed
    assert "90% intervals hold" in printed


@pytest.mark.slow
def test_few_shot_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    few_shot.main(seeds=1, given=[2], coupling=20.0, quick=True)
    printed = capsys.readouterr().out
    assert all(f"| {method.name}, mean | 0." in printed for method in QUICK.methods)
    assert "1 pairs" not in printed


@pytest.mark.slow
def test_strategies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    strategies.main(quick=True, work=tmp_path)
    printed = capsys.readouterr().out
    assert [f"Strategies, {kind} documents" in printed for kind in ("pure", "mixed", "out of domain")] == [True] * 3
    for name in (
        "dispatcher",
        "asked model",
        "classification expert",
        "LogisticRegression, of one expert",
        "LogisticRegression, of shares",
        "oracle",
        "uniform",
        "base",
    ):
        assert printed.count(f"| {name} |") == 3


def test_switching(capsys: pytest.CaptureFixture[str]) -> None:
    switching.main(quick=True)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in ("by row", "by row, truncated", "rebuilt", "folded"))


def test_adapters_are_compared_by_domain() -> None:
    """Domains that differ more than the adapters do are no noise of the difference."""
    own = {"SVF": [[1.0, 0.0], [5.0, 0.5]], "LoRA": [[1.5, 0.0], [5.75, 0.5]]}
    table = adapters.versus_svf(own, ["gain", "harm"])
    assert table.rows == [["LoRA", "+0.625 ± 0.125", "+0.000 ± 0.000"]]


def test_a_simulation_counts_as_one() -> None:
    assert few_shot.coverage_told([1.0, 0.5]) == "Simulated answers: 90% intervals hold 0.750 ± 0.250 in 2 simulations."


def test_pairs_take_conventions_in_turn() -> None:
    pairs = pairs_of(CONVENTIONS[:2], 5, np.random.default_rng(0), "train")
    assert [answer == question[-2::-1] + "\n" for question, answer in pairs][::2] == [True] * 3
    assert pairs[1][1] == "".join(sorted(pairs[1][0][:-1])) + "\n"


def test_a_table_has_a_column_for_each_number_of_pairs() -> None:
    found = {n: [[*(Result(1.0, {m.name: 0.5}, (True,)) for m in QUICK.methods)]] * 2 for n in QUICK.given}
    scores, others = few_shot.table("title", QUICK, found)
    assert scores.columns == ["nats per byte", "1 pairs", "2 pairs"]
    assert others.rows[0][1:] == ["1.0 s", "1.0 s"]
    assert others.rows[1][1:] == ["1.00", "1.00"]
