"""Posteriors under several globals are averaged; the table has its floor first."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import agreement
import bayes_dispatch as bd
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.fitting.svi import SVISettings, isolated


@pytest.mark.usefixtures("unchecked")
def test_posteriors_are_averaged_over_globals() -> None:
    """Half the draws are of each; those of a second draw of the globals are not those of the first."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    evidence = bd.Evidence({"hidden": labels[:, None] * 2.0 + rng.normal(size=(60, 3))}, np.full(60, 30))
    settings = {"svi": SVISettings(steps=20, rounds=1), "features": FeatureSettings(dimensions=2, folds=2)}
    dispatcher = bd.Dispatcher(["a", "b"], **settings).fit(evidence, labels)
    few = evidence.select(range(4))
    with isolated(0):
        first, second = (dispatcher.state.globals.draw() for _ in range(2))
    both = agreement.summed_out(dispatcher, few, [first, second], 200, 0)
    alone = agreement.summed_out(dispatcher, few, [first], 100, 0)
    assert both.weights.shape == (200, 4, 3)
    assert both.experts == ("a", "b", "base")
    np.testing.assert_array_equal(both.weights[:100], alone.weights)
    apart = agreement.summed_out(dispatcher, few, [second], 100, 1)
    np.testing.assert_array_equal(both.weights[100:], apart.weights)
    assert np.abs(apart.mean - alone.mean).max() > 0.01


@pytest.mark.slow
def test_nuts_is_compared_with_itself_first(capsys: pytest.CaptureFixture[str]) -> None:
    agreement.main(only=agreement.Works.FIXED, on=agreement.Data.SIMULATED, quick=True)
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[2:] == ["NUTS again", "quadrature, the same globals", "served"]
