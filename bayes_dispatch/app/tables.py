"""Tables for the terminal and for Markdown; above all, what was measured when a bundle was trained.

``report_tables`` is a function of a bundle's report and gate; every mean stands with its standard error over documents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bayes_dispatch.errors import BundleError

if TYPE_CHECKING:
    import rich.console

    from bayes_dispatch.dispatcher.gate import Gate
    from bayes_dispatch.dispatcher.posterior import DispatchPosterior

__all__ = ["Cell", "Table", "report_markdown", "report_tables", "visible", "visible_lines", "weights_table"]

Mark = Literal["plain", "best", "right", "wrong"]
STYLES: dict[Mark, str] = {"plain": "", "best": "bold", "right": "green", "wrong": "red"}
SIGNS: dict[Mark, str] = {"plain": "", "best": "", "right": "✓ ", "wrong": "✗ "}

PREDICTIVE = "posterior_predictive(16)"
COLUMNS = ("base", "best_expert", "posterior_mean", "top_k(2)", "thompson_sample", PREDICTIVE)


@dataclass(frozen=True)
class Cell:
    """Text of one cell; ``code`` shows it as it is, in Markdown too."""

    text: str
    mark: Mark = "plain"
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table, to be shown in a terminal or in Markdown.

    Attributes:
        title: above it. columns: heads; the first names the rows. rows: a cell for each column; plain text is one.
        note: below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""

    def to_rich(self) -> "rich.console.Group":
        """For ``rich.console.Console.print``; title and note may be wider than the table."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        heads = any(self.columns)
        table = RichTable(
            box=box.SIMPLE_HEAD, show_header=heads, show_edge=False, pad_edge=False, collapse_padding=True
        )
        for number, column in enumerate(self.columns):
            table.add_column(Text(column), overflow="fold", no_wrap=number == 0)
        for row in self.rows:
            cells = [_cell(cell) for cell in row]
            table.add_row(*(Text(SIGNS[cell.mark] + cell.text, style=STYLES[cell.mark]) for cell in cells))
        return Group(Text(self.title, style="bold"), table, Text(f"\n{self.note}\n" if self.note else ""))

    def to_markdown(self) -> str:
        """A Markdown table between its title and its note."""
        lines = [
            self.columns,
            ["---"] * len(self.columns),
            *([_markdown(_cell(cell)) for cell in row] for row in self.rows),
        ]
        grid = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join(part for part in (f"**{self.title}**", grid, self.note) if part)


Rows = list[list[Cell | str]]


def report_tables(report: Mapping[str, Any], gate: "Gate | None" = None) -> list[Table]:
    """The tables of a bundle's report, and of its gate; a part that was not measured has none.

    Raises:
        BundleError: a part of the report is none that ``bayes-dispatch train`` or ``build`` made.
    """
    parts: dict[str, Callable[[Any], list[Table]]] = {
        "experts": _experts,
        "dispatch": _dispatch,
        "pure": _pure,
        "mixed": lambda part: _blended(part, "Documents that alternate two domains"),
        "switching": lambda part: _blended(part, "Documents that switch domain half-way"),
        "calibration": _calibration,
        "gains": _gains,
    }
    try:
        tables = [table for name, make in parts.items() if name in report for table in make(report[name])]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BundleError(f"expected the report of a training run in the bundle, got another: {error!r:.80}") from None
    return tables if gate is None else [*tables, _gate(gate)]


def _calibration(part: Mapping[str, Any]) -> list[Table]:
    names = ("prompts", "accuracy", "expected_calibration_error", "log_loss")
    rows = [[name.replace("_", " "), f"{part[name]:.3f}" if name != "prompts" else str(part[name])] for name in names]
    return [Table("Which expert a held-out prompt is of", ["", ""], rows)]


def _gains(part: Mapping[str, Any]) -> list[Table]:
    rows = [
        [name, *(f"{own[key]:.3f}" for key in ("base", "nats_per_byte")), f"{own['gain']:+.3f}"]
        for name, own in part.items()
    ]
    columns = ["expert", "base", "the expert", "gain"]
    return [Table("What each expert gains on held-out documents of its own", columns, rows, "Nats per byte.")]


def _gate(gate: "Gate") -> Table:
    rows: Rows = [
        ["held-out prompts that others are ranked among", str(len(gate.scores))],
        ["bins of length", str(len(gate.edges))],
        ["least false-alarm rate", gate.least_rate_shown],
    ]
    return Table("Gate for foreign prompts", ["", ""], rows)


def report_markdown(report: Mapping[str, Any], gate: "Gate | None" = None) -> str:
    """All tables of ``report_tables`` in Markdown."""
    return "\n\n".join(table.to_markdown() for table in report_tables(report, gate))


