"""Selective generation: ratios are those that risk–coverage curves say, scores those that generation reports, and a
temperature is found again."""

import json
import sys
from dataclasses import asdict
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
from bayes_dispatch.inference.generator import TwoPassGenerator
from selective import asking
from selective.asking import (
    FOREIGN,
    PLAIN,
    PREDICTIVE,
    TEMPERATURES,
    Answer,
    Asked,
    Kept,
    answered,
    domains_of,
    questions,
    sets_of,
    tempered,
)
from selective.polygraph import BOTH, FIRST, OURS, chrf, estimators, rejection_ratios, statistics
from selective.tables import APART, answers_of, calibration, combined, rejection, temperature
from tests.packages import install_translations

needed = pytest.mark.skipif(
    not (find_spec("lm_polygraph") and find_spec("sacrebleu")), reason="needs lm-polygraph and sacrebleu"
)
PROMPTS = ["kfpa>apfk\nmgfoe>", "37+58=95\n12+11=", "ab>ba\nkfpa>apfk\ncd>"]


@needed
def test_ratios_are_the_part_of_the_curve_between_a_random_order_and_the_oracle() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(500) < 0.7
    scores = {"oracle": 0.1 * rng.random(500) - 1.0 * right, "some": rng.normal(size=500) - 1.0 * right}
    scores |= {str(n): rng.normal(size=500) for n in range(100)}
    found = dict(zip(scores, rejection_ratios([*scores.values()], 1.0 * right), strict=True))
    assert found["oracle"] == pytest.approx(1)
    random = [found[str(n)] for n in range(100)]  # the mean's false-alarm rate: that of 4 standard errors, 1 in 10,000
    assert abs(np.mean(random)) < 4 * np.std(random) / 10 + 0.01  # lm-polygraph's own random order errs by .003
    for name, own in scores.items():
        curve = risk_coverage(-own, ~right)
        room = (~right).mean() - (curve.risk - curve.excess_aurc).mean()
        assert found[name] == pytest.approx(1 - curve.excess_aurc / room, abs=0.01)
    assert np.isnan(rejection_ratios([scores["some"]], np.ones(500))).all()
    graded = 0.25 + 0.5 * right  # only the order and the distances of qualities matter
    assert rejection_ratios([scores["some"]], graded)[0] == pytest.approx(found["some"], abs=1e-9)


@needed
def test_estimators_give_what_the_generation_reports(bundle: Bundle) -> None:
    made = TwoPassGenerator(bundle).generate(PROMPTS, max_new_tokens=6, stop="a", seed=0)
    numbers = np.stack([made.log_probabilities, made.predictive_entropy, made.mutual_information], -1)
    tokens = [own[:length] for own, length in zip(numbers, made.lengths, strict=True)]
    found = {str(each): each(statistics(tokens)) for each in estimators()}
    surprise, entropy, information = -made.log_probabilities, made.predictive_entropy, made.mutual_information
    expected = {
        FIRST: np.nansum(surprise, 1),
        "Perplexity": np.nanmean(surprise, 1),
        "MeanTokenEntropy": np.nanmean(entropy, 1),
        "mutual information, summed": np.nansum(information, 1),
        "mutual information, mean": np.nanmean(information, 1),
        "entropy, summed": np.nansum(entropy, 1),
        "entropy + 1 × mutual information, mean": np.nanmean(entropy + information, 1),
        "surprise + 0.5 × mutual information, summed": np.nansum(surprise + 0.5 * information, 1),
    }
    assert found.keys() == {*list(expected)[:3], *OURS, *BOTH} >= expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9)
    assert (information[:, 0] > 0).all()


def test_without_lm_polygraph_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "lm_polygraph").is_dir()])
    for name in [name for name in sys.modules if name.startswith("lm_polygraph")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"^expected lm-polygraph and sacrebleu .*, got none$"):
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


@needed
def test_a_combination_is_chosen_on_the_other_sets() -> None:
    rng, quality = np.random.default_rng(0), np.linspace(0, 1, 50)
    one, other = [*BOTH][3], [*BOTH][7]

    def ranked_by(name: str) -> dict[str, np.ndarray]:
        return {"quality": quality} | {each: -quality if each == name else rng.normal(size=50) for each in BOTH}

    assert combined({"a": ranked_by(one), "b": ranked_by(other)}, [*BOTH]) == {"a": other, "b": one}


def asked(family: str, quality: list[str], right: list[bool]) -> list[Asked]:
    answers = [
        Answer(text, good, [(-0.5 - n, 1.0, n)]) for n, (text, good) in enumerate(zip(quality, right, strict=True))
    ]
    return [Asked("", family, "pure", 0, n, "de", "Seite", 0.5, {PREDICTIVE: own}) for n, own in enumerate(answers)]


