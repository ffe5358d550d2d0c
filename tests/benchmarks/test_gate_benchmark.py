"""The gate's benchmark runs, and its foreign texts are what they are called."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gate
from dispatching.foreign import DISGUISED, FOREIGN_KINDS


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_smoke_test_prints_every_gate_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    gate.main(quick=True)
    printed = capsys.readouterr().out
    for name in ("anew", *gate.INSIDE, "shipped", *(domain.name for domain in FOREIGN_KINDS), DISGUISED.name):
        assert name in printed
    assert "nan" not in printed


def test_foreign_texts_are_long_enough_and_held_out() -> None:
    for domain in (*FOREIGN_KINDS, DISGUISED):
        held_out = domain.texts("held_out")
        assert len(held_out) >= 20
        assert min(len(text) for text in held_out) > max(gate.LENGTHS)
        assert set(held_out).isdisjoint(domain.texts("train"))
