"""The report of a diagnosis: tables for a terminal, and a directory of tables, numbers and pictures."""

from pathlib import Path

from bayes_dispatch.app.diagnosis import Diagnosis, DiagnosisSettings, HeldOutDiagnosis
from bayes_dispatch.app.reports import write_report
from bayes_dispatch.app.tables import Cell, Table
from bayes_dispatch.checks.calibration_plots import plot_coverage, plot_rank_ecdfs, plot_reliability, plot_risk_coverage
from bayes_dispatch.checks.sbc import RankUniformity
from bayes_dispatch.storage import write_json

__all__ = ["FILES", "TITLE", "diagnosis_tables", "write_diagnosis"]

FILES = ("diagnosis.json", "report.md", "ranks.png", "coverage.png", "reliability.png", "risk_coverage.png")
TITLE = "# bayes-dispatch: diagnosis"


def diagnosis_tables(diagnosis: Diagnosis) -> list[Table]:
    """What was found, for a terminal or a report."""
    ranks = diagnosis.ranks
    verdicts: list[list[Cell | str]] = [[each.component, *_verdict(each)] for each in ranks.components]
    settings, held_out = diagnosis.settings, diagnosis.held_out
    note = f"{settings.simulations} simulations; false-alarm rate {ranks.false_alarm_rate:g} for all together."
    if held_out is None:
        note += " No prompt was judged: that takes held-out text of two experts or more (--text NAME=FILE)."
    tables = [Table("Ranks of true weights among posterior draws", ["component", "ECDF", "by"], verdicts, note)]
    return tables if held_out is None else [*tables, *_held_out_tables(held_out, settings, diagnosis.unjudged)]


def _held_out_tables(found: HeldOutDiagnosis, settings: DiagnosisSettings, unjudged: tuple[str, ...]) -> list[Table]:
    judged = f"Without prompts of {', '.join(unjudged)}, of which no held-out text was given." if unjudged else ""
    curves = found.coverage, found.simulated
    levels = [
        [
            f"{level:.0%}",
            *(f"{curve.values[n]:.3f} ± {curve.standard_errors[n]:.3f}" for curve in curves),
            f"{found.coverage.widths[n]:.3f}",
        ]
        for n, level in enumerate(found.coverage.levels)
    ]
    heads = list(next(iter(found.by_length.values())))
    by_length = [
        [name, *(f"{row[h].value:.3f} ± {row[h].standard_error:.3f} ({row[h].width:.2f})" for h in heads)]
        for name, row in found.by_length.items()
    ]
    widths = (
        "In brackets the mean width. Calibrated ones are taken as they stand: those that reach down to 0 hold a 0."
        + (f" {judged}" if judged else "")
    )
    names = list(next(iter(found.pure.values())))
    scores = [[f"{length} bytes", *(f"{row[name]:.4f}" for name in names)] for length, row in found.pure.items()]
    foreign, curve, rule, served = found.foreign, found.risk_coverage, found.abstention, found.served
    trust = [
        ["AURC (above the oracle's)", f"{curve.aurc:.5f} ({curve.excess_aurc:.5f})"],
        ["AUROC of the base weight on foreign text", f"{foreign.value:.4f} ± {foreign.standard_error:.4f}"],
        [
            f"threshold for risk {settings.risk:g}",
            "none certified" if rule is None else f"{rule.threshold:.3f}, bound {rule.upper_bound:.4f}",
        ],
        ["served, and wrong, on the other half", "–" if served is None else f"{served[0]:.3f}, {served[1]:.4f}"],
    ]
    holds = f"The threshold holds with probability {1 - settings.delta:g}."
    return [
        Table(
            "Coverage of intervals on held-out mixtures",
            ["nominal", "found", "on simulations", "mean width"],
            levels,
            judged,
        ),
        Table(
            "Coverage by tokens, of the posterior's and of calibrated intervals", ["tokens", *heads], by_length, widths
        ),
        Table("P(best) on held-out prompts of one domain", ["length", *names], scores, judged),
        Table("When to trust it", ["", "found"], trust, holds),
    ]


def write_diagnosis(diagnosis: Diagnosis, out: Path) -> list[Path]:
    """Write the report, its numbers and its pictures into a directory that is made if need be; its other files stay.

    Pictures of an earlier run that this one does not have are removed.

    Raises:
        BundleError: as :func:`bayes_dispatch.app.reports.check_report`.
    """
    figures, held_out = {"ranks.png": plot_rank_ecdfs(diagnosis.ranks)}, diagnosis.held_out
    if held_out is not None:
        figures |= {
            "coverage.png": plot_coverage(held_out.coverage, held_out.simulated),
            "reliability.png": plot_reliability(held_out.reliability),
            "risk_coverage.png": plot_risk_coverage(held_out.risk_coverage, held_out.abstention),
        }
    parts = [TITLE, *(table.to_markdown() for table in diagnosis_tables(diagnosis))]
    parts += [f"![{name.partition('.')[0]}]({name})" for name in figures]
    with write_report(out, FILES, TITLE) as new:
        for name, figure in figures.items():
            figure.savefig(new / name)
        write_json(new / "diagnosis.json", diagnosis.to_dict())
        (new / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [out / name for name in ("diagnosis.json", "report.md", *figures)]


def _verdict(component: RankUniformity) -> tuple[Cell, str]:
    return Cell("inside", "right") if component.inside else Cell("outside", "wrong"), f"{component.excess:.3f}"
