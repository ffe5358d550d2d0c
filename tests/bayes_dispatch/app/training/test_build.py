"""A bundle of a tiny transformers model, adapters and examples: it routes held-out prompts, writes, and is read again.

Bad input is one line, and nothing is left half-written.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayes_dispatch as bd
from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.commands.build import _tell
from bayes_dispatch.app.commands.main import main
from bayes_dispatch.app.training.build import BuildSettings, build_bundle, kept_at, known_by
from bayes_dispatch.app.training.own_expert import RefitSettings
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.errors import BayesDispatchError, ConfigError, ForeignExpertError
from bayes_dispatch.experts.domains import Domain, TextDomain
from bayes_dispatch.experts.domains.own import OwnExamples, OwnPairs, OwnPrompts, OwnText
from bayes_dispatch.experts.domains.own_files import read_examples
from bayes_dispatch.inference.two_pass.likelihood import ExpertLogLikelihoods
from bayes_dispatch.inference.two_pass.prompts import clipped
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from tests.tiny import tiny_adapter, tiny_model, tiny_tokenizer

SMALL = BuildSettings(
    prompt_lengths=(12, 60),
    pure_prompts=16,
    mixed_prompts=12,
    gate_prompts=40,
    svi=SVISettings(steps=60, rounds=1, conditional_steps=20),
)


def texts_of(letters: str, seed: int, count: int = 12) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list(letters), rng.integers(2, 6))) for _ in range(30)]
    return [" ".join(rng.choice(words, 14)) + "\n" for _ in range(count)]


EXAMPLES = {"low": texts_of("abcdefg", 0), "high": texts_of("QRSTUVW", 1)}
MANY = {  # 28 of each expert are held out, and 2 of base
    "low": texts_of("abcdefg", 0, 140),
    "high": texts_of("QRSTUVW", 1, 140),
    "base": texts_of("0123456789", 2),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(dtype=torch.float32).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(EXAMPLES):
        tiny_adapter(root / name, seed=seed)
    return {name: root / name for name in EXAMPLES}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command; what it printed, or its error in one line."""

    def told(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        return out if not ended.value.code else err.splitlines()[-1]

    return told


@pytest.mark.usefixtures("unchecked")
def test_from_the_command_line_to_text(
    model: Path, adapters: dict[str, Path], tmp_path: Path, run: Callable[..., str]
) -> None:
    given = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    out = tmp_path / "bundle"
    told = run("build", "--model", str(model), *given, "--out", str(out), "--json")
    assert json.loads(told)["experts"] == ["low", "high"]
    flat = load_bundle(out)
    assert flat.dispatcher.views == ()
    generator = bd.TwoPassGenerator(flat)
    cached = generator.generate(["abc def", "QRS"], max_new_tokens=4, seed=0, blend="posterior_predictive(5)")
    slow = generator.generate(
        ["abc def", "QRS"], max_new_tokens=4, seed=0, blend="posterior_predictive(5)", use_cache=False
    )
    np.testing.assert_array_equal(cached.token_ids, slow.token_ids)
    again = load_bundle(out, model=flat.model)
    np.testing.assert_array_equal(
        bd.TwoPassGenerator(again).generate(["abc"], max_new_tokens=3, seed=1).token_ids,
        generator.generate(["abc"], max_new_tokens=3, seed=1).token_ids,
    )
    cast = load_bundle(out, dtype="bfloat16")
    assert cast.model.dtype == torch.bfloat16
    cast.save(tmp_path / "cast")
    assert load_bundle(tmp_path / "cast").model.dtype == torch.float32  # that of the bundle, not of one load of it
    low = flat.model.cast(torch.bfloat16)  # type: ignore[attr-defined]
    bd.Bundle(low, flat.experts, flat.dispatcher).save(tmp_path / "low")
    assert load_bundle(tmp_path / "low").model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="expected a bundle of a transformers model for cuda:7"):
        load_bundle(device="cuda:7")


