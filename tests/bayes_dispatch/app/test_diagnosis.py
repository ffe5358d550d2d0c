"""The diagnosis of a bundle: its numbers are those of the checks on held-out prompts, by its seed, and its files are
whole. Experts without text compete unjudged; bad settings and text are refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.app.diagnosis import Diagnosis, DiagnosisSettings, diagnose
from bayes_dispatch.app.diagnosis_report import FILES, diagnosis_tables, in_words, write_diagnosis
from bayes_dispatch.app.held_out import calibrated
from bayes_dispatch.checks.coverage import Coverage
from bayes_dispatch.checks.reliability import expected_calibration_error
from bayes_dispatch.checks.selective import Abstention, risk_coverage
from bayes_dispatch.dispatcher.conformal import counted
from bayes_dispatch.errors import ConfigError, UnknownNameError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import EXPERT_DOMAINS
from bayes_dispatch.experts.domains.own import OwnText
from bayes_dispatch.inference.scoring.evidence_sets import mixed_evidence, pure_evidence
from tests.bayes_dispatch.conftest import coarsely

MINE = OwnText("sort", "".join(f"Of {number} things, none is like another.\n" for number in range(60)))
SETTINGS = DiagnosisSettings(
    simulations=40, mixtures=20, mixture_lengths=(16, 32), prompts=20, lengths=(16, 24), draws=39, seed=3
)


@pytest.fixture(scope="module")
def bundle(bundle: Bundle) -> Bundle:
    """The tiny one, whose posteriors are quick to compute."""
    return replace(bundle, dispatcher=coarsely(bundle.dispatcher))


@pytest.fixture(scope="module")
def found(bundle: Bundle) -> Diagnosis:
    return diagnose(bundle, SETTINGS)


def test_numbers_are_of_held_out_prompts(bundle: Bundle, found: Diagnosis) -> None:
    names = {domain.name: domain for domain in EXPERT_DOMAINS}
    domains = [names[name] for name in bundle.experts.names]
    known = pure_evidence(bundle.model, domains, 20, (24, 24), "held_out", 3 + 24)
    probabilities = bundle.dispatcher.predict_proba(known.evidence)
    assert found.held_out.pure[24]["accuracy"] == (probabilities.argmax(1) == known.labels).mean()
    assert found.held_out.pure[24]["ECE"] == expected_calibration_error(probabilities, known.labels)
    assert found.held_out.reliability.counts.sum() == 2 * 20 * len(domains)
    assert len(found.held_out.risk_coverage.risk) == 20 * len(domains)
    assert [c.component for c in found.ranks.components] == [*bundle.experts.names, "base"]
    assert found.ranks.ranks.shape == (40, len(domains) + 1)
    assert found.held_out.coverage.levels.tolist() == found.held_out.simulated.levels.tolist()
    assert (found.held_out.foreign.inside, found.held_out.foreign.outside % 20) == (20 * len(domains), 0)


def test_coverage_by_length(bundle: Bundle, found: Diagnosis) -> None:
    """All mixtures are in one range, of each of which the intervals are judged; calibrated ones where there are any."""
    rows = found.held_out.by_length
    assert set(rows) <= {"1 to 15", "16 to 23", "24 and more", "all"}
    names = ["posterior 50%", "posterior 90%"]
    assert all(list(row) == names for row in rows.values())
    counts = [row["posterior 90%"].count for row in rows.values()]
    assert sum(counts[:-1]) == counts[-1] > 0
    new = calibrated(bundle, {}, 20, 60, (16, 32), seed=1)
    again = diagnose(replace(new, dispatcher=coarsely(new.dispatcher)), SETTINGS).held_out.by_length["all"]
    assert list(again) == [*names, "calibrated 50%", "calibrated 90%"]
    assert again["posterior 90%"] == rows["all"]["posterior 90%"]
    names_of = {domain.name: domain for domain in EXPERT_DOMAINS}
    domains, lengths = [names_of[name] for name in bundle.experts.names], SETTINGS.mixture_lengths
    known = mixed_evidence(bundle.model, domains, 20, lengths, "held_out", SETTINGS.seed, cut=bundle.cut)
    assert again["calibrated 90%"].count == counted(coarsely(new.dispatcher).mean(known.evidence)).sum()
    assert again["calibrated 90%"].value > again["calibrated 50%"].value


def test_same_seed_same_numbers(bundle: Bundle, found: Diagnosis) -> None:
    assert diagnose(bundle, SETTINGS).to_dict() == found.to_dict()
    assert diagnose(bundle, replace(SETTINGS, seed=4)).to_dict() != found.to_dict()


def test_share_served_by_a_threshold(found: Diagnosis) -> None:
    confidence, wrong = np.array([0.9, 0.8, 0.7, 0.6]), np.array([False, True, False, True])
    curve = risk_coverage(confidence, wrong)
    rule = Abstention(threshold=0.7, risk=0.5, delta=0.1, count=4, served=3, errors=1, upper_bound=0.4)
    assert replace(found.held_out, risk_coverage=curve, abstention=rule).served == (0.75, pytest.approx(1 / 3))
    assert replace(found.held_out, risk_coverage=curve, abstention=replace(rule, threshold=0.95)).served == (0, 0)
    none = replace(found.held_out, risk_coverage=curve, abstention=None)
    assert none.served is None
    assert "none certified" in diagnosis_tables(replace(found, held_out=none))[-1].to_markdown()


def test_the_first_line_says_what_was_found(found: Diagnosis) -> None:
    held_out, row = found.held_out, found.held_out.by_length["all"]

    def said(value: float, error: float = 0.01, **more: Coverage) -> str:
        judged = Coverage(value, error, 100, 0.2)
        by_length = {"all": row | {"posterior 90%": judged} | {name.replace("_", " "): c for name, c in more.items()}}
        return in_words(replace(found, held_out=replace(held_out, by_length=by_length)))

    assert "90% intervals hold 88% of the true weights: about as they say." in said(0.88)
    assert "hold 55% of the true weights: too few. Calibrated ones, which hold what they say, come from" in said(0.55)
    assert "hold 80% of the true weights: about as they say" in said(0.8, error=0.06)
    assert "hold 99% of the true weights: more than they say." in said(0.99)
    assert "Calibrated ones (`calibrated_interval`) hold 91%." in said(
        0.5, **{"calibrated_90%": Coverage(0.91, 0, 9, 0)}
    )
    component = found.ranks.components[0]
    odd = replace(found.ranks, components=(replace(component, upper=component.ecdf - 0.1), *found.ranks.components[1:]))
    assert in_words(replace(found, ranks=odd)).startswith(
        "On simulated prompts, true weights of reverse do not rank evenly"
    )


def test_what_is_no_number_is_null(found: Diagnosis) -> None:
    held_out = found.held_out
    odd = replace(held_out, foreign=replace(held_out.foreign, value=float("nan")))
    told = json.loads(json.dumps(replace(found, held_out=odd).to_dict(), allow_nan=False))
    assert told["foreign_auroc"]["value"] is None
    assert told["ranks"] == found.to_dict()["ranks"]


def test_files(found: Diagnosis, tmp_path: Path) -> None:
    out = tmp_path / "new" / "diagnosis"
    assert write_diagnosis(found, out) == [out / name for name in FILES]
    (out / "mine.txt").write_text("stays")
    write_diagnosis(found, out)
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "mine.txt"])
    assert sorted(path.name for path in out.parent.iterdir()) == ["diagnosis"]
    assert json.loads((out / "diagnosis.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    report = (out / "report.md").read_text()
    assert all(name in report for name in FILES if name.endswith(".png"))
    assert all(component.component in report for component in found.ranks.components)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name.endswith(".png"))


@pytest.mark.parametrize(
    "bad",
    [
        {"simulations": 5},
        {"mixtures": 0},
        {"prompts": 19},
        {"draws": 3},
        {"seed": -1},
        {"risk": 0.0},
        {"delta": 1.0},
        {"risk": "a"},
        {"delta": None},
        {"lengths": ()},
        {"lengths": (0,)},
        {"lengths": (1.5,)},
        {"lengths": 3},
        {"mixture_lengths": (16,)},
        {"mixture_lengths": (32, 16)},
        {"mixture_lengths": (3, 16)},
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"expected .* got"):
        replace(SETTINGS, **bad)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def own(bundle: Bundle) -> Bundle:
    """With `sort` from a user's file."""
    evidence = pure_evidence(bundle.model, [MINE], 4, (16, 20), "train", 0).evidence
    return replace(bundle, evidence={"sort": evidence})


