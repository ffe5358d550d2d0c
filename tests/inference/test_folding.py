"""What the machine's costs choose alters no text: one row folds its scales where that pays, and several never do."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import Blend, PosteriorMean, PosteriorPredictive, RefinedMean
from bayes_dispatch.model.mambaformer.compiled.product_costs import SWITCH, ProductCosts, machine, save_costs
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle

PROMPT = "kfpa>apfk\nbcde>"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that were multiplied by their scales."""
    shapes: list[tuple[int, ...]] = []
    folded = SVDLinear.folded

    def watched(linear: SVDLinear, z: Any) -> Any:
        shapes.append(tuple(linear.weight.shape))
        return folded(linear, z)

    monkeypatch.setattr(SVDLinear, "folded", watched)
    return shapes


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("blend", "times"),
    [
        (PosteriorMean(), 1),
        (RefinedMean(6), 1),  # six rows read the prompt, one generates
        (PosteriorPredictive(6, merge=100.0), 1),  # six rows, of which one is left
        (PosteriorPredictive(6, merge=0.0), 0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("system", ["bundle", "bundle64", "cut64"])
def test_the_choice_alters_no_text(
    request: pytest.FixtureRequest,
    system: str,
    blend: Blend,
    times: int,
    built: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    bundle: Bundle = request.getfixturevalue(system)
    generator, atol = TwoPassGenerator(bundle), 1e-5 if system == "bundle" else 1e-10
    results = []
    for building in (1e30, 1e-30):
        file = tmp_path / f"{building}.json"
        save_costs(ProductCosts(machine(), (1,), (1e-9,), building), file)
        monkeypatch.setenv(SWITCH, str(file))
        built.clear()
        results.append(generator.generate([PROMPT], blend=blend, max_new_tokens=6, seed=0))
        assert len(built) == (times * len(bundle.experts.matrices) if building < 1 else 0)
    factored, folded = results
    assert factored.texts == folded.texts
    for name in ("log_probabilities", "predictive_entropy", "weights"):
        np.testing.assert_allclose(getattr(folded, name), getattr(factored, name), rtol=0, atol=atol)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("blend", [PosteriorMean(), RefinedMean(6), PosteriorPredictive(6, merge=100.0)], ids=repr)
@pytest.mark.parametrize("system", ["bundle64", "cut64"])
def test_a_chat_builds_once_for_all_turns_of_its_particles(
    request: pytest.FixtureRequest,
    system: str,
    blend: Blend,
    built: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """And says what it says without."""
    bundle: Bundle = request.getfixturevalue(system)
    said = []
    for building in (1e30, 1e-30):
        file = tmp_path / f"{building}.json"
        save_costs(ProductCosts(machine(), (1,), (1e-9,), building), file)
        monkeypatch.setenv(SWITCH, str(file))
        built.clear()
        chat = TwoPassGenerator(bundle).chat(blend=blend, threshold=float("inf"), seed=0)
        said.append([chat.say(text, 5, stop=None) for text in (PROMPT, "edcb\nab>", "1+2=")])
        assert len(built) == (len(bundle.experts.matrices) if building < 1 else 0)
    for factored, folded in zip(*said, strict=True):
        assert factored.text == folded.text
        np.testing.assert_allclose(folded.log_probabilities, factored.log_probabilities, rtol=0, atol=1e-10)
        np.testing.assert_allclose(folded.weights, factored.weights, rtol=0, atol=1e-10)