@pytest.mark.usefixtures("unchecked")
def test_a_dispatcher_of_examples(
    model: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backbone = TransformersBackbone.load(model)
    bank = bd.ExpertBank.from_peft(backbone, adapters)
    told: list[str] = []
    given: dict[str, Any] = {"settings": SMALL, "unlabelled": ["nobody knows"], "out": tmp_path / "b"}
    bundle = build_bundle(backbone, bank, MANY, **given, announce=told.append)
    assert told == ["evidence", "dispatcher", "held-out examples"]
    assert bundle.report["calibration"]["accuracy"] > 0.9
    assert bundle.report["calibration"]["prompts"] == 56
    assert bundle.gate is not None
    assert (len(bundle.gate.scores), bundle.gate.least_rate) == (42 + 21, 1 / 22)  # a text is in one of a kind
    _tell(bundle, tmp_path / "b", "a model", as_json=False)
    assert "the gate on 63 of them, for false-alarm rates of 0.0455 and above\n" in capsys.readouterr().out
    assert set(bundle.report["gains"]) == set(EXAMPLES)
    assert load_bundle(tmp_path / "b").dispatcher.predict_set(
        bd.first_pass(backbone, backbone.tokenizer, [EXAMPLES["high"][3]]).evidence, 0.95
    )[0, 1]
    found = bd.TwoPassGenerator(load_bundle(tmp_path / "b")).generate(
        [EXAMPLES["high"][3], EXAMPLES["low"][2]], blend="posterior_mean", max_new_tokens=2, seed=0
    )
    assert [found.posterior.experts[k] for k in found.posterior.mean.argmax(1)] == ["high", "low"]
    assert bundle.report["base"] == {"prompts": 2, "accuracy": 1.0}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")  # another day than it was begun
    bank = bd.ExpertBank.from_peft(backbone, adapters)
    again = build_bundle(backbone, bank, MANY, **given)  # from the stages that are kept
    assert len(list((tmp_path / "b.work").iterdir())) == 1
    assert again.report == bundle.report
    np.testing.assert_array_equal(
        again.dispatcher.predict_proba(bd.first_pass(backbone, backbone.tokenizer, ["abc"]).evidence),
        bundle.dispatcher.predict_proba(bd.first_pass(backbone, backbone.tokenizer, ["abc"]).evidence),
    )
    other = TransformersBackbone(tiny_model(dtype=torch.float32, seed=5), tiny_tokenizer())
    with pytest.raises(ForeignExpertError):
        load_bundle(tmp_path / "b", model=other)
    with pytest.raises(ConfigError, match="to refer to, got one without"):
        bd.Bundle(other, bd.ExpertBank.from_peft(other, adapters), bd.Dispatcher.flat(bank.names)).save(
            tmp_path / "nameless"
        )
    assert not (tmp_path / "nameless").exists()


@pytest.mark.usefixtures("unchecked")
def test_a_model_that_has_moved_is_told_of(
    model: Path, adapters: dict[str, Path], tmp_path: Path, run: Callable[..., str]
) -> None:
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "bundle"
    shutil.copytree(model, here)
    given = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    told = run("build", "--model", str(here), *given, "--out", str(out))
    assert "a flat dispatcher, no calibrated intervals, and no gate" in told
    here.rename(there)
    with pytest.raises(ConfigError, match=f"^expected the base model of {out} where it was, in {here}, got no such"):
        load_bundle(out)
    assert load_bundle(out, model=TransformersBackbone.load(there)).experts.names == ("low", "high")


@pytest.mark.usefixtures("unchecked")
def test_a_few_examples_longer_than_the_model_reads(
    model: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each that is held out is one prompt, and is scored once: too few for a gate. Those of base are judged, too."""
    backbone = TransformersBackbone.load(model)
    bank = bd.ExpertBank.from_peft(backbone, adapters)
    letters = {"low": "abcdefg", "high": "QRSTUVW", "base": "0123456789"}
    examples = {name: ["".join(texts_of(own, n, 20)) for n in range(10)] for name, own in letters.items()}
    short = replace(SMALL, prompt_lengths=(600, 900), pure_prompts=8, mixed_prompts=8, gate_prompts=24)
    told: list[str] = []
    bundle = build_bundle(backbone, bank, examples, unlabelled=["hij " * 200], settings=short, announce=told.append)
    assert told[-1] == (
        "no gate and no calibration: they take 80 held-out prompts, 25 of them of several experts, "
        "and the examples give 6, 2 of them; some 13.3 times as much text may do"
    )
    assert bundle.gate is None
    assert bundle.report["calibration"]["prompts"] == 4
    assert bundle.report["base"]["prompts"] == 2
    held = OwnExamples("low", tuple(examples["low"])).of("held_out")
    read = [clipped(backbone.tokenizer, text[:900], backbone.longest) for text in held]
    low, base = -ExpertLogLikelihoods(backbone, bank.without("high"), backbone.tokenizer)(read).mean(0)
    assert bundle.report["gains"]["low"]["gain"] == pytest.approx(base - low, abs=1e-5)
    _tell(bundle, Path("out"), "model", as_json=False)
    out = capsys.readouterr().out
    assert "of 4 held-out prompts, each of another example, " in out
    assert "of 2 held-out prompts of base " in out


@pytest.mark.usefixtures("unchecked")
def test_scales_and_adapters_are_one_bank(
    model: Path, adapters: dict[str, Path], tmp_path: Path, run: Callable[..., str]
) -> None:
    (tmp_path / "text.txt").write_text("".join(texts_of("hijklmn", 5, 40)))
    train = ["train-expert", "--model", str(model), "--kind", "svf", "--steps", "1", "--rank", "3", "--adapt-from", "2"]
    run(*train, "--name", "middle", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "middle"))
    build = ["build", "--model", str(model), "--experts", str(tmp_path / "middle"), "--out"]
    told = json.loads(run(*build, str(tmp_path / "bundle"), "--adapter", f"low={adapters['low']}", "--json"))
    assert told["experts"] == ["middle", "low"]
    bundle = load_bundle(tmp_path / "bundle")
    assert told["cut"] == bundle.cut == bundle.experts.adapt_from
    twice = run(*build, str(tmp_path / "new"), "--adapter", f"middle={adapters['low']}")
    assert "expected experts of different names" in twice
    other = ["build", "--model", str(model), "--out", str(tmp_path / "none")]
    assert "expected at least one --adapter" in run(*other)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"low": ["a", "b"]}, "expected examples of every expert, got none of high"),
        ({**EXAMPLES, "odd": ["a", "b"]}, "expected examples of low, high, base, got some of odd"),
        ({**EXAMPLES, "low": "one text"}, "expected examples of low to be a list, got 'one text'"),
        ({**EXAMPLES, "low": ["same", "same"]}, "expected at least two different examples of low"),
    ],
)
def test_bad_examples(model: Path, adapters: dict[str, Path], examples: dict[str, list[str]], message: str) -> None:
    backbone = TransformersBackbone.load(model)
    with pytest.raises(BayesDispatchError, match=message):
        build_bundle(backbone, bd.ExpertBank.from_peft(backbone, adapters), examples, settings=SMALL)


def test_lines_of_examples(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"expert": "a", "text": "x"}\n\n{"text": "y"}\n{"expert": "a", "text": "z\u2028z"}\n')
    assert read_examples(path) == [(1, "a", "x"), (3, None, "y"), (4, "a", "z\u2028z")]
    for line in (
        "{",
        "[1]",
        '{"expert": 3, "text": "x"}',
        '{"expert": "a"}',
        '{"Expert": "a", "text": "x"}',
        '{"expert": "a", "text": " "}',
        '{"text": "\\ud800"}',
    ):
        path.write_text(line)
        with pytest.raises(ConfigError, match="in line 1 of"):
            read_examples(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="expected UTF-8 text"):
        read_examples(path)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("lengths", [5, (5,), ("a", "b"), (4.5, 9), (3, 9), (9, 8), "ab"])
def test_bad_lengths(lengths: Any) -> None:
    for settings in (BuildSettings, RefitSettings):
        with pytest.raises(ConfigError, match=r"^expected (each of )?prompt_lengths [^\n]*, got [^\n]+$"):
            settings(prompt_lengths=lengths)


@pytest.mark.usefixtures("unchecked")
def test_bad_words(model: Path, adapters: dict[str, Path], tmp_path: Path, run: Callable[..., str]) -> None:
    out, low = str(tmp_path / "out"), f"low={adapters['low']}"
    two = ["--adapter", low, "--adapter", f"high={adapters['high']}"]
    (tmp_path / "empty").mkdir()
    lines, none = tmp_path / "lines.jsonl", str(tmp_path / "nowhere")  # wrong names are told before a model is sought
    lines.write_text('{"expert": "low", "text": "a"}\n{"expert": "Low", "text": "a"}\n')
    for words, message in (
        (["--model", str(tmp_path / "empty"), *two], "expected a model's directory with a config.json"),
        (["--model", str(model), "--adapter", low, "--adapter", low], "expected one --adapter of each name, got two"),
        (["--model", str(model), "--adapter", "low"], "expected --adapter NAME=DIRECTORY, got 'low'"),
        (["--model", str(model), "--adapter", low, "--prompts", "9"], "expected --prompts with --examples or --text"),
        (["--model", str(model), *two, "--dtype", "int8"], "expected a dtype of auto, float32"),
        (["--model", str(model), *two, "--device", "cuda"], "expected a device of this machine, got cuda"),
        (["--model", str(model), *two[2:], "--adapter", f"low={tmp_path / 'empty'}"], "expected a LoRA adapter"),
        (
            ["--model", none, "--adapter", low, "--examples", str(lines)],
            f"of low, base in line 2 of {lines}, got one of",
        ),
        (["--model", none, "--adapter", low, "--text", f"Low={lines}"], "experts low, base, got some of Low"),
        (["--model", none, "--adapter", low], "expected two experts or more, got low alone"),
    ):
        if "cuda" in words and torch.cuda.is_available():
            continue
        assert message in run("build", *words, "--out", out)
        assert not Path(out).exists()


def pairs(changed: int) -> tuple[tuple[str, str], ...]:
    return tuple((f"question {n + 10_000 * (n == changed)}", f"answer {n}") for n in range(3_000))


def one_text(changed: int) -> str:
    return "".join(f"{question} {answer}\n" for question, answer in pairs(changed))


@pytest.mark.parametrize(
    "domain",
    [
        lambda changed: OwnText("mine", one_text(changed)),
        lambda changed: OwnPairs("mine", pairs(changed)),
        lambda changed: OwnPrompts("mine", tuple(question for question, _ in pairs(changed))),
        lambda changed: TextDomain("mine", lambda split: [one_text(changed if split == "held_out" else -1)]),
    ],
)
def test_a_domain_with_an_end_is_known_by_all_of_it(domain: Callable[[int], Domain]) -> None:
    """One item of three thousand is enough for stages of their own."""
    first, again, *others = (
        kept_at(Path("out"), {"texts": known_by(domain(changed))}) for changed in (0, 0, 7, 1_500, 2_700, 2_999)
    )
    assert first == again
    assert len({first, *others}) == 5
