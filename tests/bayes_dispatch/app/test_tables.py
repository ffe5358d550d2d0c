"""Tables: numbers of a report find their cells, and text of any kind survives Markdown and the terminal."""

import io

import numpy as np
import pytest
from rich.console import Console

from bayes_dispatch.app.tables import COLUMNS, PREDICTIVE, Cell, Table, report_tables, visible, weights_table
from bayes_dispatch.dispatcher.posterior import DispatchPosterior


def scores(nll: float, exact: float, **differences: float) -> dict[str, list[float]]:
    return {"nll": [nll, 0.01], "exact_match": [exact, 0.02]} | {k: [v, 0.003] for k, v in differences.items()}


def text(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else cell.text


def test_experts_table() -> None:
    """The best other expert is the one of least NLL among neither base nor own; the best of the row is marked."""
    domain = {"add": scores(0.3, 0.8), "sort": scores(0.5, 0.1), "json": scores(0.6, 0.2), "base": scores(0.4, 0.5)}
    (table,) = report_tables({"experts": {"add": domain}})
    assert [text(cell) for cell in table.rows[0]] == [
        *("add", "0.400 ± 0.010", "0.300 ± 0.010", "0.500 ± 0.010 (sort)"),
        *("0.500 ± 0.020", "0.800 ± 0.020", "0.100 ± 0.020"),
    ]
    assert [isinstance(cell, Cell) and cell.mark == "best" for cell in table.rows[0]] == [
        *(False, False, True),
        *(False, False, True, False),
    ]


def test_blend_tables() -> None:
    minus = f"nll_minus_{PREDICTIVE}"
    report = {blend: scores(float(n), 0.0, **{minus: n - 5.0}) for n, blend in enumerate(COLUMNS)}
    nll, lost = report_tables({"mixed": {"a & b": report | {"mean_minus_best": [-0.0001, 0.25]}}})
    assert [text(cell) for cell in nll.rows[0]] == ["a & b", *(f"{n}.000 ± 0.010" for n in range(6))]
    differences = [f"-{5 - n}.000 ± 0.003" for n in range(5)]
    assert [text(cell) for cell in lost.rows[0]] == ["a & b", *differences, "+0.000 ± 0.250"]


def test_weights_table() -> None:
    draws = np.array([[[0.2, 0.8]], [[0.6, 0.4]], [[0.1, 0.9]]])
    table = weights_table(DispatchPosterior(draws, ("sort", "base")), [0.25, 0.75], "note")
    assert [[text(cell) for cell in row] for row in table.rows] == [
        ["sort", "0.300", "0.110 – 0.560", "0.33", "0.250"],
        ["base", "0.700", "0.440 – 0.890", "0.67", "0.750"],
    ]


def test_a_table_has_no_margins_and_its_title_a_line() -> None:
    console = Console(file=io.StringIO(), width=30, no_color=True)
    console.print(Table("What is wider than the table", ["one", "two"], [["a", "b"]], "note").to_rich())
    console.print(Table("No heads", ["", ""], [["a", "b"]]).to_rich())
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    whole = ["What is wider than the table", "one  two", "─" * 8, "a    b", "", "note", ""]
    assert lines == [*whole, "No heads", "a  b", ""]


@pytest.mark.parametrize("content", ["[red]x[/red]", "a|b", "`x`", "*x*", "\\", "", "x" * 50, "½ ⏎"])
def test_cells_hold_any_text(content: str) -> None:
    table = Table("title", ["one", "two"], [[Cell(content, "wrong", code=True), "plain"]])
    console = Console(file=io.StringIO(), width=120, no_color=True)
    console.print(table.to_rich())
    assert isinstance(console.file, io.StringIO)
    assert f"✗ {content}".rstrip() in console.file.getvalue()
    row = table.to_markdown().splitlines()[-1]
    assert row.replace("\\|", "").count("|") == 3
    assert content.replace("|", "\\|") in row


def test_visible() -> None:
    assert visible("a\nb\x1b\r\u2028é") == "a⏎b\\x1b\\r\\u2028é"
    assert visible("abcdef", 4) == "abc…"
    assert visible("abcd", 4) == "abcd"
