"""The demonstration: its prompts follow their conventions, its files are whole or not there, and seeds decide. The
shipped model dispatches its prompts rightly."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from bayes_dispatch.app import demo
from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.app.commands.main import main
from bayes_dispatch.app.demo import FILES, TITLE, run_demo
from bayes_dispatch.app.demo_prompts import CONVENTION_PROMPTS as PROMPTS
from bayes_dispatch.app.demo_prompts import LANGUAGE_PROMPTS, REAL_PROMPTS, DemoPrompt, prompts_for
from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.experts.domains import held_out, real_domains

RULES = {
    "reverse": lambda question: question[:-1][::-1],
    "sort": lambda question: "".join(sorted(question[:-1])),
    "shift": lambda question: question[:-1].translate(str.maketrans("abcdefghijklmnop", "bcdefghijklmnopa")),
    "add": lambda question: str(total(question)),
    "reversed_add": lambda question: str(total(question))[::-1],
    "no_carry": lambda question: "".join(
        str((int(a) + int(b)) % 10) for a, b in zip(*question[:-1].split("+"), strict=True)
    ),
}


def total(question: str) -> int:
    return sum(map(int, question[:-1].split("+")))


def run(bundle: Bundle, out: Path, seed: int = 0) -> str:
    """What is printed."""
    console = Console(file=io.StringIO(), width=120)
    assert run_demo(bundle, out, seed, console, progress=False) == [out / name for name in FILES]
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def first(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demonstration: where its files are, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "deep" / "output"
    return out, run(bundle, out)


def test_experts_of_languages_are_asked_in_languages() -> None:
    assert prompts_for(("de", "fr", "nb", "ru", "base")) is LANGUAGE_PROMPTS
    assert prompts_for(("reverse", "de", "base")) is PROMPTS
    assert prompts_for((*real_domains(), "base")) is REAL_PROMPTS
    assert len({prompt.name for prompt in REAL_PROMPTS}) == len(REAL_PROMPTS)
    with pytest.raises(ConfigError, match=r"^expected experts of reverse, .*, got notes, mails$"):
        prompts_for(("notes", "mails"))  # of which none would answer rightly


def test_what_cannot_be_shown_is_told_before_the_model_is_read(
    bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """There is no model here."""
    bundle.experts.renamed("reverse", "a").renamed("sort", "b").renamed("add", "c").save(tmp_path / "experts")
    (tmp_path / "bundle.json").write_text(json.dumps({"format": 1, "files": {}, "report": {}}))
    (tmp_path / "out").mkdir()
    for told in (
        "expected experts of reverse, ",
        f"expected no path.png in {tmp_path / 'out'}, or that of an earlier run",
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["demo", "--bundle", str(tmp_path), "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2
        assert capfd.readouterr().err.startswith(f"bayes-dispatch: error: {told}")
        (tmp_path / "out" / "path.png").write_bytes(b"mine")


def test_prompts_are_of_all_kinds() -> None:
    assert len(PROMPTS) >= 10
    assert len({prompt.name for prompt in PROMPTS}) == len(PROMPTS)
    assert {prompt.kind for prompt in PROMPTS} == {"pure", "mixed", "short", "foreign"}
    assert all((prompt.answer is None) for prompt in PROMPTS if prompt.kind == "foreign")
    for prompt in PROMPTS:
        assert len(prompt.text) <= 15 if prompt.kind == "short" else 100 <= len(prompt.text.encode()) <= 200


@pytest.mark.parametrize("prompt", [prompt for prompt in PROMPTS if prompt.answer and prompt.answer.endswith("\n")])
def test_answers_follow_the_conventions(prompt: DemoPrompt) -> None:
    """Every solved item and the answer, by rules written here; no other rule gives the answer too."""
    names = prompt.name.removeprefix("short: ").split(" & ")
    assert prompt.answer is not None
    for number, item in enumerate((prompt.text + prompt.answer).splitlines()):
        question, answer = item[: item.find(sign := ">" if ">" in item else "=") + 1], item.partition(sign)[2]
        assert RULES[names[number % len(names)]](question) == answer
        if prompt.kind != "short":
            assert held_out(question)
    rivals = ("reverse", "sort", "shift") if question.endswith(">") else ("add", "reversed_add", "no_carry")
    assert len({RULES[rival](question) for rival in rivals}) == 3


def test_files_and_tables(bundle: Bundle, first: tuple[Path, str]) -> None:
    out, printed = first
    assert sorted(os.listdir(out)) == sorted(FILES)
    assert os.listdir(out.parent) == ["output"]
    report = (out / "report.md").read_text(encoding="utf-8")
    for prompt in PROMPTS:
        assert prompt.name in printed
        assert prompt.name in report
    for name in (*bundle.experts.components, *(blend.name for blend in demo.SHOWN_BLENDS)):
        assert name in report
    assert "](blends.png)" in report
    assert "](forest.png)" in report
    for picture in ("blends.png", "forest.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    with xr.open_dataset(out / "posterior.nc", group="posterior", engine="h5netcdf") as posterior:
        assert list(posterior.prompt.values) == [prompt.name for prompt in PROMPTS]
        assert list(posterior.expert.values) == list(bundle.experts.components)
        np.testing.assert_allclose(posterior.weights.sum("expert"), 1, atol=1e-6)


def test_one_seed_gives_the_same_and_other_files_stay(bundle: Bundle, first: tuple[Path, str], tmp_path: Path) -> None:
    """The same seed gives the same; a file of a name of ours is replaced where it is of an earlier demonstration."""
    (tmp_path / "notes").write_text("mine")
    report = tmp_path / "report.md"
    report.write_text("mine")
    with pytest.raises(BundleError, match=r"expected no report\.md in .*, or that of an earlier run"):
        run(bundle, tmp_path)
    report.write_text(f"{TITLE}\nold")
    assert run(bundle, tmp_path) == first[1]
    assert report.read_text() == (first[0] / "report.md").read_text()
    assert (tmp_path / "notes").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES, "notes"])


def test_an_error_leaves_nothing(
    bundle: Bundle, first: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run with another seed, which prints something else."""
    console = Console(file=io.StringIO(), width=120)

    def broken(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(demo, "plot_blend_bars", broken)
    with pytest.raises(OSError, match="no space left"):
        run_demo(bundle, tmp_path / "output", 1, console, progress=False)
    assert os.listdir(tmp_path) == []
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "Generation under each blend" in printed
    assert not first[1].startswith(printed)


def test_output_that_is_a_file(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("mine")
    with pytest.raises(BundleError, match=r"expected a directory .* got a file"):
        run(bundle, tmp_path / "output")


@pytest.mark.usefixtures("unchecked")
def test_shipped_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """`bayes-dispatch demo` dispatches rightly, and most answers are right."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--out", "output"])
    assert exit_.value.code == 0
    printed = capfd.readouterr().out
    assert "Generation under each blend" in printed
    assert os.listdir(tmp_path) == ["output"]
    with xr.open_dataset(tmp_path / "output" / "posterior.nc", group="posterior", engine="h5netcdf") as posterior:
        mean = posterior.weights.mean(("chain", "draw"))
        best = dict(zip(mean.prompt.values, mean.expert.values[mean.argmax("expert").values], strict=True))
        experts = mean.expert.values[:-1]
    assert sum(best[name] == name for name in experts) >= len(experts) - 1
    right = next(line for line in printed.splitlines() if line.split()[:2] == ["right", "of"]).split()[3:]
    assert max(map(int, right)) >= 9  # of 13
