"""The report of a diagnosis: tables for a terminal, and a directory of tables, numbers and pictures."""

from pathlib import Path

from bayes_dispatch.app.diagnosis import Diagnosis, DiagnosisSettings, HeldOutDiagnosis
from bayes_dispatch.app.reports import write_report
from bayes_dispatch.app.tables import Cell, Table
from bayes_dispatch.checks.calibration_plots import plot_coverage, plot_rank_ecdfs, plot_reliability, plot_risk_coverage
from bayes_dispatch.checks.sbc import RankUniformity
from bayes_dispatch.storage import write_json

__all__ = ["FILES", "TITLE", "diagnosis_tables", "in_words", "write_diagnosis"]

FILES = ("diagnosis.json", "report.md", "ranks.png", "coverage.png", "reliability.png", "risk_coverage.png")
TITLE = "# bayes-dispatch: diagnosis"
LEVEL = 0.9  # of the intervals that are told of in words
MUCH = 0.03  # off the level, at least


def in_words(diagnosis: Diagnosis) -> str:
    """What was found, in a sentence or two for each question."""
    uneven = [each.component for each in diagnosis.ranks.components if not each.inside]
    whose, do = (f" of {', '.join(uneven)}", "do not rank") if uneven else ("", "rank")
    said = [f"On simulated prompts, true weights{whose} {do} evenly among the posterior's draws, as they should."]
    if (found := diagnosis.held_out) is None:
        return said[0]
    row = found.by_length["all"]
    held, calibrated = row[f"posterior {LEVEL:.0%}"], row.get(f"calibrated {LEVEL:.0%}")
    off, much = held.value - LEVEL, max(MUCH, 2 * held.standard_error)
    verdict = "about as they say" if abs(off) <= much else "too few" if off < 0 else "more than they say"
    said.append(f"On held-out prompts, {LEVEL:.0%} intervals hold {held.value:.0%} of the true weights: {verdict}.")
    if calibrated is not None:
        said.append(f"Calibrated ones (`calibrated_interval`) hold {calibrated.value:.0%}.")
    elif off < -much:
        said.append("Calibrated ones, which hold what they say, come from `bayes-dispatch calibrate-gate`.")
    length, scores = list(found.pure.items())[-1]
    said.append(f"The likeliest expert is right in {scores['accuracy']:.1%} of prompts of {length} bytes.")
    return " ".join(said)


def diagnosis_tables(diagnosis: Diagnosis) -> list[Table]:
    """What was found, for a terminal or a report."""
    ranks = diagnosis.ranks
    verdicts: list[list[Cell | str]] = [[each.component, *_verdict(each)] for each in ranks.components]
    settings, held_out = diagnosis.settings, diagnosis.held_out
    note = (
        f"{settings.simulations} prompts were simulated with known weights. If the posterior is exact, these rank "
        "evenly among its draws: the ECDF of the ranks stays in a band around that of even ones, for all components in "
        f"{1 - ranks.false_alarm_rate:.0%} of checks."
    )
    if held_out is None:
        note += " No prompt was judged: that takes held-out text of two experts or more (--text NAME=FILE)."
    tables = [
        Table(
            "Ranks of true weights among posterior draws", ["component", "ranks", "outside the band by"], verdicts, note
        )
    ]
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
    shares = (
        "Share of true weights that intervals of a level hold (± standard error), where the mean weight exceeds .05. "
        "Simulated prompts have the same true weights. If theirs alone are held, the program does not fit real prompts."
    )
    widths = (
        "Share of true weights inside, and in brackets the mean width. Calibrated intervals come from "
        "`calibrate-gate`; those that reach down to 0 hold a 0."
    )
    sure = (
        "Accuracy: how often the likeliest expert is right. ECE: how far P(best) is from that on average. Brier score "
        "and log loss (nats) are of the probabilities of all experts; less is better."
    )
    names = list(next(iter(found.pure.values())))
    scores = [[f"{length} bytes", *(f"{row[name]:.4f}" for name in names)] for length, row in found.pure.items()]
    foreign, curve, rule, served = found.foreign, found.risk_coverage, found.abstention, found.served
    trust = [
        ["serve prompts whose P(best) is at least", "none certified" if rule is None else f"{rule.threshold:.3f}"],
        ["of these wrong, at most", "–" if rule is None else f"{rule.upper_bound:.4f}"],
        ["of other prompts served", "–" if served is None else f"{served[0]:.3f}"],
        ["of these wrong", "–" if served is None else f"{served[1]:.4f}"],
        ["AURC: share wrong, on average over thresholds", f"{curve.aurc:.5f}"],
        ["the same, had all right ones the larger P(best)", f"{curve.aurc - curve.excess_aurc:.5f}"],
        ["AUROC: base weighs more in foreign prompts", f"{foreign.value:.4f} ± {foreign.standard_error:.4f}"],
    ]
    holds = (
        f"The threshold was chosen on half of the prompts so that at most {settings.risk:g} of those served are wrong, "
        f"which holds with probability {1 - settings.delta:g}; the other half judges it."
    )
    return [
        Table(
            "Coverage of intervals on held-out mixtures",
            ["level", "held-out prompts", "simulated prompts", "mean width"],
            levels,
            _and(shares, judged),
        ),
        Table(
            "Coverage by tokens, of the posterior's and of calibrated intervals",
            ["tokens", *heads],
            by_length,
            _and(widths, judged),
        ),
        Table("P(best) on held-out prompts of one domain", ["length", *names], scores, _and(sure, judged)),
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
    parts = [TITLE, in_words(diagnosis), *(table.to_markdown() for table in diagnosis_tables(diagnosis))]
    parts += [f"![{name.partition('.')[0]}]({name})" for name in figures]
    with write_report(out, FILES, TITLE) as new:
        for name, figure in figures.items():
            figure.savefig(new / name)
        write_json(new / "diagnosis.json", diagnosis.to_dict())
        (new / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [out / name for name in ("diagnosis.json", "report.md", *figures)]


def _verdict(component: RankUniformity) -> tuple[Cell, str]:
    return (Cell("even", "right"), "–") if component.inside else (Cell("uneven", "wrong"), f"{component.excess:.3f}")


def _and(*sentences: str) -> str:
    return " ".join(filter(None, sentences))
