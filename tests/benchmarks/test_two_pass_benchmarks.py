"""The benchmarks of two-pass inference run; requests in threads get the answers that they get alone."""

import sys
from pathlib import Path

import pytest
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import request_stress
import two_pass


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_requests_in_threads_are_requests_alone() -> None:
    found = request_stress.Found()
    peaks = request_stress.run(22, 3, found)
    assert found.wrong == []
    assert (found.served, found.refused) == (19, 3)
    assert len(peaks) == 11


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_costs_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    two_pass.main(quick=True)
    printed = capsys.readouterr().out
    assert "from block 1" in printed
    assert "naive two passes" in printed
    assert "rows are left of 16" in printed
    assert "nan" not in printed
    with pytest.raises(typer.BadParameter, match="expected one of first, each"):
        two_pass.main(only="speed")
