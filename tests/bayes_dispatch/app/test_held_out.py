"""Held-out text of experts is what they were not trained on, the project's and a user's own. The gate is calibrated
on it in two groups, and a bundle keeps its gate; another dispatcher's is refused."""

import json
import re
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bayes_dispatch.app import held_out
from bayes_dispatch.app.bundle import Bundle, load_bundle
from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.app.commands.terminal import named_paths
from bayes_dispatch.app.held_out import calibrated, held_out_domains, read_own, settled
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.errors import ConfigError, NotFittedError, UnknownNameError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.experts.domains.own import OwnPairs, OwnPrompts, OwnText
from bayes_dispatch.experts.domains.translations import Translations
from bayes_dispatch.inference.scoring.evidence_sets import calibration_evidence, pure_evidence

TEXT = "".join(f"Of {number} things, none is like another.\n" for number in range(300))
PAIRS = tuple((f"{a}*{b}=", str(a * b)) for a in range(8) for b in range(8))


@pytest.fixture(scope="module")
def own(bundle: Bundle) -> Bundle:
    """The bundle with `sort` from a user's file, and `add` under another name."""
    bank = ExpertBank([bundle.experts["reverse"], bundle.experts["sort"], replace(bundle.experts["add"], name="sums")])
    dispatcher = replace(bundle.dispatcher, experts=bank.names)
    dispatcher._know(bundle.dispatcher.state, replace(bundle.dispatcher.prior, names=(*bank.names, "base")))
    evidence = pure_evidence(bundle.model, [OwnText("sort", TEXT)], 4, (16, 20), "train", 0).evidence
    return Bundle(bundle.model, bank, dispatcher, evidence={"sort": evidence})


@pytest.fixture(scope="module")
def gated(bundle: Bundle) -> Bundle:
    return calibrated(bundle, {}, 20, 60, (16, 24), seed=1)