def weights_table(posterior: "DispatchPosterior", blend_weights: Sequence[float], note: str) -> Table:
    """What is known of the weights of a single prompt, and its next token's: a row for each component."""
    mean, best, (low, high) = posterior.mean[0], posterior.probability_best[0], posterior.interval(0.9)[:, 0]
    rows: Rows = []
    for k, name in enumerate(posterior.experts):
        numbers = [f"{mean[k]:.3f}", f"{low[k]:.3f} – {high[k]:.3f}", f"{best[k]:.2f}", f"{blend_weights[k]:.3f}"]
        rows.append([Cell(name, "best" if k == mean.argmax() else "plain"), *numbers])
    return Table("Weights of the experts", ["expert", "mean", "90% interval", "P(best)", "blend weight"], rows, note)


def visible(text: str, width: int | None = None) -> str:
    """``text`` in one line without control characters: newlines as ⏎, others as escapes; cut at ``width``."""
    line = "".join(c if c.isprintable() else "⏎" if c == "\n" else ascii(c)[1:-1] for c in text)
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def visible_lines(text: str) -> str:
    """``text`` line by line, without other control characters; tabs as spaces."""
    return "\n".join(visible(line.expandtabs(4)) for line in text.split("\n"))


def _experts(part: Mapping[str, Any]) -> list[Table]:
    rows: Rows = []
    for domain, scores in part.items():
        others = {name: score for name, score in scores.items() if name not in (domain, "base")}
        other = min(others, key=lambda name: others[name]["nll"][0])
        chosen = [scores["base"], scores[domain], others[other]]
        nll = _numbers([score["nll"] for score in chosen], best=min)
        exact = _numbers([score["exact_match"] for score in chosen], best=max)
        rows.append([domain, *nll[:2], Cell(f"{nll[2].text} ({other})", nll[2].mark), *exact])
    columns = ["domain", "base NLL", "own NLL", "best other NLL", "base exact", "own exact", "other exact"]
    note = (
        "Held-out documents, scored after their prompt. NLL: nats per byte of answers, or of the rest of a text. "
        "Exact: answers whose every byte is right (the rest of a text never is)."
    )
    return [Table("Experts", columns, rows, note)]


def _dispatch(part: Mapping[str, Any]) -> list[Table]:
    rows: Rows = [
        [f"{length} bytes", *_numbers([scores["dispatcher"], scores["logistic_regression"]], best=max)]
        for length, scores in part["accuracy"].items()
    ]
    coverage = part["coverage_90"]
    calibration: Rows = [
        ["coverage of 90% intervals", _number(coverage["found"])],
        ["the same on simulations from the fitted model", _number(coverage["simulated"])],
        [
            f"AUROC of the base weight, foreign texts against {max(part['accuracy'], key=int)} bytes of a domain",
            f"{part['foreign_auroc_base_weight']:.3f}",
        ],
    ]
    return [
        Table(
            "Dispatch: top-1 accuracy on held-out prompts of one domain",
            ["prompt", "dispatcher", "LogisticRegression"],
            rows,
        ),
        Table("Calibration on held-out prompts of known mixture", ["", "value"], calibration),
    ]


def _pure(part: Mapping[str, Any]) -> list[Table]:
    rows: Rows = []
    for domain, scores in part.items():
        lost = [_number(scores[blend][f"nll_minus_{domain}"], signed=True) for blend in COLUMNS]
        rows.append([domain, _number(scores[domain]["nll"]), *lost])
    columns = ["domain", "NLL of right expert", *COLUMNS]
    title = "Documents of one domain: NLL that each blend loses to the right expert (paired)"
    return [Table(title, columns, rows)]


def _blended(part: Mapping[str, Any], title: str) -> list[Table]:
    rivals = [blend for blend in COLUMNS if blend != PREDICTIVE]
    nll: Rows = []
    lost: Rows = []
    for name, scores in part.items():
        nll.append([name, *_numbers([scores[blend]["nll"] for blend in COLUMNS], best=min)])
        to_predictive = [_number(scores[blend][f"nll_minus_{PREDICTIVE}"], signed=True) for blend in rivals]
        lost.append([name, *to_predictive, _number(scores["mean_minus_best"], signed=True)])
    return [
        Table(f"{title}: NLL", ["documents", *COLUMNS], nll),
        Table(
            f"{title}: NLL that each loses to {PREDICTIVE}, and posterior_mean to best_expert (paired)",
            ["documents", *rivals, "Mean − Best"],
            lost,
        ),
    ]


def _numbers(values: Sequence[Sequence[float | int]], best: Callable[[list[float]], float]) -> list[Cell]:
    """Mean ± standard error of each; the best mean is marked where no other prints like it."""
    means = [round(value[0], 3) for value in values]
    top = best(means) if means.count(best(means)) == 1 else None
    return [Cell(_number(v), "best" if mean == top else "plain") for v, mean in zip(values, means, strict=True)]


def _number(value: Sequence[float | int], signed: bool = False) -> str:
    mean = round(value[0], 3) + 0.0  # no −0.000
    return f"{mean:{'+' if signed else ''}.3f} ± {value[1]:.3f}"


def _cell(cell: Cell | str) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def _markdown(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|")
    if cell.code and text.strip():
        fence = "``" if "`" in text else "`"
        text = f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"
    return SIGNS[cell.mark] + (f"**{text}**" if cell.mark == "best" and text else text)
