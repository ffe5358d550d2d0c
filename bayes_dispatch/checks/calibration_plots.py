"""Pictures of ranks, coverage, reliability and selective risk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bayes_dispatch.checks.plots import FAINT, INK, PALETTE, plain_axis, plain_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayes_dispatch.checks.coverage import CoverageCurve
    from bayes_dispatch.checks.reliability import ReliabilityCurve
    from bayes_dispatch.checks.sbc import SimulationBasedCalibration
    from bayes_dispatch.checks.selective import Abstention, RiskCoverage

__all__ = ["plot_coverage", "plot_rank_ecdfs", "plot_reliability", "plot_risk_coverage"]

FOUND, REFERENCE = PALETTE[0], PALETTE[1]
TITLE: dict[str, Any] = {"fontsize": 9, "loc": "left", "color": INK}
SURE = 0.98  # bins beyond are one dot: most prompts are there


def plot_rank_ecdfs(calibration: SimulationBasedCalibration, columns: int = 3) -> Figure:
    """ECDF of each component's ranks minus that of uniform ranks, in its simultaneous band.

    Args:
        calibration: of K+1 components. columns: panels in a row.

    Returns:
        The figure; components that leave their band are marked.
    """
    components = calibration.components
    rows = -(-len(components) // columns)
    figure = plain_figure(2.7 * columns, 1.7 * rows + 0.5)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, found in zip(axes.flat, components, strict=False):
        points = found.points
        axis.fill_between(points, found.lower - points, found.upper - points, color=FAINT, lw=0)
        axis.plot(points, found.ecdf - points, color=FOUND if found.inside else PALETTE[3], lw=1.2)
        verdict = "" if found.inside else f": outside by {found.excess:.3f}"
        axis.set_title(f"{found.component}{verdict}", fontsize=8, loc="left", color=INK, parse_math=False)
        plain_axis(axis)
    for axis in list(axes.flat)[len(components) :]:
        axis.set_visible(False)
    rate = calibration.false_alarm_rate
    figure.suptitle(
        "Does the true weight rank evenly among the posterior draws, on simulated prompts?\n"
        f"If it does, all lines stay within the grey bands in {1 - rate:.0%} of checks.",
        fontsize=9,
        color=INK,
    )
    figure.supxlabel("rank of the true weight among the draws, as a share", fontsize=8, color=INK)
    figure.supylabel("cumulative share of prompts − that of even ranks", fontsize=8, color=INK)
    return figure


def plot_coverage(found: CoverageCurve, simulated: CoverageCurve) -> Figure:
    """Coverage of intervals at each nominal level, beside what the fitted program itself would show."""
    both = (simulated, "prompts simulated by the dispatcher", REFERENCE), (found, "held-out prompts", FOUND)
    figure, axis = _square(0.0, "Do intervals hold the true weights as often as they say?")
    for curve, name, colour in both:
        axis.errorbar(
            curve.levels, curve.values, 2 * curve.standard_errors, color=colour, lw=1.4, marker="o", ms=4, label=name
        )
    _finish(axis, "probability that the interval states", "share that holds the true weight (± 2 se)", "upper left")
    return figure


def plot_reliability(curve: ReliabilityCurve) -> Figure:
    """Accuracy of the top class by its probability; bars are ± 2 standard errors of a calibrated system's accuracy.

    Bins of a probability above .98 are drawn as one; each dot tells of how many prompts it is.
    """
    bins = np.unique(np.where(curve.confidence > SURE, curve.confidence.size, np.arange(curve.confidence.size)))
    groups = [curve.confidence > SURE if place == curve.confidence.size else [place] for place in bins]
    counts = np.array([curve.counts[group].sum() for group in groups])
    x, y = (
        np.array([np.average(values[group], weights=curve.counts[group]) for group in groups])
        for values in (curve.confidence, curve.accuracy)
    )
    errors = np.array([np.hypot.reduce((curve.standard_errors * curve.counts)[group]) for group in groups]) / counts
    figure, axis = _square(
        np.floor(10 * min(x.min(), (y - 2 * errors).min())) / 10,
        "Is the likeliest expert right as often as P(best) says?",
    )
    axis.errorbar(
        x,
        y,
        2 * errors,
        color=FOUND,
        lw=1.4,
        marker="o",
        ms=4,
        label="held-out prompts of one expert, and their number",
    )
    for place, count in zip(zip(x, y, strict=True), counts, strict=True):
        axis.annotate(str(count), place, (4, -10), textcoords="offset points", fontsize=7, color=INK)
    _finish(axis, "P(best) of the likeliest expert", "share that is right (± 2 se)", "lower right")
    return figure


def plot_risk_coverage(curve: RiskCoverage, abstention: Abstention | None) -> Figure:
    """Error of the prompts that are served by how many are, the most confident first; from the first error on."""
    figure = plain_figure(4.6, 3.7)
    axis = figure.subplots()
    axis.plot(curve.coverage, curve.risk, color=FOUND, lw=1.4, label="the largest P(best) first")
    axis.plot(
        curve.coverage, curve.oracle_risk, color=REFERENCE, lw=1.2, label="all right ones first: the least possible"
    )
    if abstention is not None:
        share = float((curve.confidence >= abstention.threshold).mean())
        label = f"P(best) ≥ {abstention.threshold:.2f}, certified for {abstention.risk:g}"
        axis.axvline(share, color=INK, lw=0.9, ls=":", label=label)
    wrong = curve.coverage[curve.risk > 0]
    axis.set_xlim(np.floor(10 * wrong[0] - 0.01) / 10 if len(wrong) else 0, 1.005)
    axis.set_ylim(bottom=0)
    axis.set_title("How often wrong, where the least sure are not served?", **TITLE)
    _finish(axis, "share of prompts served", "share of these that is wrong")
    return figure


def _square(least: float, title: str) -> tuple[Figure, Axes]:
    """A square from ``least`` to 1 with its diagonal."""
    figure = plain_figure(4.2, 4.0)
    axis = figure.subplots()
    least = max(least, 0.0)
    axis.plot([least, 1], [least, 1], color="0.75", lw=1.2, zorder=0, label="as stated")
    axis.set(xlim=(least, 1.02), ylim=(least, 1.02))
    axis.set_title(title, **TITLE)
    return figure, axis


def _finish(
    axis: Axes, x_label: str, y_label: str, legend: Literal["best", "upper left", "lower right"] = "best"
) -> None:
    axis.set_xlabel(x_label, fontsize=8, color=INK)
    axis.set_ylabel(y_label, fontsize=8, color=INK)
    axis.legend(fontsize=8, frameon=False, loc=legend)
    plain_axis(axis)