class TestExpertsOfAUser:
    def test_without_their_text_they_are_not_judged_but_compete(self, own: Bundle, tmp_path: Path) -> None:
        found = diagnose(own, SETTINGS)
        assert found.unjudged == ("sort",)
        assert len(found.held_out.risk_coverage.risk) == 20 * 2
        named = {domain.name: domain for domain in EXPERT_DOMAINS}
        known = pure_evidence(own.model, [named["reverse"], named["add"]], 20, (24, 24), "held_out", 3 + 24)
        best = own.dispatcher.predict_proba(known.evidence).argmax(1)
        assert (
            found.held_out.pure[24]["accuracy"] == (best == np.array([0, 2])[known.labels]).mean()
        )  # of reverse, sort, add
        assert [c.component for c in found.ranks.components] == ["reverse", "sort", "add", "base"]
        assert "Without prompts of sort" in diagnosis_tables(found)[1].to_markdown()
        assert json.loads(json.dumps(found.to_dict()))["unjudged"] == ["sort"]
        write_diagnosis(found, tmp_path)

    def test_with_their_text_they_are(self, own: Bundle, found: Diagnosis) -> None:
        mine = diagnose(own, SETTINGS, own={"sort": MINE})
        assert mine.unjudged == ()
        assert len(mine.held_out.risk_coverage.risk) == 20 * 3
        assert mine.held_out.pure != found.held_out.pure  # those are of the convention

    def test_bad_text(self, own: Bundle) -> None:
        with pytest.raises(UnknownNameError, match="expected text of the experts reverse, sort, add, got some of mine"):
            diagnose(own, SETTINGS, own={"mine": MINE})

    def test_without_text_of_two_simulations_alone_are_judged(
        self, own: Bundle, found: Diagnosis, tmp_path: Path
    ) -> None:
        """As for a bundle that was put together by hand; pictures of an earlier run do not stay beside its report."""
        write_diagnosis(found, tmp_path)
        mine = diagnose(replace(own, evidence=dict.fromkeys(("sort", "add"), own.evidence["sort"])), SETTINGS)
        assert mine.unjudged == ("sort", "add")
        assert mine.held_out is None
        assert (mine.ranks.ranks == found.ranks.ranks).all()
        assert [path.name for path in write_diagnosis(mine, tmp_path)] == ["diagnosis.json", "report.md", "ranks.png"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["diagnosis.json", "ranks.png", "report.md"]
        assert "No prompt was judged" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["given", "not given"])
