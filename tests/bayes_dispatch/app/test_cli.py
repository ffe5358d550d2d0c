"""The command line prints what it was asked for, to any terminal, and loads little for help. Bad input, options that
would do nothing, and warnings are one line; bad input ends with code 2."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.core import TyperOption
from typer.main import get_command

import bayes_dispatch
from bayes_dispatch.app.bundle import SHIPPED, Bundle, load_bundle
from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.app.commands import terminal
from bayes_dispatch.app.tables import report_markdown, report_tables
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.errors import BundleError
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from tests.bayes_dispatch.app.conftest import run

DRAWS = "--draws with the blend posterior_predictive or refined_mean"
SHOWN = "--show-experts without --json, which always has them, got both"
HEAVY = {"numpy", "torch", "pyro", "arviz", "matplotlib", "sklearn", "pandas"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in a directory of its own, so that stray files are seen."""
    monkeypatch.chdir(tmp_path)


def shell(*arguments: str | bytes | Path, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own."""
    return subprocess.run([sys.executable, "-m", "bayes_dispatch", *arguments], capture_output=True, **settings)


def assert_one_line(code: int, out: str, err: str) -> None:
    assert code == 2
    assert out == ""
    assert err.startswith("bayes-dispatch: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "expected" in err
    assert "got" in err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom bayes_dispatch.app.commands import main as cli\n"
        "for command in ('generate', 'chat'):\n"
        "    try:\n        cli.main([command, '--help'])\n    except SystemExit:\n        pass\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--show-experts" in done.stdout
    assert "--state" in done.stdout
    assert HEAVY & set(done.stderr.split()) == set()


def test_no_arguments_show_help(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd)
    assert (code, err) == (0, "")
    assert all(command in out for command in ("demo", "train", "report", "generate", "experts", "fit"))


def test_help_ends_lines_where_a_terminal_does(capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = run(capfd, "calibrate-gate", "--help")[1]
    assert re.search(r"No line of a file .* so the guarantees hold\. A short file", told)


def test_generate_as_json(saved: Path, bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    """The document says the same as Python does, and the same seed says it again."""
    from bayes_dispatch.inference.generator import TwoPassGenerator
    from bayes_dispatch.inference.two_pass.blends import PosteriorPredictive

    arguments = ["generate", "--bundle", saved, "--prompt", "kfpa>", "--prompt", r"ab>ba\ncd>", "--escapes", "--json"]
    arguments += ["--blending-mode", "predictive", "--draws", "6", "--max-new-tokens", "5", "--seed", "3"]
    code, out, err = run(capfd, *arguments)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["prompts"] == ["kfpa>", "ab>ba\ncd>"]
    expected = TwoPassGenerator(bundle).generate(
        document["prompts"], blend=PosteriorPredictive(6), max_new_tokens=5, seed=3
    )
    assert document["texts"] == list(expected.texts)
    assert document["experts"] == ["reverse", "sort", "add", "base"]
    for name in ("weights", "log_probabilities", "predictive_entropy", "mutual_information", "rows"):
        np.testing.assert_allclose(document[name], getattr(expected, name), atol=1e-6)
    np.testing.assert_allclose(document["posterior"]["mean"], expected.posterior.mean)
    lower, upper = np.moveaxis(np.array(document["posterior"]["interval_90"]), -1, 0)
    np.testing.assert_allclose([lower, upper], expected.posterior.interval(0.9))
    assert run(capfd, *arguments) == (0, out, "")


def test_json_has_all_that_was_asked(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--bundle", saved, "--prompt", "kfpa>", "--json", "--escapes", "--stop", r"\n"]
    found = json.loads(run(capfd, *arguments, "--blending-mode", "top_k", "--top-k", "1", "--max-new-tokens", "2")[1])
    asked = {"seed": 0, "max_new_tokens": 2, "stop": "\n", "sample": False, "temperature": 1.0, "abstain": False}
    assert found.items() >= (asked | {"false_alarm_rate": None, "blend_settings": {"k": 1}}).items()


@pytest.mark.parametrize("name", ["base", "sort", "max"])
def test_the_shell_takes_the_blends_that_python_takes(
    saved: Path, bundle: Bundle, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """An expert, base, and former names among them."""
    from bayes_dispatch.inference.generator import TwoPassGenerator

    arguments = ["generate", "--bundle", saved, "--prompt", "kfpa>", "--max-new-tokens", "2", "--json"]
    code, out, err = run(capfd, *arguments, "--blend", name)
    assert (code, err) == (0, "")
    expected = TwoPassGenerator(bundle).generate(["kfpa>"], blend=name, max_new_tokens=2, seed=0)
    found = json.loads(out)
    assert (found["blend"], found["texts"]) == (expected.blend, list(expected.texts))
    np.testing.assert_allclose(found["weights"], expected.weights, atol=1e-6)


def test_names_of_blends_stay_as_they_were_typed() -> None:
    """What they mean is for ``as_blend`` to say, which knows the experts."""
    names = ["max", "top_k", "predictive", "refined_mean(4)", "sort"]
    assert terminal.with_options(names, None, None) == names
    assert terminal.with_options(names, 3, 8) == ["max", "top_k(3)", "predictive(8)", "refined_mean(4)", "sort"]


def test_sampling_depends_on_the_seed(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--bundle", saved, "--prompt", "kfpa>", "--json", "--sample", "--temperature", "2"]
    first, again, other = (json.loads(run(capfd, *arguments, "--seed", seed)[1]) for seed in ("0", "0", "1"))
    assert first["texts"] == again["texts"] != other["texts"]


def test_backslashes_stay_without_escapes(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--bundle", saved, "--prompt", r"a\nb\\n", "--json", "--max-new-tokens", "1"]
    assert json.loads(run(capfd, *arguments)[1])["prompts"] == [r"a\nb\\n"]
    assert json.loads(run(capfd, *arguments, "--escapes")[1])["prompts"] == ["a\nb\\n"]


def test_show_experts(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--bundle", saved, "--prompt", "kfpa>"]
    code, out, _ = run(capfd, *arguments, "--show-experts")
    assert code == 0
    assert all(word in out for word in ("kfpa>", "reverse", "sort", "add", "base", "90% interval", "P(best)"))
    mean = np.mean(json.loads(run(capfd, *arguments, "--json")[1])["log_probabilities"][0])
    assert f"Means over the new tokens, in nats: log-probability {mean:.3f}," in " ".join(out.split())


def test_several_prompts_are_told_apart(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--bundle", saved, "--max-new-tokens", "1", "--prompt", "kfpa>"]
    assert "of" not in run(capfd, *arguments)[1]
    lines = run(capfd, *arguments, "--prompt", "ab>")[1].splitlines()
    assert [line for line in lines if " of " in line] == ["── 1 of 2 ──", "── 2 of 2 ──"]


def test_doubt_is_not_told_of_one_row(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """There it is 0 whatever is known of the weights."""
    arguments = ["generate", "--bundle", saved, "--max-new-tokens", "2", "--prompt", "kfpa>", "--show-experts"]
    for blend, one in (
        ("posterior_predictive", False),
        ("posterior_mean", True),
        ("refined_mean", True),
        ("sort", True),
    ):
        said = " ".join(run(capfd, *arguments, "--blend", blend)[1].split())
        assert ("mutual information – (one row ran)" in said) == one


def test_a_flat_dispatcher_is_told_of(bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its posterior is the prior, which looks like one that found nothing."""
    replace(bundle, dispatcher=Dispatcher.flat(bundle.experts.names)).save(tmp_path / "flat")
    arguments = ["--prompt", "kfpa>", "--max-new-tokens", "1", "--show-experts"]
    said = " ".join(run(capfd, "generate", "--bundle", tmp_path / "flat", *arguments)[1].split())
    assert "This bundle's dispatcher was not fitted" in said


@pytest.mark.usefixtures("unchecked")
def test_blocks_that_are_shared_are_told_where_there_are_any(
    bundle64: Bundle, cut64: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    from bayes_dispatch.app.commands.build import _tell

    _tell(bundle64, Path("new"), "mine", False)
    _tell(cut64, Path("new"), "mine", False)
    wrote = "wrote new: experts reverse, sort, add of mine"
    assert capfd.readouterr().out == f"{wrote}\n{wrote}; its first 1 blocks run once for all of them\n"


def test_control_characters_are_shown_not_sent(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("prompt").write_bytes(b"a\x1b[2Jb\r")
    _, out, _ = run(capfd, "generate", "--bundle", saved, "--prompt-file", "prompt")
    assert "a\\x1b[2Jb\\r" in out
    assert "\x1b" not in out


def test_prompt_from_file_and_stdin(
    saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompt").write_text("grün\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"kfpa>")))
    arguments = ("generate", "--bundle", saved, "--prompt-file", "prompt", "--prompt-file", "-", "--json")
    assert json.loads(run(capfd, *arguments)[1])["prompts"] == ["grün\n", "kfpa>"]


def test_fit_gives_a_bundle_that_generates(saved: Path, bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    """Its dispatcher is that of the file's evidence and labels; and no progress bar goes to what is no terminal."""
    from bayes_dispatch.inference.two_pass.first_pass import first_pass

    texts, labels = [["ab>ba\n", "1+2=3\n", "x y z\n"][n % 3] * (1 + n % 4) for n in range(30)], np.arange(30) % 3
    evidence = first_pass(bundle.model, bundle.tokenizer, texts).evidence
    np.savez("evidence.npz", labels=labels, lengths=evidence.lengths, **evidence.views)
    code, out, err = run(capfd, "fit", "--evidence", "evidence.npz", "--bundle", saved, "--out", "new", "--seed", "5")
    assert (code, err) == (0, "")
    assert out.endswith("fitted on 30 prompts\nwithout a gate and calibrated intervals: calibrate-gate makes them\n")
    old = bundle.dispatcher
    expected = Dispatcher(old.experts, 5, old.svi, old.features, old.program).fit(evidence, labels)
    np.testing.assert_allclose(load_bundle("new").dispatcher.predict_proba(evidence), expected.predict_proba(evidence))
    assert run(capfd, "generate", "--bundle", "new", "--prompt", "ab>", "--max-new-tokens", "2")[0] == 0


def test_fit_reads_prompts(
    saved: Path, bundle: Bundle, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of experts, of base, of nobody knows whom, and mixed ones: as with a file of evidence, labels and mixtures.

    A model of 16 tokens, of which one begins the text, reads 15 bytes of each.
    """
    from bayes_dispatch.inference.scoring.evidence_sets import prompts_of_several
    from bayes_dispatch.inference.two_pass.first_pass import first_pass

    monkeypatch.setattr(MambaFormerForCausalLM, "longest", 16)
    names = [*bundle.experts.names, "base", None]
    lines = [
        {"expert": names[n % 5], "text": ["ab>ba\n", "1+2=3\n", "x y\n", "Hi.", "?"][n % 5] * (1 + n % 4)}
        for n in range(40)
    ]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    texts = [str(line["text"]) for line in lines]
    mixed, shares = prompts_of_several(bundle.model, [texts[expert::5] for expert in range(3)], 40, 5)
    evidence = first_pass(bundle.model, bundle.tokenizer, [text[:15] for text in texts] + mixed).evidence
    labels = np.append(np.tile([0, 1, 2, -1, -1], 8), np.full(len(mixed), -1))
    mixtures = np.full((40, 4), np.nan)
    mixtures[3::5] = [0, 0, 0, 1]
    mixtures = np.concatenate([mixtures, shares])
    np.savez("evidence.npz", labels=labels, mixtures=mixtures, lengths=evidence.lengths, **evidence.views)
    for given, out in (("--examples", "one"), ("--evidence", "other")):
        file = "prompts.jsonl" if given == "--examples" else "evidence.npz"
        code, told, err = run(capfd, "fit", given, file, "--bundle", saved, "--out", out, "--seed", "5")
        assert (code, err) == (0, "")
        assert (f"fitted on 40 prompts, and {len(mixed)} that mix them\n" in told) == (out == "one")
    one, other = (load_bundle(out).dispatcher.predict_proba(evidence) for out in ("one", "other"))
    np.testing.assert_array_equal(one, other)
    good = json.dumps(lines[0]) + "\n\n"
    for wrong in ({"expert": "dance", "text": "a"}, {"expert": "add", "text": ""}):
        Path("prompts.jsonl").write_text(good + json.dumps(wrong) + "\n" + good, encoding="utf-8")
        told = run(capfd, "fit", "--examples", "prompts.jsonl", "--bundle", saved, "--out", "third")
        assert_one_line(*told)
        assert "in line 3 of prompts.jsonl" in told[2]


def test_fit_refuses_prompts_of_some_experts(saved: Path, bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of the others would go to these. A mixed prompt is of those that have a share in it."""
    from bayes_dispatch.inference.two_pass.first_pass import first_pass

    lines = [{"expert": name, "text": "ab>ba\n"} for name in ("reverse", "reverse", "sort", "base", None)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    evidence = first_pass(bundle.model, bundle.tokenizer, ["ab>ba\n"] * 3).evidence
    mixtures = np.array([[0.5, 0.5, 0, 0], [np.nan] * 4, [np.nan] * 4])
    np.savez("evidence.npz", labels=[-1, 0, -1], mixtures=mixtures, lengths=evidence.lengths, **evidence.views)
    np.savez("unlabelled.npz", lengths=evidence.lengths, **evidence.views)
    for given, file, counts in (
        ("--examples", "prompts.jsonl", "2 of reverse, 1 of sort, 0 of add"),
        ("--evidence", "evidence.npz", "2 of reverse, 1 of sort, 0 of add"),
        ("--evidence", "unlabelled.npz", "0 of reverse, 0 of sort, 0 of add"),
    ):
        told = run(capfd, "fit", given, file, "--bundle", saved, "--out", "new")
        assert_one_line(*told)
        assert f"expected prompts of every expert, got {counts}" in told[2]
        assert not Path("new").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["generate", "--prompt", "a", "--top-k", "2"],
            "--top-k with the blend top_k, got it with posterior_predictive",
        ),
        (["generate", "--prompt", "a", "--blend", "top_k", "--draws", "4"], f"{DRAWS}, got it with top_k"),
        (["generate", "--prompt", "a", "--temperature", "2"], "--temperature with --sample, got it without"),
        (["generate", "--prompt", "a", "--abstain"], "--abstain with --false-alarm-rate, got it without"),
        (["generate", "--prompt-file", __file__, "--escapes"], "--escapes with --prompt or --stop, got it without"),
        (["generate", "--prompt", "a", "--json", "--show-experts"], SHOWN),
        (["chat", "--temperature", "2"], "--temperature with --sample, got it without"),
        (["chat", "--json", "--show-experts"], SHOWN),
        (["chat", "--blend", "max", "--draws", "2"], f"{DRAWS}, got it with max"),
        (
            ["compare", "--blend", "max", "--blend", "thompson", "--top-k", "2"],
            "--top-k with the blend top_k, got it with max, thompson",
        ),
        (
            ["train-expert", "--name", "a", "--text", __file__, "--out", "new", "--kl", "1"],
            "--kl with the objective reinforce, got it without",
        ),
        (["report", "--json", "--markdown"], "--markdown without --json, got both"),
        (
            ["fit", "--evidence", "a.npz", "--out", "new", "--ray"],
            "--ray with --examples, got it without",
        ),
    ],
    ids=" ".join,
)
def test_options_that_would_do_nothing(arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, *arguments)
    assert_one_line(code, out, err)
    assert err == f"bayes-dispatch: error: expected {told}\n"


@pytest.mark.parametrize("words", ["nosuch", "generate --draws 0", "experts show --nosuch add"])
def test_wrong_arguments_are_answered_by_the_help_of_their_command(
    words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capfd, *words.split())
    assert_one_line(code, out, err)
    command = " ".join(["bayes-dispatch", *words.partition("-")[0].replace("nosuch", "").split()])
    assert f"expected arguments as `{command} --help` tells, got: " in err


def test_foreign_prompts_are_told_by_the_numbers_of_their_headings(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--false-alarm-rate", "0.05", "--max-new-tokens", "1", "--abstain"]
    ours, foreign = ["--prompt", "37+58=95\n46+27=73\n64+85="], ["--prompt", "Dear all, 00 7f 45 4c 46"]
    assert run(capfd, *arguments, *foreign)[2].startswith("the prompt is foreign to all experts (p = ")
    code, out, err = run(capfd, *arguments, *ours, *foreign)
    assert (code, err.startswith("prompt 2 of 2 is foreign to all experts (p = ")) == (0, True)
    assert "── 2 of 2 ──\nDear all," in out


def test_version(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the code that runs, whatever is installed."""
    monkeypatch.setattr(bayes_dispatch, "__version__", "1.2.3")
    assert run(capfd, "--version") == (0, "bayes-dispatch 1.2.3\n", "")


def test_report_of_the_shipped_bundle(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "report", "--json")
    assert (code, err) == (0, "")
    report, gate = json.loads(out), Gate.load(SHIPPED / "gate")
    told = report.pop("gate")
    assert told == {"ranks": len(gate.scores), "bins": len(gate.edges), "least_rate": gate.least_rate}
    assert report == json.loads((SHIPPED / "bundle.json").read_text())["report"]
    _, out, _ = run(capfd, "report")
    for table in report_tables(report, gate):
        assert table.title.split(":")[0] in out
        assert all(str(row[0]) in out for row in table.rows)
    assert re.search(
        rf"\nGate for foreign prompts\n.* {len(gate.scores)} .*{gate.least_rate_shown} *\n", out, re.DOTALL
    )
    assert run(capfd, "report", "--markdown") == (0, report_markdown(report, gate) + "\n", "")


@pytest.mark.parametrize("report", [{"experts": 3}, {"experts": {"add": {}}}, {"dispatch": {}}])
def test_report_of_another_kind(report: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"expected .* got"):
        report_tables(report)


BAD_INPUT = {
    "missing bundle": ["--prompt", "a", "--bundle", "nowhere"],
    "bundle is a file": ["--prompt", "a", "--bundle", __file__],
    "no prompt": [],
    "empty prompt": ["--prompt", ""],
    "long prompt": ["--prompt", "a" * 40_000],
    "second prompt empty": ["--prompt", "a", "--prompt", ""],
    "missing prompt file": ["--prompt-file", "nowhere"],
    "prompt file is a directory": ["--prompt-file", "."],
    "odd file name": ["--prompt-file", "a\nb\x1b"],
    "unknown blend": ["--prompt", "a", "--blending-mode", "mean"],
    "odd blend": ["--prompt", "a", "--blending-mode", "a\nb"],
    "top-k 0": ["--prompt", "a", "--blending-mode", "top_k", "--top-k", "0"],
    "top-k of another blend": ["--prompt", "a", "--top-k", "-1"],
    "top-k too large": ["--prompt", "a", "--blending-mode", "top_k", "--top-k", "9"],
    "no draws": ["--prompt", "a", "--blending-mode", "predictive", "--draws", "0"],
    "too many draws": ["--prompt", "a", "--blending-mode", "predictive", "--draws", "1000"],
    "NaN temperature": ["--prompt", "a", "--sample", "--temperature", "nan"],
    "temperature 0": ["--prompt", "a", "--sample", "--temperature", "0"],
    "no new tokens": ["--prompt", "a", "--max-new-tokens", "0"],
    "no number": ["--prompt", "a", "--max-new-tokens", "ten"],
    "negative seed": ["--prompt", "a", "--seed", "-1"],
    "unknown option": ["--prompt", "a", "--colour", "red"],
    "option without value": ["--prompt"],
}


@pytest.mark.parametrize("arguments", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_generate_input_is_one_line(arguments: list[str], saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if "--bundle" not in arguments:
        arguments = ["--bundle", str(saved), *arguments]
    assert_one_line(*run(capfd, "generate", *arguments))
    assert os.listdir() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["report", "--bundle", "nowhere"],
        ["demo", "--bundle", "nowhere"],
        ["demo", "--out", __file__],
        ["demo", "--out", f"{__file__}/below"],
        ["demo", "--out", "/proc/no-such-place"],
        ["diagnose", "--bundle", "nowhere"],
        ["diagnose", "--out", __file__],
        ["diagnose", "--prompts", "5"],
        ["diagnose", "--risk", "1.5"],
        ["diagnose", "--text", "mine"],
        ["diagnose", "--text", "add=nowhere.txt"],
        ["diagnose", "--jsonl", f"add={__file__}"],
        ["train", "--plan", "quick"],
        ["train", "--processes", "0"],
        ["train", "--seed", str(2**70)],
        ["train-experts", "--out", "new", "--text", f"mine={__file__}", "--steps", str(2**70)],
        ["train", "--out", str(Path(__file__).parent)],
        ["train", "--work", __file__],
        ["fit", "--evidence", "nowhere", "--out", "fitted"],
        ["fit", "--evidence", __file__, "--out", "fitted"],
        ["fit", "--out", "fitted"],
        ["fit", "--examples", "nowhere", "--out", "fitted"],
        ["fit", "--examples", __file__, "--evidence", __file__, "--out", "fitted"],
        ["train-experts", "--out", "new"],
        ["train-experts", "--out", "new", "--text", "mine"],
        ["train-experts", "--out", "new", "--text", "mine=nowhere.txt"],
        ["train-experts", "--out", __file__, "--text", f"mine={__file__}"],
    ],
    ids=" ".join,
)
def test_bad_input_of_other_commands_is_one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert_one_line(*run(capfd, *arguments))
    assert os.listdir() == []


NUMBERS = {  # with what each option needs besides
    "chat --temperature": ["--sample"],
    "chat --threshold": [],
    "diagnose --risk": ["--out", "out"],
    "generate --false-alarm-rate": ["--prompt", "a"],
    "generate --temperature": ["--prompt", "a", "--sample"],
    "serve --drain": ["--port", "0"],
    "serve --patience": ["--port", "0"],
    "serve --replica-cpus": ["--port", "0", "--ray"],
    "train-expert --kl": [
        *("--name", "x", "--out", "out", "--text", "a.txt"),
        *("--objective", "reinforce", "--reward", "math:hypot"),
    ],
}


def test_no_number_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """NaN for every option that takes a fraction, and infinity but where it means never."""
    options = {
        f"{name} {option.opts[0]}": option
        for name, command in get_command(cli.app).commands.items()
        for option in command.params
        if isinstance(option, TyperOption) and "float" in str(option.type_descriptor.annotation)
    }
    assert options.keys() == NUMBERS.keys()
    Path("a.txt").write_text("a b\n")
    for each, needed in NUMBERS.items():
        command, option = each.split()
        for value in ("nan", "-inf", *(["inf"] if each != "chat --threshold" else [])):
            code, out, err = run(capfd, command, f"{option}={value}", *needed)
            assert_one_line(code, out, err)
            assert f"got {value}" in err or f"Invalid value for '{option}'" in err or "the extra serve,ray" in err


def test_report_that_was_not_measured(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bundle that was put together by hand is as good as any."""
    code, out, err = run(capfd, "report", "--bundle", saved)
    assert (code, err) == (0, "")
    assert out.startswith("Nothing was measured")
    assert "\nIt has no gate for foreign prompts." in out
    assert run(capfd, "report", "--bundle", saved, "--markdown") == (0, out, "")


def test_a_report_may_have_numbers_that_are_none(
    bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """JSON has none of these: ``null`` stands for them."""
    replace(bundle, report={"gains": {"sort": {"gain": float("nan")}, "of": [np.inf, 1]}}).save(tmp_path / "odd")
    code, out, err = run(capfd, "report", "--bundle", tmp_path / "odd", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["gains"] == {"sort": {"gain": None}, "of": [None, 1]}


def test_report_reads_the_index_alone(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is told without the model, which may be elsewhere; an index of another format is not."""
    index = json.loads((saved / "bundle.json").read_text())
    Path("moved").mkdir()
    Path("moved/bundle.json").write_text(json.dumps(index | {"report": {"note": "kept"}}))
    code, out, err = run(capfd, "report", "--bundle", "moved", "--json")
    assert (code, json.loads(out), err) == (0, {"note": "kept", "gate": None}, "")
    Path("moved/bundle.json").write_text(json.dumps(index | {"format": 99}))
    assert_one_line(*run(capfd, "report", "--bundle", "moved"))


def test_truncated_bundle_is_one_line(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And nothing is written. Other damage: tests/test_damage.py."""
    shutil.copytree(saved, "broken")
    os.truncate("broken/model/model.safetensors", 2000)
    for command in (["generate", "--prompt", "a"], ["demo", "--out", "output"]):
        assert_one_line(*run(capfd, *command, "--bundle", "broken"))
    assert os.listdir() == ["broken"]


@pytest.mark.parametrize(
    "arrays",
    [
        {"hidden": np.full((3, 2), np.nan)},
        {"hidden": np.zeros((3, 2))},
        {"hidden": np.zeros((30, 16)), "labels": np.arange(30) % 4},
        {"hidden": np.zeros((30, 16)), "labels": np.zeros(2, int)},
        {"hidden": np.array([["a"]])},
    ],
    ids=["NaN", "width", "label range", "label count", "text"],
)
def test_bad_evidence_is_one_line(
    arrays: dict[str, np.ndarray], saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.savez("evidence.npz", **arrays)
    assert_one_line(*run(capfd, "fit", "--evidence", "evidence.npz", "--bundle", saved, "--out", "fitted"))
    assert os.listdir() == ["evidence.npz"]


def test_bytes_that_are_no_utf8(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a file; and as an argument, in a real process, with its exit code and streams."""
    Path("prompt").write_bytes(b"ab\xff")
    done = shell("generate", "--bundle", saved, "--prompt", b"ab\xff")
    real = done.returncode, done.stdout.decode(), done.stderr.decode()
    for code, out, err in (real, run(capfd, "generate", "--bundle", saved, "--prompt-file", "prompt")):
        assert_one_line(code, out, err)
        assert "0xff at position 2" in err


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever we call, here the stream that is read; what was asked for is done."""

    class Old(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            warnings.warn("this stream\n is \x1b old", stacklevel=1)
            return super().read(size)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Old(b"kfpa>")))
    code, out, err = run(capfd, "generate", "--bundle", saved, "--prompt-file", "-", "--json", "--max-new-tokens", "2")
    assert (code, json.loads(out)["prompts"]) == (0, ["kfpa>"])
    assert err == "bayes-dispatch: warning: this stream is \\x1b old\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(directory: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bayes_dispatch.app.bundle.read_index", interrupted)
    assert run(capfd, "report") == (130, "", "")


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"], ["compare"]], ids=lambda words: words[0])
def test_a_blend_that_is_none_is_told_before_the_bundle_is_loaded(
    saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr("bayes_dispatch.app.bundle.load_bundle", lambda path, **_: loaded.append(path))
    code, out, err = run(capfd, *command, "--blend", "soort", "--bundle", saved)
    assert_one_line(code, out, err)
    assert "refined_mean, reverse, sort, add, base, got 'soort'" in err
    assert loaded == []


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["fit", "--out", "new", "--examples", "typo.jsonl"], "reverse, sort, add, base in line 2 of typo.jsonl"),
        (["calibrate-gate", "--out", "new", "--text", "Sort=sort.txt"], "text of the experts reverse, sort, add"),
        (["diagnose", "--out", "new", "--text", "Sort=sort.txt"], "text of the experts reverse, sort, add"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_an_expert_that_is_none_is_told_before_the_bundle_is_loaded(
    saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str], told: str
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr("bayes_dispatch.app.bundle.load_bundle", lambda path, **_: loaded.append(path))
    Path("typo.jsonl").write_text(
        '{"expert": "sort", "text": "ba"}\n{"expert": "Sort", "text": "ba"}', encoding="utf-8"
    )
    Path("sort.txt").write_text("ba>ab\n" * 900, encoding="utf-8")
    code, out, err = run(capfd, *command, "--bundle", saved)
    assert_one_line(code, out, err)
    assert told in err
    assert err.endswith(" of Sort\n")
    assert loaded == []


@pytest.mark.parametrize("option", ["--examples", "--evidence"])
def test_a_file_that_is_none_is_told_before_the_bundle_is_loaded(
    saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr("bayes_dispatch.app.bundle.load_bundle", lambda path, **_: loaded.append(path))
    code, out, err = run(capfd, "fit", option, "nowhere", "--out", "new", "--bundle", saved)
    assert_one_line(code, out, err)
    assert "nowhere, got: No such file or directory" in err
    assert loaded == []


def test_threads_are_those_that_a_model_gains_by(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for a small model, and torch's own number for a large one, or where the environment tells."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        for large, told, expected in ((0, False, 2), (10**9, True, 2), (10**9, False, 1)):
            torch.set_num_threads(2)
            monkeypatch.setattr(terminal, "LARGE", large)
            if told:
                monkeypatch.setenv("OMP_NUM_THREADS", "2")
            terminal.open_bundle(saved)
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_reader_that_leaves(saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`bayes-dispatch … | head` ends without a word, also when what is left is flushed."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(capfd, "experts", "list", "--bundle", saved) == (1, "", "")


def test_terminal_without_unicode(
    saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(capfd, "generate", "--bundle", saved, "--prompt", "grün", "--show-experts") == (0, "", "")
    assert b"gr\\xfcn" in terminal.buffer.getvalue()  # type: ignore[attr-defined]
