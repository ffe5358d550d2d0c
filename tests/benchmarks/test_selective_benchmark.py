"""Selective generation: ratios are those that risk–coverage curves say, scores those that generation reports, and a
temperature is found again."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import selective_generation
from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.checks.selective import risk_coverage
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import CONVENTIONS, Interleaved, Split
from bayes_dispatch.inference.generator import TwoPassGenerator
from polygraph import FIRST, OURS, estimators, rejection_ratios, statistics
from selective_generation import PREDICTIVE, TEMPERATURES, calibration, questions, sets_of, temperature, tempered

needed = pytest.mark.skipif(find_spec("lm_polygraph") is None, reason="needs lm-polygraph")
PROMPTS = ["kfpa>apfk\nmgfoe>", "37+58=95\n12+11=", "ab>ba\nkfpa>apfk\ncd>"]


@needed
def test_ratios_are_the_part_of_the_curve_between_a_random_order_and_the_oracle() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(500) < 0.7
    scores = {"oracle": 0.1 * rng.random(500) - 1.0 * right, "some": rng.normal(size=500) - 1.0 * right}
    scores |= {str(n): rng.normal(size=500) for n in range(100)}
    found = rejection_ratios(scores, right)
    assert found["oracle"] == pytest.approx(1)
    random = [found[str(n)] for n in range(100)]  # the mean's false-alarm rate: that of 4 standard errors, 1 in 10,000
    assert abs(np.mean(random)) < 4 * np.std(random) / 10 + 0.01  # lm-polygraph's own random order errs by .003
    for name, own in scores.items():
        curve = risk_coverage(-own, ~right)
        room = (~right).mean() - (curve.risk - curve.excess_aurc).mean()
        assert found[name] == pytest.approx(1 - curve.excess_aurc / room, abs=0.01)
    assert np.isnan(rejection_ratios(scores, np.ones(500, bool))["some"])


@needed
def test_estimators_give_what_the_generation_reports(bundle: Bundle) -> None:
    made = TwoPassGenerator(bundle).generate(PROMPTS, max_new_tokens=6, stop="a", seed=0)
    found = {str(each): each(statistics(made)) for each in estimators()}
    entropy, information = made.predictive_entropy, made.mutual_information
    expected = {
        FIRST: -np.nansum(made.log_probabilities, 1),
        "Perplexity": -np.nanmean(made.log_probabilities, 1),
        "MeanTokenEntropy": np.nanmean(entropy, 1),
        "mutual information, summed": np.nansum(information, 1),
        "mutual information, mean": np.nanmean(information, 1),
        "predictive entropy, summed": np.nansum(entropy, 1),
        "entropy + mutual information, summed": np.nansum(entropy + information, 1),
        "surprise + mutual information, summed": np.nansum(information - made.log_probabilities, 1),
    }
    assert found.keys() == expected.keys() >= OURS.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9)
    assert (information[:, 0] > 0).all()


def test_without_lm_polygraph_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "lm_polygraph").is_dir()])
    for name in [name for name in sys.modules if name.startswith("lm_polygraph")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"^expected lm-polygraph .*, got none$"):
        estimators()


@pytest.mark.parametrize("blend", ["base", "best_expert"])
def test_an_answer_read_again_at_temperature_1_is_as_probable_as_when_it_was_written(
    bundle: Bundle, blend: str
) -> None:
    made = TwoPassGenerator(bundle).generate(PROMPTS, blend=blend, max_new_tokens=6, stop="a", seed=0)
    again = tempered(bundle, made)
    one = int(np.abs(np.log(TEMPERATURES)).argmin())
    assert TEMPERATURES[one] == pytest.approx(1)
    np.testing.assert_allclose(again[:, one], np.nansum(made.log_probabilities, 1), atol=1e-4)
    assert (again[:, -1] < again[:, one]).all()  # 8 is nearly uniform


def made_up(count: int, truth: float, seed: int) -> dict[str, Any]:
    """Answers of one token of two, right as often as at one temperature the model would say."""
    rng = np.random.default_rng(seed)
    logits = np.abs(rng.normal(scale=4, size=count))
    tempered = -np.log1p(np.exp(-logits[:, None] / TEMPERATURES))
    one = np.abs(np.log(TEMPERATURES)).argmin()
    right = rng.random(count) < 1 / (1 + np.exp(-logits / truth))
    return {"right": right, "tempered": tempered, "confidence": np.exp(tempered[:, one])}


@pytest.mark.parametrize("truth", [0.5, 3.0])
def test_the_temperature_of_the_truth_is_found_and_calibrates(truth: float) -> None:
    found = made_up(40_000, truth, 0)
    assert TEMPERATURES[temperature(found["right"], found["tempered"])] == pytest.approx(truth, rel=0.1)
    rows = {
        str(row[1]).split(",")[0]: row
        for row in calibration({"made up": dict.fromkeys(("base", "best_expert", PREDICTIVE), found)}).rows
    }
    raw, scaled = ([float(str(cell).split(" ")[0]) for cell in rows[name][3:]] for name in (PREDICTIVE, "base"))
    assert scaled[0] < 0.015 < raw[0]  # ten bins of 2,000 answers: errors of .01 each where nothing is wrong
    assert scaled[1] < raw[1]


def test_sets_are_of_the_experts_that_a_bundle_has() -> None:
    found = sets_of(("de", "sort", "fr", "reverse", "json"), 256, None)
    names = {kind: [domain.name for domain in domains] for kind, (domains, _) in found.items()}
    pure = ["de", "sort", "fr", "reverse"]
    assert names == {
        "pure": pure,
        "in turn": ["reverse & sort", "de & fr"],
        "switching": ["reverse then sort", "de then fr"],
        "short": pure,
    }
    assert found["short"][1] == 32
    with pytest.raises(ConfigError, match=r"^expected experts of reverse, .*, ru, got json$"):
        sets_of(("json",), 256, None)


class Long:
    """Items that are longer than short documents."""

    name = "long"

    def items(self, rng: np.random.Generator, split: Split) -> Iterator[tuple[str, str]]:
        while True:
            yield f"{rng.integers(10, 100)}{'-' * 50}>", "answer"


def test_a_question_has_an_item_before_it_however_short_the_document() -> None:
    for domain, question in questions([CONVENTIONS[0], Interleaved("long", (Long(),))], 32, 20, 0):
        assert question.context.count(b"\n") >= 1
        assert question.is_line
        assert domain.reward(question.text, question.expected, question.expected) == 1
    one, other = (questions(CONVENTIONS, 256, 2, seed) for seed in (0, 1))
    assert one == questions(CONVENTIONS, 256, 2, 0) != other


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_smoke_test_prints_every_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    selective_generation.main(quick=True, json_file=tmp_path / "all.json")
    printed = capsys.readouterr().out
    for name in ("in turn", "switching", "short", "best_expert, temperature", "Abstention by the gate"):
        assert name in printed
    assert "nan" not in printed
    assert (tmp_path / "all.json").stat().st_size > 1000