@needed
def test_translations_are_as_good_as_their_chrf_and_other_answers_as_they_are_right() -> None:
    given = [" Seite", "Seiten", "Ja"], [False, False, True]
    graded = answers_of(asked("translations", *given), PREDICTIVE, estimators())
    assert graded["quality"] == pytest.approx([1, chrf("Seiten", "Seite"), 0])
    assert 0.5 < graded["quality"][1] < 1
    judged = answers_of(asked("tasks", *given), PREDICTIVE, estimators())
    assert judged["quality"].tolist() == judged["right"].tolist() == [0, 0, 1]
    assert judged["confidence"] == pytest.approx(np.exp([-0.5, -1.5, -2.5]))
    ratios, *gains = rejection({"one": judged, "other": graded}, 3, 0)
    for table, less in zip(gains, (FIRST, APART), strict=True):
        assert [row[0] for row in table.rows] == [row[0] for row in ratios.rows if row[0] != less]
    assert str(ratios.rows[0][1]).startswith(
        "-0.741"
    )  # the last is right, and the least sure; 1,000 random orders are not all six
    assert str(ratios.rows[0][2]).startswith("1.000")


def test_sets_are_of_the_experts_that_a_bundle_has(tmp_path: Path) -> None:
    install_translations(tmp_path)
    experts = ("de", "sort", "fr", "pt", "pt_BR", "reverse", "json", "chain_sum")
    sets = sets_of(domains_of(experts, tmp_path), 100, tmp_path)
    assert {(*key, each.name) for key, own in sets.items() for each in own} == {
        *(("conventions", "pure", name) for name in ("reverse", "sort")),
        ("conventions", "in turn", "reverse & sort"),
        ("conventions", "switching", "reverse, then sort"),
        ("conventions", "short", "short prompts"),
        *(("translations", "pure", name) for name in ("de", "fr", "pt", "pt_BR")),
        ("translations", "in turn", "de & fr"),
        ("translations", "near pairs in turn", "pt & pt_BR"),
        ("translations", "switching", "de, then fr"),
        ("translations", "switching", "pt, then pt_BR"),
        ("translations", "short", "short prompts"),
        ("tasks", "pure", "chain_sum"),
        ("tasks", "short", "short prompts"),
        (FOREIGN, FOREIGN, FOREIGN),
    }
    with pytest.raises(ConfigError, match=r"^expected experts of reverse, .*, chain_sum, got json$"):
        domains_of(("json",), None)


def test_a_question_is_of_the_domain_that_it_is_said_to_be_of(tmp_path: Path) -> None:
    install_translations(tmp_path)
    sets = sets_of(domains_of(("de", "fr"), tmp_path), 100, tmp_path)
    for kind in ("pure", "in turn", "switching", "short"):
        found = questions(sets["translations", kind], 0, range(12))
        assert found[3:7] == questions(sets["translations", kind], 0, range(3, 7))
        for domain, question in found:
            assert question.expected.startswith(f" {domain} ")
            assert question.is_line
            before = set(question.context.decode().split()) & {"de", "fr"}
            assert before == {"pure": {domain}, "short": {domain}}.get(kind, before) != set()
            assert (len(question.context) < 100) == (kind == "short")
        assert {domain for domain, _ in found} == ({"fr"} if kind == "switching" else {"de", "fr"})


def as_json(each: Asked) -> str:
    return json.dumps(asdict(each))


def test_what_is_kept_is_not_asked_again(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "AT_ONCE", 2)
    monkeypatch.setattr(asking, "ROOM", 6)
    sets = sets_of(domains_of(bundle.experts.names, None), 40, None)
    sets = {key: own for key, own in sets.items() if key[1] in ("short", FOREIGN)}
    path = tmp_path / "new" / "answers.jsonl"
    args = bundle, sets, 40, None
    whole = [*answered(*args, 3, [0], Kept(path))]
    assert [(each.family, each.number) for each in whole] == [(family, n) for family, _ in sets for n in range(3)]
    for each in whole:
        assert each.answers.keys() == (set() if each.family == FOREIGN else {*PLAIN, PREDICTIVE})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))  # stopped
    again = [*answered(*args, 3, [0], Kept(path))]
    assert len(path.read_text().splitlines()) == 6
    assert [each.key for each in again] == [each.key for each in whole]
    for one, other in zip(again, whole, strict=True):
        assert one.expected == other.expected
        for blend, answer in one.answers.items():
            assert answer.text == other.answers[blend].text
            np.testing.assert_allclose(answer.tokens, other.answers[blend].tokens, atol=1e-4)
    monkeypatch.setattr(TwoPassGenerator, "generate", None)
    assert [*map(as_json, answered(*args, 3, [0], Kept(path)))] == [*map(as_json, again)]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_smoke_test_prints_every_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    selective_generation.main(quick=True, json=tmp_path / "answers.jsonl")
    printed = capsys.readouterr().out
    selective_generation.main(only="tables", resamples=2, json=tmp_path / "answers.jsonl")
    assert capsys.readouterr().out == printed
    for name in ("in turn", "switching", "short", "best_expert, temperature", "Abstention by the gate"):
        assert name in printed
    assert "nan" not in printed
