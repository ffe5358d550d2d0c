"""Pictures of dispatcher posteriors. Matplotlib is imported when a picture is drawn, and no display is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import TensorError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["expert_colours", "largest", "plain_axis", "plain_figure", "plot_blend_bars", "plot_forest"]

BASE_COLOUR = "#b8bcc4"
OTHERS = "others"
INK, FAINT = "#22252b", "#e6e8ec"
# Okabe and Ito's colours and four more, told apart by colour-blind readers as far as so many can be.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#7a5195", "#8c6d31"),
    *("#2f4b7c", "#a2c523", "#ef5675", "#17becf"),
)


def expert_colours(experts: Sequence[str]) -> dict[str, str]:
    """A colour for each expert, in order; ``"base"`` is grey, and ``"others"`` of :func:`largest` light grey."""
    colours = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(experts)}
    greys = {OTHERS: FAINT} if OTHERS in experts else {}
    return colours | greys | {"base": BASE_COLOUR}


def largest(
    weights: Float[np.ndarray, "row expert"], experts: Sequence[str], most: int = len(PALETTE)
) -> tuple[Float[np.ndarray, "row shown"], list[str]]:
    """The columns that a stacked picture shows, and their names: colours are few.

    Where there are more than ``most`` experts, those of the largest weight in any row stay, in their order, and base;
    the weights of the rest are summed as ``"others"``.
    """
    if len(experts) - 1 <= most:
        return weights, list(experts)
    kept = np.sort(np.argsort(-weights[:, :-1].max(0, initial=0.0), kind="stable")[: most - 1])
    rest = weights[:, :-1].sum(1) - weights[:, kept].sum(1)
    shown = np.column_stack([weights[:, kept], rest, weights[:, -1]])
    return shown, [*(experts[k] for k in kept), OTHERS, experts[-1]]


def plot_forest(
    posterior: DispatchPosterior, prompts: Sequence[str], probability: float = 0.9, columns: int = 4
) -> Figure:
    """Posterior intervals of every weight, one small panel for each prompt.

    Args:
        posterior: draws of N prompts.
        prompts: N labels.
        probability: of the thin equal-tailed intervals; the thick ones hold half.
        columns: panels in a row.

    Returns:
        The figure.

    Raises:
        TensorError: another number of labels than prompts.
    """
    count, experts = _check(posterior, prompts), posterior.experts
    columns = min(columns, max(count, 1))
    rows = -(-count // columns)
    figure = plain_figure(2.6 * columns + 1.0, rows * (0.19 * len(experts) + 0.75) + 0.5)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colours, heights = expert_colours(experts), np.arange(len(experts))[::-1]
    outer, inner, mean = posterior.interval(probability), posterior.interval(0.5), posterior.mean
    for index, axis in enumerate(axes.flat):
        if index >= count:
            axis.set_visible(False)
            continue
        for expert, (name, height) in enumerate(zip(experts, heights, strict=True)):
            colour = colours[name]
            axis.plot(outer[:, index, expert], [height, height], color=colour, lw=1.4, solid_capstyle="round")
            axis.plot(
                inner[:, index, expert], [height, height], color=colour, lw=4.0, solid_capstyle="round", alpha=0.55
            )
            axis.plot(mean[index, expert], height, "o", ms=4.5, color=colour, mec="white", mew=0.8, zorder=3)
        axis.set_title(_short(prompts[index], 34), fontsize=8, loc="left", color=INK, parse_math=False)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
        axis.set_yticks(heights, experts)
        axis.set_ylim(-0.6, len(experts) - 0.4)
        axis.hlines(heights, 0, 1, color=FAINT, lw=0.6, zorder=0)
        plain_axis(axis)
        axis.tick_params(labelbottom=index + columns >= count)
    figure.suptitle(
        f"Weight of each expert in the prompt: mean (dot), 50% (thick) and {probability:.0%} (thin) intervals",
        fontsize=10,
        color=INK,
    )
    figure.supxlabel("weight", fontsize=8, color=INK)
    return figure


def plot_blend_bars(posterior: DispatchPosterior, prompts: Sequence[str]) -> Figure:
    """Posterior mean of the weights as one stacked bar for each prompt, experts in colour, base grey.

    Of more than twelve experts the smallest are drawn as one.

    Args:
        posterior: draws of N prompts.
        prompts: N labels.

    Returns:
        The figure.

    Raises:
        TensorError: another number of labels than prompts.
    """
    count, (mean, names) = _check(posterior, prompts), largest(posterior.mean, posterior.experts)
    colours = expert_colours(names)
    figure = plain_figure(9.0, 0.36 * count + 1.3)
    axis = figure.subplots()
    heights = np.arange(count)[::-1]
    left = np.zeros(count)
    for expert, name in enumerate(names):
        axis.barh(heights, mean[:, expert], 0.74, left, color=colours[name], edgecolor="white", lw=0.8, label=name)
        for row in np.flatnonzero(mean[:, expert] >= 0.12):
            where = left[row] + mean[row, expert] / 2
            ink = INK if name in ("base", OTHERS) else "white"
            axis.text(where, heights[row], f"{mean[row, expert]:.2f}", ha="center", va="center", fontsize=7, color=ink)
        left += mean[:, expert]
    labels = [_short(prompt, 44) for prompt in prompts]
    axis.set_yticks(heights, labels, fontsize=8)
    for label in axis.get_yticklabels():
        label.set_parse_math(False)
    axis.set_ylim(-0.6, count - 0.4)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    axis.set_xlabel("posterior mean weight", fontsize=8, color=INK)
    plain_axis(axis)
    figure.legend(loc="outside upper center", ncols=min(len(names), 9), fontsize=8, frameon=False, handlelength=1.0)
    return figure


def _check(posterior: DispatchPosterior, prompts: Sequence[str]) -> int:
    if len(prompts) != len(posterior):
        raise TensorError(f"expected {len(posterior)} prompt labels, got {len(prompts)}")
    return len(prompts)


def plain_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure  # not pyplot: no global figure list, no display

    return Figure((width, height), layout="constrained", dpi=130)


def plain_axis(axis: object) -> None:
    """Take away frame and ticks."""
    axis.spines[["top", "right", "left"]].set_visible(False)  # type: ignore[attr-defined]
    axis.spines["bottom"].set_color(FAINT)  # type: ignore[attr-defined]
    axis.tick_params(length=0, labelsize=8, colors=INK)  # type: ignore[attr-defined]


def _short(text: str, width: int) -> str:
    """One line of at most ``width`` characters: newlines as ⏎, the end cut."""
    line = text.replace("\n", "⏎")
    return line if len(line) <= width else line[: width - 1] + "…"
