"""The cost benchmark runs, its stages add up, and its exponents are slopes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import dispatch_cost
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from dispatching.stages import REST, STAGES, FitCost, Stage, fit_cost

TINY = SVISettings(steps=2, rounds=1)


def test_serving_is_measured_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch_cost, "FIT", TINY)
    tables = list(dispatch_cost.serving(replace(dispatch_cost.QUICK, repeats=1)))
    assert [len(table.rows) for table in tables] == [2, 2]
    for table in tables:
        assert str(table.rows[0][2]).startswith("1.00")
        assert all(float(str(row[1]).split()[0]) > 0 for row in table.rows)


def test_exponents_are_log_log_slopes() -> None:
    def cost(prompts: int, seconds: float) -> FitCost:
        return FitCost(prompts, 8, {name: Stage(seconds) for name in (*STAGES.values(), REST)})

    sizes, costs = (10, 100, 1000), [cost(10, 5.0), cost(100, 2.0), cost(1000, 200.0)]
    table = dispatch_cost._growth("fits", "N", sizes, costs, TINY)
    assert list(table.rows[-1]) == ["time ~ N^", *["2.00"] * len(table.columns[1:])]


@pytest.mark.slow
def test_a_fit_is_split_into_stages() -> None:
    cost = fit_cost(120, 4, TINY)
    assert set(cost.stages) == {*STAGES.values(), REST}
    assert all(stage.seconds >= 0 for stage in cost.stages.values())
    assert cost.stages["globals"].seconds > 0


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="expected serving or fits, got 'all'"):
        dispatch_cost.main(only="all")
