"""The command line: results, and one line with exit code 2 on bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayes_dispatch.app.bundle import SHIPPED, Bundle
from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.app.tables import report_markdown, report_tables
from bayes_dispatch.errors import BundleError

HEAVY = {"numpy", "torch", "pyro", "arviz", "matplotlib", "sklearn", "pandas"}


@pytest.fixture(scope="module")
def saved(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle on disk."""
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    bundle.save(directory)
    return directory


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in a directory of its own, so that stray files are seen."""
    monkeypatch.chdir(tmp_path)


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in this process."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return (int(exit_.value.code or 0), *capfd.readouterr())


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
        "try:\n    cli.main(['generate', '--help'])\n"
        "finally:\n    print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--blending-mode" in done.stdout
    assert HEAVY & set(done.stderr.split()) == set()


def test_no_arguments_show_help(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd)
    assert (code, err) == (0, "")
    assert all(command in out for command in ("demo", "train", "report", "generate", "experts", "fit"))


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
    for name in ("weights", "log_probabilities", "predictive_entropy", "mutual_information"):
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


def test_sampling_depends_on_the_seed(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--bundle", saved, "--prompt", "kfpa>", "--json", "--sample", "--temperature", "2"]
    first, again, other = (json.loads(run(capfd, *arguments, "--seed", seed)[1]) for seed in ("0", "0", "1"))
    assert first["texts"] == again["texts"] != other["texts"]


def test_backslashes_stay_without_escapes(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--bundle", saved, "--prompt", r"a\nb\\n", "--json", "--max-new-tokens", "1"]
    assert json.loads(run(capfd, *arguments)[1])["prompts"] == [r"a\nb\\n"]
    assert json.loads(run(capfd, *arguments, "--escapes")[1])["prompts"] == ["a\nb\\n"]


def test_show_experts(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "generate", "--bundle", saved, "--prompt", "kfpa>", "--show-experts")
    assert code == 0
    assert all(word in out for word in ("kfpa>", "reverse", "sort", "add", "base", "90% interval", "P(best)"))


def test_control_characters_are_shown_not_sent(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("prompt").write_bytes(b"a\x1b[2Jb\r")
    _, out, _ = run(capfd, "generate", "--bundle", saved, "--prompt-file", "prompt")
    assert "a\\x1b[2Jb\\r" in out
    assert "\x1b" not in out


def test_prompt_from_file_and_stdin(saved: Path) -> None:
    Path("prompt").write_text("grün\n", encoding="utf-8")
    arguments = ("generate", "--bundle", saved, "--prompt-file", "prompt", "--prompt-file", "-", "--json")
    done = shell(*arguments, input=b"kfpa>", check=True)
    assert json.loads(done.stdout)["prompts"] == ["grün\n", "kfpa>"]


def test_fit(bundle: Bundle, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of the file reach `fit`, and what it fitted is saved."""
    from bayes_dispatch.dispatcher.estimator import Dispatcher

    rng = np.random.default_rng(0)
    given = {"hidden": rng.normal(size=(8, 5)), "lengths": np.arange(8) + 20, "labels": np.arange(8) % 2}
    np.savez("evidence.npz", **given)
    seen = {}

    def fit(self: Dispatcher, X: Any, y: Any, mixtures: Any, progress: bool) -> Dispatcher:
        seen.update(hidden=X.views["hidden"], lengths=X.lengths, labels=y, mixtures=mixtures, experts=self.experts)
        return bundle.dispatcher

    monkeypatch.setattr(Dispatcher, "fit", fit)
    code, _, err = run(capfd, "fit", "--evidence", "evidence.npz", "--experts", "left, right", "--out", "fitted")
    assert (code, err) == (0, "")
    assert seen.pop("mixtures") is None
    assert seen.pop("experts") == ("left", "right")
    for name, array in given.items():
        np.testing.assert_array_equal(seen[name], array)
    assert Dispatcher.load("fitted").experts == bundle.dispatcher.experts


