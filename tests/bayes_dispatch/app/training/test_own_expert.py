"""An expert of a user's own joins a bundle and is dispatched to, by Python and by the command line; the others stay.
What cannot join is refused in a line, before training."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayes_dispatch.app.bundle import Bundle, load_bundle
from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.app.training import own_expert
from bayes_dispatch.app.training.own_expert import RefitSettings, add_experts, import_reward, kept_expert, own_settings
from bayes_dispatch.errors import ConfigError, RewardError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import CONVENTIONS, Domain
from bayes_dispatch.experts.domains.own import OwnPairs, OwnText
from bayes_dispatch.experts.objectives import Likelihood
from bayes_dispatch.experts.training import ExpertSettings
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.scoring.evidence_sets import mixed_evidence, pure_evidence
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from tests.tiny import tiny_model, tiny_tokenizer

PAIRS = tuple((f"{a}*{b}=", str(a * b)) for a in range(8) for b in range(8))
SMALL = RefitSettings(pure_prompts=12, mixed_prompts=20, prompt_lengths=(16, 48))
TEXT = "".join(f"Of {number} things, none is like another.\n" for number in range(60))


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of its own, a base text that is there at once, and little evidence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_expert, "BASE_TEXTS", (OwnText("base text", TEXT),))
    monkeypatch.setattr(own_expert, "RefitSettings", lambda seed: RefitSettings(**vars(SMALL) | {"seed": seed}))
    settings = own_settings(Likelihood(), 2, 0)
    small: dict[str, Any] = {"length": 64, "batch_size": 2, "steps": 2, "stopping": settings.stopping}
    monkeypatch.setattr(
        own_expert,
        "own_settings",
        lambda objective, steps, seed: ExpertSettings(**small, objective=objective, seed=seed),
    )
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    Path("pairs.jsonl").write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in PAIRS))
    Path("prompts.txt").write_text("\n".join(p for p, _ in PAIRS))


@pytest.fixture
def saved(bundle: Bundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "old")
    return tmp_path / "old"


def expert(bundle: Bundle, name: str, seed: int = 0) -> ExpertVector:
    generator = torch.Generator().manual_seed(seed)
    scales = {n: 1 + 0.1 * torch.randn(r, generator=generator) for n, r in bundle.model.adaptable().items()}
    return ExpertVector(name, scales, bundle.model.fingerprint(), {"domain": name})


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train-expert", *map(str, arguments)])
    return (int(exit_.value.code or 0), *capfd.readouterr())


def add_expert(bundle: Bundle, new: ExpertVector, domain: Domain, said: Callable[[str], object] = str) -> Bundle:
    return add_experts(bundle, {new.name: (new, domain)}, bundle.experts.names, SMALL, announce=said)


class TestKnownEvidenceAmongOthers:
    def test_labels_and_shares_move_with_their_experts(self, bundle: Bundle) -> None:
        domains = [CONVENTIONS[1], CONVENTIONS[3], CONVENTIONS[0]]
        pure = pure_evidence(bundle.model, domains, 2, (16, 20), "train", 0).among([4, 0, 2], 5)
        assert pure.labels.tolist() == [4, 4, 0, 0, 2, 2]
        assert pure.mixtures.shape == (6, 6)
        assert np.isnan(pure.mixtures).all()
        mixed = mixed_evidence(bundle.model, domains, 5, (16, 20), "train", 0)
        moved = mixed.among([4, 0, 2], 5)
        assert (moved.labels == -1).all()
        np.testing.assert_array_equal(moved.mixtures[:, [4, 0, 2, 5]], mixed.mixtures)
        np.testing.assert_array_equal(moved.mixtures[:, [1, 3]], 0)


class TestAdding:
    def test_it_is_in_the_bundle_and_dispatched_to(self, bundle: Bundle) -> None:
        said: list[str] = []
        new = add_expert(bundle, expert(bundle, "mine"), OwnPairs("mine", PAIRS), said.append)
        assert new.experts.names == tuple(new.dispatcher.experts) == ("reverse", "sort", "add", "mine")
        assert said == []
        assert set(new.evidence) == {"mine"}
        assert len(new.evidence["mine"]) == SMALL.pure_prompts
        posterior = new.dispatcher.posterior(new.evidence["mine"], draws=8, seed=0)
        assert posterior.weights.shape[-1] == 5
        assert bundle.experts.names == ("reverse", "sort", "add")

    @pytest.mark.slow
    def test_a_second_one_is_fitted_with_the_evidence_of_the_first(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even after a save; its text is not there any more, and that is said."""
        said: list[str] = []
        first = add_expert(bundle, expert(bundle, "first"), OwnPairs("first", PAIRS))
        first.save(tmp_path / "one")
        seen: dict[str, Any] = {}
        fit = own_expert.Dispatcher.fit

        def watched(self: Any, X: Any, y: Any, mixtures: Any, progress: bool) -> Any:
            seen.update(evidence=X, labels=y, mixtures=mixtures)
            return fit(self, X, y, mixtures, progress)

        monkeypatch.setattr(own_expert.Dispatcher, "fit", watched)
        again = load_bundle(tmp_path / "one")
        second = add_expert(again, expert(again, "second"), OwnText("second", TEXT), said.append)
        assert second.experts.names == ("reverse", "sort", "add", "first", "second")
        assert set(second.evidence) == {"first", "second"}
        assert said == ["without mixed prompts of first: the bundle has evidence of single prompts, not their text"]
        counts = np.bincount(seen["labels"][seen["labels"] >= 0], minlength=5)
        assert counts.tolist() == [12] * 5
        for name, view in first.evidence["first"].views.items():
            np.testing.assert_array_equal(seen["evidence"].views[name][seen["labels"] == 3], view)
        known = seen["mixtures"][np.isfinite(seen["mixtures"]).all(1)]
        assert (known[:, 3] == 0).all()
        assert (known[:, 4] > 0).any()

    @pytest.mark.slow
    def test_one_of_the_same_name_takes_its_place(self, bundle: Bundle) -> None:
        new = add_expert(bundle, expert(bundle, "sort"), OwnPairs("sort", PAIRS))
        assert new.experts.names == bundle.experts.names
        assert not torch.equal(*(next(iter(each.experts["sort"].scales.values())) for each in (new, bundle)))
        again = add_expert(new, expert(bundle, "sort", 5), OwnPairs("sort", PAIRS[::-1]))
        assert set(again.evidence) == {"sort"}

    @pytest.mark.slow
    def test_experts_that_nothing_is_known_of(self, bundle: Bundle) -> None:
        foreign = [*bundle.experts.values(), expert(bundle, "foreign")]
        dispatcher = add_expert(bundle, foreign[-1], OwnPairs("foreign", PAIRS)).dispatcher
        odd = Bundle(bundle.model, ExpertBank(foreign), dispatcher)
        with pytest.raises(ConfigError, match=r"expected text or evidence of every expert .* got none of foreign"):
            add_expert(odd, expert(odd, "mine"), OwnPairs("mine", PAIRS))

    def test_evidence_of_no_expert_is_refused(self, bundle: Bundle) -> None:
        known = pure_evidence(bundle.model, [OwnPairs("mine", PAIRS)], 2, (16, 20), "train", 0)
        with pytest.raises(ConfigError, match=r"expected evidence of \('reverse', .* got some of mine"):
            Bundle(bundle.model, bundle.experts, bundle.dispatcher, evidence={"mine": known.evidence})


