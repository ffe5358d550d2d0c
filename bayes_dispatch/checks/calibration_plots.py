"""Pictures of ranks, coverage, reliability and selective risk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

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
        f"Ranks of true weights, ECDF minus uniform; an exact posterior leaves any band with probability ≤ {rate:g}",
        fontsize=9,
        color=INK,
    )
    return figure


def plot_coverage(found: CoverageCurve, simulated: CoverageCurve) -> Figure:
    """Coverage of intervals at each nominal level, beside what the fitted program itself would show."""
    both = (simulated, "on simulations", REFERENCE), (found, "found", FOUND)
    curves = [(curve.levels, curve.values, curve.standard_errors, name, colour) for curve, name, colour in both]
    return _square(curves, "nominal level", "coverage of the true weight (± 2 se)")


def plot_reliability(curve: ReliabilityCurve) -> Figure:
    """Accuracy of the top class by its probability; bars are ± 2 standard errors of a calibrated system's accuracy."""
    found = curve.confidence, curve.accuracy, curve.standard_errors, "found", FOUND
    return _square([found], "P(best) of the predicted component", "share that is right")


def plot_risk_coverage(curve: RiskCoverage, abstention: Abstention | None) -> Figure:
    """Error of the prompts that are served by how many are, the most confident first."""
    figure = plain_figure(4.2, 3.4)
    axis = figure.subplots()
    axis.plot(curve.coverage, curve.risk, color=FOUND, lw=1.4, label=f"found, AURC {curve.aurc:.4f}")
    axis.plot(curve.coverage, curve.oracle_risk, color=REFERENCE, lw=1.2, label="oracle")
    if abstention is not None:
        share = float((curve.confidence >= abstention.threshold).mean())
        label = f"threshold for risk {abstention.risk:g}"
        axis.axvline(share, color=INK, lw=0.9, ls=":", label=label)
    axis.set_xlim(0, 1.01)
    axis.set_ylim(bottom=0)
    _finish(axis, "share of prompts served", "share of these that is wrong")
    return figure


def _square(
    curves: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, str, str]], x_label: str, y_label: str
) -> Figure:
    """Curves ``(x, y, standard errors, name, colour)`` in the unit square, beside its diagonal."""
    figure = plain_figure(3.9, 3.7)
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=FAINT, lw=1.2, zorder=0)
    for x, y, errors, name, colour in curves:
        axis.errorbar(x, y, 2 * errors, color=colour, lw=1.4, marker="o", ms=4, label=name)
    ticks = np.linspace(0, 1, 5)
    axis.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=ticks, yticks=ticks)
    _finish(axis, x_label, y_label, "upper left")
    return figure


def _finish(axis: Axes, x_label: str, y_label: str, legend: Literal["best", "upper left"] = "best") -> None:
    axis.set_xlabel(x_label, fontsize=8, color=INK)
    axis.set_ylabel(y_label, fontsize=8, color=INK)
    axis.legend(fontsize=8, frameon=False, loc=legend)
    plain_axis(axis)