class TestDomains:
    def test_of_the_projects_experts_by_what_they_were_trained_on(self, own: Bundle) -> None:
        """And not by their names: text of the convention `sort` is not that of a user's `sort`."""
        found = held_out_domains(own, {})
        assert {name: domain.name for name, domain in found.items()} == {"reverse": "reverse", "sums": "add"}

    def test_of_a_user(self, own: Bundle) -> None:
        mine = OwnText("sort", TEXT)
        assert list(held_out_domains(own, {"sort": mine}).values())[1] is mine
        with pytest.raises(UnknownNameError, match="expected text of the experts reverse, sort, sums, got some of add"):
            held_out_domains(own, {"add": mine})

    def test_of_real_documents_where_their_packages_are_given(self, bundle: Bundle, tmp_path: Path) -> None:
        """An expert called `de` is one of German there alone: elsewhere it may be of anybody's text."""
        first, *others = (bundle.experts[name] for name in bundle.experts.names)
        german = replace(first, metadata={"domain": "de"})
        bank = ExpertBank([german, *others])
        assert first.name not in held_out_domains(replace(bundle, experts=bank), {})
        found = held_out_domains(replace(bundle, experts=bank), {}, tmp_path)[first.name]
        assert isinstance(found, Translations)
        assert found.language == "de"

    def test_files(self, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text(TEXT)
        (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in PAIRS))
        (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p, _ in PAIRS))
        jsonl = {"b": tmp_path / "pairs.jsonl", "c": tmp_path / "prompts.jsonl"}
        found = read_own({"a": tmp_path / "text.txt"}, jsonl)
        assert [type(domain) for domain in found.values()] == [OwnText, OwnPairs, OwnPrompts]
        assert [domain.name for domain in found.values()] == list(found) == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["text.txt"], "expected --text NAME=FILE, got 'text.txt'"),
            (["=text.txt"], "NAME=FILE"),
            (["a="], "NAME=FILE"),
            (["a=nowhere.txt"], "expected a readable file nowhere.txt"),
            (["a=text.txt", "a=text.txt"], "expected one --text of each name, got two of a"),
            (["b=text.txt"], "expected one file of each expert, got two of b"),
        ],
    )
    def test_bad_files(self, texts: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("text.txt").write_text(TEXT)
        with pytest.raises(ConfigError, match=message):
            read_own(named_paths(texts, "--text"), {"b": Path("pairs.jsonl")})


class TestGate:
    def test_it_is_calibrated_on_held_out_prompts_in_two_groups(self, bundle: Bundle, gated: Bundle) -> None:
        named = {domain.name: domain for domain in CONVENTIONS}
        domains = [named[name] for name in bundle.experts.names]
        known = calibration_evidence(bundle.model, domains, 20, 60, (16, 24), 1)
        assert known.groups.tolist() == [0] * 60 + [1] * 60
        dispatcher, expected = settled(bundle.dispatcher, known, 1)
        assert gated.gate is not None
        np.testing.assert_array_equal(gated.gate.scores, expected.scores)
        assert gated.dispatcher.state.temper == dispatcher.state.temper

    def test_so_are_intervals_and_sets_on_those_of_several(self, bundle: Bundle, gated: Bundle) -> None:
        named = {domain.name: domain for domain in CONVENTIONS}
        domains = [named[name] for name in bundle.experts.names]
        known = calibration_evidence(bundle.model, domains, 20, 60, (16, 24), 1)
        several = known.several
        expected = copy(gated.dispatcher).calibrate(several.evidence, mixtures=several.mixtures, seed=1)
        evidence = pure_evidence(bundle.model, CONVENTIONS[:2], 5, (16, 20), "held_out", 3).evidence
        for ends in (0.5, 0.9):
            np.testing.assert_array_equal(
                gated.dispatcher.posterior(evidence).calibrated_interval(ends),
                expected.posterior(evidence).calibrated_interval(ends),
            )
        np.testing.assert_array_equal(gated.dispatcher.predict_set(evidence), expected.predict_set(evidence))
        with pytest.raises(NotFittedError):
            bundle.dispatcher.predict_set(evidence, 0.9)

    def test_text_of_every_expert_is_needed(self, own: Bundle) -> None:
        with pytest.raises(ConfigError, match="expected held-out text of every expert, got none of sort"):
            calibrated(own, {}, 20, 60, (16, 24), seed=1)

    def test_a_line_of_a_users_file_is_in_one_prompt_of_a_kind(self, own: Bundle) -> None:
        """Thirty held-out lines are thirty prompts, of the other experts as well; all of a kind differ."""
        gate = calibrated(own, {"sort": OwnText("sort", TEXT)}, 40, 99, (16, 24), seed=1).gate
        assert gate is not None
        pure, several = np.bincount(gate.groups)
        assert pure == 90 - 90 // 4
        assert 30 - 30 // 4 <= several <= 45 - 45 // 4

    def test_too_short_a_file_is_refused(self, own: Bundle) -> None:
        """However many prompts could be cut out of its end: they would tell of each other, not of prompts to come."""
        short = OwnText("sort", "".join(TEXT.splitlines(keepends=True)[:100]))
        with pytest.raises(ConfigError) as refused:
            calibrated(own, {"sort": short}, 40, 99, (16, 24), seed=1)
        assert re.fullmatch(
            "expected held-out text for 80 prompts, 25 of them of several experts, got enough for 4\\d and 1\\d: the "
            "last tenth of sort's file gives 10, and no expert has more; give a longer file, or a smaller "
            "--longest",
            str(refused.value),
        )

    def test_a_flat_dispatcher_is_refused_before_a_prompt_is_read(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(held_out, "calibration_evidence", None)
        flat = replace(bundle, dispatcher=Dispatcher.flat(bundle.experts.names))
        with pytest.raises(ConfigError, match=r"expected a dispatcher .* got a flat one: see fit --examples"):
            calibrated(flat, {}, 20, 60, (16, 24), seed=1)

    def test_a_bundle_keeps_it(self, gated: Bundle, tmp_path: Path) -> None:
        gated.save(tmp_path / "gated")
        again = load_bundle(tmp_path / "gated")
        assert again.gate is not None
        assert gated.gate is not None
        evidence = pure_evidence(gated.model, CONVENTIONS[:2], 5, (16, 20), "held_out", 3).evidence
        np.testing.assert_array_equal(
            again.gate.p_values(again.dispatcher, evidence), gated.gate.p_values(gated.dispatcher, evidence)
        )

    def test_that_of_another_dispatcher_is_refused(self, gated: Bundle) -> None:
        other = gated.dispatcher.recalibrate(
            pure_evidence(gated.model, CONVENTIONS[:2], 20, (16, 20), "train", 0).evidence
        )
        with pytest.raises(ConfigError, match=r"expected the dispatcher .* that the gate was calibrated for"):
            replace(gated, dispatcher=other)
        assert isinstance(other, Dispatcher)


class TestCommand:
    def run(self, capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["calibrate-gate", *map(str, arguments)])
        return (int(exit_.value.code or 0), *capfd.readouterr())

    def test_in_place(self, bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        saved = tmp_path / "saved"
        bundle.save(saved)
        few = ["--prompts", "20", "--mixed", "40", "--longest", "24", "--json"]
        code, out, err = self.run(capfd, "--bundle", saved, "--out", saved, *few)
        assert (code, err) == (0, "")
        told = json.loads(out)
        assert (told["out"], told["ranks"], told["bins"]) == (str(saved), 75, 1)
        assert 1 / 37 < told["least_rate"] <= 1 / 20
        again = load_bundle(saved)
        assert again.gate is not None
        globals_ = (each.dispatcher.state.globals.locations["M"] for each in (again, bundle))
        np.testing.assert_array_equal(*globals_)
        evidence = pure_evidence(bundle.model, CONVENTIONS[:2], 5, (16, 20), "held_out", 3).evidence
        assert again.dispatcher.posterior(evidence).calibrated is not None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--text", "sort"], "NAME=FILE"),
            (["--text", "more=text.txt"], "expected text of the experts reverse, sort, add, got some of more"),
            (["--bundle", "nowhere"], "expected a bundle directory"),
            (["--out", "text.txt"], "expected a directory for the output"),
            (["--longest", "8"], "--longest"),
        ],
    )
    def test_bad_input(
        self,
        bundle: Bundle,
        arguments: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("text.txt").write_text(TEXT)
        bundle.save("saved")
        given = [*(["--bundle", "saved"] if "--bundle" not in arguments else []), *arguments]
        code, out, err = self.run(capfd, *([] if "--out" in arguments else ["--out", "new"]), *given)
        assert (code, out) == (2, "")
        assert err.startswith("bayes-dispatch: error: expected ")
        assert message in err
        assert not Path("new").exists()