class TestCommand:
    def test_pairs_to_a_bundle_that_generates(self, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(
            capfd, "--name", "times", "--jsonl", "pairs.jsonl", "--bundle", saved, "--out", "new", "--json"
        )
        assert (code, err) == (0, "")
        told = json.loads(out)
        assert told["experts"] == ["reverse", "sort", "add", "times"]
        assert {"objective", "steps", "validation", "date", "question_weight"} <= told.keys()
        assert load_bundle("new").experts["times"].metadata["date"] == told["date"]
        with pytest.raises(SystemExit) as exit_:
            cli.main(["generate", "--bundle", "new", "--prompt", "3*4=", "--json", "--max-new-tokens", "2"])
        assert exit_.value.code == 0
        assert json.loads(capfd.readouterr().out)["experts"] == ["reverse", "sort", "add", "times", "base"]

    @pytest.mark.slow
    def test_a_text_replaces_an_earlier_bundle(self, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capfd, "--name", "things", "--text", "text.txt", "--bundle", saved, "--out", saved)
        assert (code, err) == (0, "")
        assert out.startswith(f"{saved}: experts reverse, sort, add, things\nthings by likelihood: score ")
        assert out.endswith("\nwithout a gate and calibrated intervals: calibrate-gate makes them\n")
        assert set(load_bundle(saved).evidence) == {"things"}

    def test_several_at_once(self, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """One dispatcher over them alone; the others only where they are asked for."""
        given = ["--jsonl", "times=pairs.jsonl", "--text", "things=text.txt", "--bundle", str(saved), "--steps", "2"]
        with pytest.raises(SystemExit) as exit_:
            cli.main(["train-experts", *given, "--out", "new", "--json"])
        out, err = capfd.readouterr()
        stages = "expert things, 1 of 2", "expert times, 2 of 2", "dispatcher"
        assert (exit_.value.code, err) == (0, "".join(f"bayes-dispatch: {stage}\n" for stage in stages))
        told = json.loads(out)
        assert sorted(told["experts"]) == sorted(told["trained"]) == ["things", "times"]
        assert sorted(each.name for each in Path("new.work/experts").iterdir()) == ["things", "times"]
        new = load_bundle("new")
        assert set(new.experts.names) == set(new.dispatcher.experts) == set(new.evidence) == {"things", "times"}
        with pytest.raises(SystemExit) as exit_:
            cli.main(["train-experts", *given, "--out", "more", "--keep-experts"])
        assert exit_.value.code == 0
        assert set(load_bundle("more").experts.names) == {"reverse", "sort", "add", "things", "times"}

    def test_a_run_that_was_stopped_goes_on(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        """An expert is trained anew where its text or its recipe is another, and else read."""
        trained: list[str] = []
        really = own_expert.train_own_expert

        def train(bundle: Bundle, domain: Any, *rest: Any) -> Any:
            trained.append(domain.name)
            return really(bundle, domain, *rest)

        monkeypatch.setattr(own_expert, "train_own_expert", train)
        settings = own_expert.own_settings(Likelihood(), 2, 0)
        text, other = OwnText("things", TEXT), OwnText("things", TEXT + "Of one thing more, too.\n")
        first, again = (kept_expert(bundle, text, settings, Path("new")) for _ in range(2))
        assert first.metadata == again.metadata
        assert trained == ["things"]
        for domain, recipe in ((other, settings), (text, replace(settings, seed=1))):
            kept_expert(bundle, domain, recipe, Path("new"))
        assert trained == ["things"] * 3

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                ["--text", "one=text.txt"],
                "expected at least two experts, another file or --keep-experts, got one alone",
            ),
            (["--text", "a/b=text.txt", "--jsonl", "two=pairs.jsonl"], "expected an expert name of letters,"),
            (["--text", "base=text.txt", "--keep-experts"], "expected an expert name of letters,"),
            (
                ["--text", "one=text.txt", "--jsonl", "two=long.jsonl"],
                "expected at most 63 bytes in line 1 of long.jsonl",
            ),
        ],
    )
    def test_what_would_be_refused_later_is_refused_before_training(
        self,
        given: list[str],
        message: str,
        saved: Path,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delattr(own_expert, "train_expert")
        Path("long.jsonl").write_text('{"prompt": "a", "answer": "' + "b" * 80 + '"}\n' * 20)
        with pytest.raises(SystemExit) as exit_:
            cli.main(["train-experts", *given, "--bundle", str(saved), "--out", "new"])
        assert exit_.value.code == 2
        assert capfd.readouterr().err.startswith(f"bayes-dispatch: error: {message}")

    def test_without_a_refit_it_is_a_bank(self, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
        code, _, _ = run(
            capfd, "--name", "times", "--jsonl", "pairs.jsonl", "--no-refit", "--bundle", saved, "--out", "bank"
        )
        assert code == 0
        assert ExpertBank.load("bank").names == ("reverse", "sort", "add", "times")
        code, _, err = run(capfd, "--name", "b", "--text", "text.txt", "--no-refit", "--bundle", saved, "--out", "bank")
        assert (code, "expected a new or empty directory, got bank, which holds add." in err) == (2, True)

    def test_an_expert_that_is_replaced_is_told_of(self, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
        given = ["--text", "text.txt", "--no-refit", "--bundle", saved]
        code, out, err = run(capfd, "--name", "sort", *given, "--out", "one")
        told = "the expert sort of the bundle is replaced by the one of your text"
        assert (code, err) == (0, f"bayes-dispatch: warning: {told}\n")
        assert out.endswith("(held out; log-likelihood of a token, in nats)\n")
        assert run(capfd, "--name", "other", *given, "--out", "two")[2] == ""

    @pytest.mark.parametrize(
        "words",
        [
            ["train-expert", "--name", "a", "--jsonl", "pairs.jsonl"],
            ["train-experts", "--text", "a=text.txt", "--text", "b=text.txt"],
            ["train-experts", "--text", "a=text.txt", "--text", "b=text.txt", "--bundle", "mine"],  # whose own go
            ["calibrate-gate"],
            ["fit", "--examples", "pairs.jsonl"],
            ["train", "--plan", "smoke"],
            ["build", "--model", "m", "--adapter", "a=a"],
            ["train-documents"],
        ],
        ids=" ".join,
    )
    def test_another_bundle_is_not_replaced(
        self, words: list[str], saved: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        saved.rename("mine")
        before = Path("mine/bundle.json").read_bytes()
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--out", "mine"])
        assert ended.value.code == 2
        told = "expected a new or empty directory, got mine, which holds bundle.json"
        assert capfd.readouterr().err == f"bayes-dispatch: error: {told}\n"
        assert Path("mine/bundle.json").read_bytes() == before

    def test_the_bank_of_a_bundle_is_not_replaced(self, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
        code, _, err = run(
            capfd, "--name", "a", "--jsonl", "pairs.jsonl", "--no-refit", "--bundle", saved, "--out", saved / "experts"
        )
        assert code == 2
        assert "expected a directory for experts alone, got that of a bundle" in err
        load_bundle(saved)

    @pytest.mark.parametrize("file", [["--text", "prompts.txt"], ["--jsonl", "pairs.jsonl"]], ids=" ".join)
    def test_a_reward(
        self, file: list[str], saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("judging.py").write_text("def short(prompt, answer): return 1 / (1 + len(answer)) * ('*' in prompt)\n")
        monkeypatch.syspath_prepend(".")
        monkeypatch.delitem(sys.modules, "judging", raising=False)
        options = ["--reward", "judging:short", "--answer-bytes", "3", "--no-refit", "--bundle", saved, "--out", "bank"]
        code, out, err = run(capfd, "--name", "short", *file, *options)
        assert (code, err) == (0, "")
        assert "short by reinforce: score 0." in out
        assert out.endswith("(held out; mean reward)\n")
        metadata = ExpertBank.load("bank")["short"].metadata
        assert (metadata["objective"], metadata["kl"], metadata["answer_bytes"]) == ("reinforce", "0.2", "3")

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["--text", "text.txt", "--jsonl", "pairs.jsonl"],
            ["--text", "nowhere.txt"],
            ["--text", "empty.txt"],
            ["--text", "short.txt"],
            ["--text", "odd.txt"],
            ["--jsonl", "text.txt"],
            ["--jsonl", "unanswered.jsonl"],
            ["--text", "text.txt", "--objective", "guess"],
            ["--text", "text.txt", "--kl", "1"],
            ["--text", "text.txt", "--objective", "reinforce", "--kl", "-1"],
            ["--text", "text.txt", "--steps", "0"],
            ["--text", "text.txt", "--name", "base"],
            ["--text", "text.txt", "--name", "a/b"],
            ["--text", "text.txt", "--bundle", "nowhere"],
            ["--text", "text.txt", "--out", "text.txt"],
            ["--text", "text.txt", "--out", "."],
            ["--text", "prompts.txt", "--reward", "math"],
            ["--text", "prompts.txt", "--reward", "no_such_module:f"],
            ["--text", "prompts.txt", "--reward", "math:no_such_function"],
            ["--text", "prompts.txt", "--reward", "math:pi"],
            ["--text", "prompts.txt", "--reward", "judging:nothing"],
            ["--text", "prompts.txt", "--reward", "judging:endless"],
            ["--text", "prompts.txt", "--reward", "broken:f"],
            ["--text", "prompts.txt", "--reward", "judging:endless", "--objective", "likelihood"],
        ],
        ids=" ".join,
    )
    def test_bad_input_is_one_line(
        self,
        arguments: list[str],
        saved: Path,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name, content in {
            "empty.txt": b"",
            "short.txt": b"too short",
            "odd.txt": b"\xff" * 2000,
            "unanswered.jsonl": b'{"prompt": "a"}\n' * 20,
            "judging.py": b"def nothing(prompt, answer): pass\ndef endless(prompt, answer): return float('inf')\n",
            "broken.py": b"raise OSError('no\\nmodule')\n",
        }.items():
            Path(name).write_bytes(content)
        monkeypatch.syspath_prepend(".")
        monkeypatch.delitem(sys.modules, "judging", raising=False)
        before = sorted(Path().iterdir())
        defaults = {"--name": "mine", "--bundle": str(saved), "--out": "new"}
        given = [part for option in defaults.items() if option[0] not in arguments for part in option]
        code, out, err = run(capfd, *given, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("bayes-dispatch: error: ")
        assert err.count("\n") == 1
        assert "expected" in err
        assert "got" in err
        assert sorted(path for path in Path().iterdir() if path.name != "__pycache__") == before


def test_importing_names_what_is_wrong() -> None:
    assert import_reward("os.path:join")("a", "b") == "a/b"  # a function; what it returns is checked later
    with pytest.raises(RewardError, match="expected a reward as package:function, got ':f'"):
        import_reward(":f")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


class TestOfATransformersModel:
    """``--model``: without a bundle, to an adapter of PEFT or a bank of scales."""

    @pytest.mark.filterwarnings("ignore:mine adds zeros alone")  # nothing is gained by the few steps
    def test_an_adapter(self, tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
        from peft import PeftModel

        wanted = ["--rank", "2", "--adapt-from", "3", "--dtype", "bfloat16", "--gradient-checkpointing"]
        given = ["--name", "mine", "--text", "text.txt", "--model", tiny, *wanted, "--json"]
        code, out, _ = run(capfd, *given, "--out", "mine")
        assert code == 0
        told = json.loads(out)
        assert (told["experts"], told["objective"], told["name"]) == (["mine"], "likelihood", "mine")
        assert float(told["validation"]) >= float(told["base_validation"])
        assert {file.name for file in Path("mine").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        theirs = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), "mine")
        factors = {name: each for name, each in theirs.named_parameters() if "lora_A" in name}
        assert {len(each) for each in factors.values()} == {2}
        assert {name.split("layers.")[1][0] for name in factors} == {"3"}
        bank = ExpertBank.from_peft(TransformersBackbone.load(tiny, dtype="bfloat16"), {"mine": "mine"})
        assert len(bank.adapts) == len(factors) == 7
        before = Path("mine/adapter_model.safetensors").read_bytes()
        code, _, err = run(capfd, *given, "--out", "mine")
        assert (code, "got mine, which holds adapter_config.json" in err) == (
            2,
            True,
        )
        assert Path("mine/adapter_model.safetensors").read_bytes() == before

    def test_scales(self, tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(
            capfd, "--name", "mine", "--text", "text.txt", "--model", tiny, "--kind", "svf", "--out", "bank"
        )
        assert code == 0
        assert out.startswith("bank: experts mine\nmine by likelihood: score -")
        bank = ExpertBank.load("bank")
        backbone = TransformersBackbone.load(tiny)
        bank.check_base(backbone)
        assert bank.matrices == backbone.adaptable()

    @pytest.mark.usefixtures("tiny")
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["--kind", "lora"], "expected --kind with --model, got it without"),
            (["--rank", "4"], "expected --rank with --model, got it without"),
            (["--adapt-from", "0"], "expected --adapt-from with --model, got it without"),
            (["--device", "cpu"], "expected --device with --model, got it without"),
            (["--dtype", "auto"], "expected --dtype with --model, got it without"),
            (["--gradient-checkpointing"], "expected --gradient-checkpointing with --model, got it without"),
            (["--model", "tiny", "--bundle", "old"], "expected --bundle without --model, got both"),
            (["--model", "tiny", "--refit"], "expected --refit without --model, got both"),
            (["--model", "tiny", "--no-refit"], "expected --no-refit without --model, which has no dispatcher"),
            (["--model", "tiny", "--kind", "dora"], "expected a kind of lora or svf, got 'dora'"),
            (["--model", "tiny", "--kind", "lora", "--name", "base"], "expected "),
            (["--model", "tiny", "--dtype", "int3"], "expected a dtype of "),
            (["--model", "tiny", "--device", "abacus"], "expected a device of this machine, got abacus"),
            (["--model", "tiny", "--adapt-from", "4"], "expected a matrix from block 4 on to adapt, got none"),
            (["--model", "pairs.jsonl"], "expected a causal language model in pairs.jsonl"),
            (["--model", "."], "expected a model's directory with a config.json, got ."),
            (
                ["--model", "tiny", "--objective", "reinforce", "--gradient-checkpointing"],
                "expected checkpointing with the objective likelihood alone, got reinforce",
            ),
        ],
    )
    def test_bad_input_is_one_line(self, arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
        before = sorted(Path().iterdir())
        code, out, err = run(capfd, "--name", "mine", "--text", "text.txt", "--out", "new", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"bayes-dispatch: error: {told}")
        assert sorted(Path().iterdir()) == before