def test_the_command(own: Bundle, given: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own.save(tmp_path / "saved")
    (tmp_path / "mine.txt").write_text(MINE.text)
    arguments = ["--bundle", tmp_path / "saved", "--out", tmp_path / "out", "--json"]
    arguments += [part for option in ("--simulations", "--mixtures", "--prompts") for part in (option, 20)]
    arguments += ["--text", f"sort={tmp_path / 'mine.txt'}", "--shortest", 20, "--longest", 40] if given else []
    with pytest.raises(SystemExit) as exit_:
        cli.main(["diagnose", *map(str, arguments)])
    assert exit_.value.code == 0
    told = json.loads(capfd.readouterr().out)
    assert told["unjudged"] == ([] if given else ["sort"])
    assert told["settings"]["mixture_lengths"] == ([20, 40] if given else [16, 256])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_an_expert_under_another_name_is_judged_on_what_it_was_trained_on(bundle: Bundle, found: Diagnosis) -> None:
    renamed = [replace(bundle.experts[name], name=f"my-{name}") for name in bundle.experts.names]
    names = tuple(expert.name for expert in renamed)
    dispatcher = replace(bundle.dispatcher, experts=names)
    dispatcher._know(bundle.dispatcher.state, replace(bundle.dispatcher.prior, names=(*names, "base")))
    again = diagnose(replace(bundle, experts=ExpertBank(renamed), dispatcher=dispatcher), SETTINGS)
    assert again.unjudged == ()
    assert again.held_out.pure == found.held_out.pure
