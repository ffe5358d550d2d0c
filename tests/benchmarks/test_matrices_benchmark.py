"""The benchmark of adapted matrices runs, and its tables say what was measured."""

import sys
from pathlib import Path

import numpy as np
import pytest
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import matrices
from matrices import CHOICES, Outcome


@pytest.mark.slow
def test_the_smoke_test_prints_all_choices(capsys: pytest.CaptureFixture[str]) -> None:
    matrices.main(seeds=1, domain=["add"], quick=True)
    printed = capsys.readouterr().out
    assert all(printed.count(f"| add | {name} |") == 2 for name in CHOICES)
    assert "| 1,408 |" in printed
    assert "nan" not in printed


@pytest.mark.slow
def test_costs_are_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    matrices.main(cost=True, quick=True)
    printed = capsys.readouterr().out
    assert printed.count("| reading, ") == printed.count("| decoding, ") == 2
    for line in printed.splitlines():
        if line.startswith(("| reading, ", "| decoding, ")):
            _, _, *ratios = (cell.split()[0] for cell in line.strip("| ").split("|"))
            assert len(ratios) == 4
            assert np.isfinite([float(ratio) for ratio in ratios]).all()
            assert ratios[1] == "1.00"  # the reference


def test_differences_are_paired() -> None:
    """By document, from the default choice; those of one expert are no independent ones."""

    def outcome(*nll: float) -> Outcome:
        return Outcome(np.array([0.5, 0.7]), np.array(nll), 0.25, 0.1, 1280, 9.6)

    each = {"blocks": [outcome(0.2, 0.4)] * 2, "embedding": [outcome(0.3, 0.5), outcome(0.4, 0.6)]}
    scores, costs = matrices.tables({"add": each, "json": each})
    assert scores.rows[0] == ["add", "blocks", "0.600", "0.300", "", "0.250", "0.100"]
    assert scores.rows[1][3:5] == ["0.450", "+0.150 ± 0.050"]
    assert [row[5] for row in scores.rows] == ["0.250", "0.250", "", ""]  # texts have no answers
    assert costs.rows[1] == ["add", "embedding", "1,280", "10"]


def test_unknown_domains_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match=r"expected domains of .* got 'subtract'"):
        matrices.main(domain=["subtract"], quick=True)