def test_report_of_the_shipped_bundle(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "report", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((SHIPPED / "bundle.json").read_text())["report"]
    _, out, _ = run(capfd, "report")
    for table in report_tables(report):
        assert table.title.split(":")[0] in out
        assert all(str(row[0]) in out for row in table.rows)
    assert run(capfd, "report", "--markdown") == (0, report_markdown(report) + "\n", "")


@pytest.mark.parametrize("report", [{}, {"note": "tiny"}, {"experts": 3}, {"experts": {"add": {}}}, {"dispatch": {}}])
def test_report_of_another_kind(report: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"expected .* got"):
        report_tables(report)


BAD_INPUT = {
    "missing bundle": ["--prompt", "a", "--bundle", "nowhere"],
    "bundle is a file": ["--prompt", "a", "--bundle", __file__],
    "no prompt": [],
    "empty prompt": ["--prompt", ""],
    "long prompt": ["--prompt", "a" * 20_000],
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
    "NaN temperature": ["--prompt", "a", "--temperature", "nan"],
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
        ["train", "--out", str(Path(__file__).parent)],
        ["train", "--work", __file__],
        ["fit", "--evidence", "nowhere", "--experts", "a,b", "--out", "fitted"],
        ["fit", "--evidence", __file__, "--experts", "a,b", "--out", "fitted"],
        ["fit", "--experts", "a,b", "--out", "fitted"],
    ],
    ids=" ".join,
)
def test_bad_input_of_other_commands_is_one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert_one_line(*run(capfd, *arguments))
    assert os.listdir() == []


def test_report_that_was_not_measured(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_one_line(*run(capfd, "report", "--bundle", saved))


@pytest.mark.parametrize("file", ["model/model.safetensors", "dispatcher/dispatcher.safetensors", "bundle.json"])
def test_truncated_bundle_is_one_line(file: str, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(saved, "broken")
    os.truncate(f"broken/{file}", (saved / file).stat().st_size // 2)
    for command in (["generate", "--prompt", "a"], ["demo", "--out", "output"]):
        assert_one_line(*run(capfd, *command, "--bundle", "broken"))
    assert os.listdir() == ["broken"]


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"labels": np.zeros(3, int)},
        {"hidden": np.full((3, 2), np.nan)},
        {"hidden": np.zeros((3, 2)), "weights": np.zeros(3)},
        {"hidden": np.zeros((3, 2)), "labels": np.array([0, 1, 2])},
        {"hidden": np.zeros((3, 2)), "labels": np.zeros(2, int)},
        {"hidden": np.array([[{}]], dtype=object)},
        {"hidden": np.array([["a"]])},
    ],
    ids=["empty", "no view", "NaN", "unknown name", "label range", "label count", "pickled", "text"],
)
def test_bad_evidence_is_one_line(arrays: dict[str, np.ndarray], capfd: pytest.CaptureFixture[str]) -> None:
    np.savez("evidence.npz", **arrays)
    assert_one_line(*run(capfd, "fit", "--evidence", "evidence.npz", "--experts", "a,b", "--out", "fitted"))
    assert os.listdir() == ["evidence.npz"]


def test_truncated_evidence_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    np.savez("evidence.npz", hidden=np.zeros((30, 20)))
    os.truncate("evidence.npz", 2000)
    assert_one_line(*run(capfd, "fit", "--evidence", "evidence.npz", "--experts", "a,b", "--out", "fitted"))


def test_bytes_that_are_no_utf8(saved: Path) -> None:
    """In a file and as an argument; the exit code and streams of a real process."""
    Path("prompt").write_bytes(b"ab\xff")
    for arguments in (("--prompt-file", "prompt"), ("--prompt", b"ab\xff")):
        done = shell("generate", "--bundle", saved, *arguments)
        assert_one_line(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert b"0xff at position 2" in done.stderr


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(directory: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bayes_dispatch.app.bundle.load_bundle", interrupted)
    assert run(capfd, "report") == (130, "", "")


def test_reader_that_leaves(saved: Path) -> None:
    """`bayes-dispatch … | head` ends without a word."""
    command = [sys.executable, "-m", "bayes_dispatch", "experts", "list", "--bundle", str(saved)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_terminal_without_unicode(saved: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = shell("generate", "--bundle", saved, "--prompt", "grün", "--show-experts", env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"gr\\xfcn" in done.stdout
