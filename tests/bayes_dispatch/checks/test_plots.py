"""Pictures: one panel a prompt, one bar a prompt, any text as a label, and no pyplot."""

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from bayes_dispatch.checks.calibration_plots import plot_reliability, plot_risk_coverage
from bayes_dispatch.checks.plots import BASE_COLOUR, expert_colours, largest, plot_blend_bars, plot_forest
from bayes_dispatch.checks.reliability import ReliabilityCurve
from bayes_dispatch.checks.selective import risk_coverage
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import TensorError

NAMES = ("sort", "reverse", "base")
PROMPTS = ["kfpa>", "a\nb " * 30, "$\\frac{1}$ $x_", "naïve ☃", ""]


@pytest.fixture(scope="module")
def posterior() -> DispatchPosterior:
    return DispatchPosterior(np.random.default_rng(0).dirichlet(np.ones(3), (8, 5)), NAMES)


def saved(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Glyph .* missing from")
def test_forest(posterior: DispatchPosterior) -> None:
    """A visible panel for each prompt; its dots are the posterior means."""
    figure = plot_forest(posterior, PROMPTS, columns=3)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert (len(figure.axes), len(panels)) == (6, 5)
    dots = [[line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"] for axis in panels]
    np.testing.assert_allclose(dots, posterior.mean)
    ends = [[line.get_xdata() for line in axis.lines if line.get_linewidth() == 1.4] for axis in panels]
    np.testing.assert_allclose(np.moveaxis(np.array(ends), -1, 0), posterior.interval(0.9))
    assert b"</svg>" in saved(figure)
    assert len(plot_forest(posterior.select([0]), PROMPTS[:1]).axes) == 1


@pytest.mark.filterwarnings("ignore:Glyph .* missing from")
def test_blend_bars(posterior: DispatchPosterior) -> None:
    """A bar for each prompt, from 0 to 1, in segments as wide as the means."""
    figure = plot_blend_bars(posterior, PROMPTS)
    (axis,) = figure.axes
    widths = np.array([[bar.get_width() for bar in container] for container in axis.containers])
    np.testing.assert_allclose(widths.T, posterior.mean)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(NAMES)
    assert b"</svg>" in saved(figure)


def test_colours() -> None:
    colours = expert_colours([f"e{i}" for i in range(12)] + ["base"])
    assert len(set(colours.values())) == 13
    assert colours["base"] == BASE_COLOUR


@pytest.mark.parametrize("plot", [plot_forest, plot_blend_bars])
def test_another_number_of_labels(plot: object, posterior: DispatchPosterior) -> None:
    with pytest.raises(TensorError, match="expected 5 prompt labels, got 1"):
        plot(posterior, ["a"])  # type: ignore[operator]


@pytest.mark.slow
def test_pyplot_stays_out() -> None:
    code = (
        "import sys, numpy as np; from bayes_dispatch.checks.plots import plot_blend_bars as p;"
        "from bayes_dispatch.dispatcher.posterior import DispatchPosterior as D;"
        "p(D(np.full((2, 1, 2), .5), ('a', 'base')), ['x']); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_of_many_experts_the_largest_are_shown() -> None:
    """Each row still sums to what it did; of few experts all are shown."""
    weights = np.random.default_rng(0).dirichlet(np.full(20, 0.2), 6)
    names = [f"e{k}" for k in range(19)] + ["base"]
    shown, chosen = largest(weights, names, 5)
    assert chosen[-2:] == ["others", "base"]
    assert len(chosen) == 6
    np.testing.assert_allclose(shown.sum(1), 1)
    np.testing.assert_array_equal(shown[:, -1], weights[:, -1])
    kept = [names.index(name) for name in chosen[:-2]]
    np.testing.assert_array_equal(shown[:, :-2], weights[:, kept])
    assert kept == sorted(kept)
    assert weights[:, kept].max(0).min() >= np.delete(weights[:, :-1], kept, 1).max()
    assert len(set(expert_colours(chosen).values())) == 6
    assert largest(weights[:, :6], [*names[:5], "base"], 5)[1] == [*names[:5], "base"]


def test_reliability_of_what_is_nearly_certain_is_one_dot() -> None:
    """Where most prompts are: their mean, and all of them counted."""
    counts, accuracy = np.array([10, 20, 30, 10]), np.array([0.6, 0.9, 1.0, 0.9])
    curve = ReliabilityCurve(counts, np.array([0.6, 0.9, 0.99, 1.0]), accuracy, np.full(4, 0.01))
    (axis,) = plot_reliability(curve).axes
    (line,) = [line for line in axis.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(line.get_xydata(), [[0.6, 0.6], [0.9, 0.9], [0.9925, 0.975]])
    assert [text.get_text() for text in axis.texts] == ["10", "20", "40"]
    assert axis.get_xlim()[0] == axis.get_ylim()[0] == 0.5


def test_risk_is_drawn_from_the_first_error_on() -> None:
    confidence, wrong = np.arange(100)[::-1] / 100, np.arange(100) >= 85
    (axis,) = plot_risk_coverage(risk_coverage(confidence, wrong), None).axes
    assert axis.get_xlim()[0] == 0.8
    (axis,) = plot_risk_coverage(risk_coverage(confidence, np.zeros(100)), None).axes
    assert axis.get_xlim()[0] == 0
