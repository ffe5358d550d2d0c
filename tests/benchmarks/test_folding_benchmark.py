"""The benchmark of folding runs, and leaves the choice as it was."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import folding
from bayes_dispatch.model.mambaformer.compiled import product_costs


@pytest.mark.slow
def test_the_smoke_test_prints_both_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_costs, "SECONDS", 0.001)
    folding.main(quick=True)
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("Products of a token", "The shipped bundle, one prompt"))
    assert "nan" not in printed
    assert os.environ[product_costs.SWITCH] == "off"
