"""README and guides say what is so.

Their Python runs and prints what they show, their shell commands parse, their links lead somewhere, the results are
the shipped bundle's, and the API page names every public name.
"""

import logging
import re
import runpy
import shlex
import sys
from copy import copy
from pathlib import Path

import pytest
import typer

import bayes_dispatch
from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.commands.main import app, main
from bayes_dispatch.app.tables import report_markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
SLOW = ("dispatcher", "experts", "inference")  # they fit and train
SHOWING = ("README", "model", *(pytest.param(page, marks=pytest.mark.slow) for page in SLOW))


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def blocks(page: str, language: str) -> str:
    return "".join(re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL))


def commands() -> list[list[str]]:
    lines = "".join(blocks(page, "sh") for page in PAGES).splitlines()
    lines += [line[2:] for page in PAGES for line in blocks(page, "console").splitlines() if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shape(printed: str) -> list[str]:
    """Words, with one sign for every number and truth value: fits and training end elsewhere on another machine."""
    return re.sub(r"[-+]?[\d.]+(e[-+]?\d+)?|\b(True|False)\b", "#", printed).split()


def numbers(printed: str) -> list[float]:
    return [float(each) for each in re.findall(r"\d+\.\d+", printed)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("page", SHOWING)
def test_python_prints_what_is_shown(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("bayes_dispatch")
    for name in ("handlers", "level"):  # what a page sets would stay for other tests
        monkeypatch.setattr(logger, name, copy(getattr(logger, name)))
    exec(compile(blocks(page, "python"), PAGES[page], "exec"), {"__name__": "__main__"})
    printed = capfd.readouterr().out
    assert page != "README" or list(tmp_path.iterdir()) == []  # its first lines leave nothing behind
    if page in SLOW:
        assert shape(printed) == shape(blocks(page, "text"))
    else:
        assert printed == blocks(page, "text")


def test_shell_commands_parse() -> None:
    """Every option exists and every value is of its type; nothing runs."""
    known = typer.main.get_command(app)
    ours = [command for command in commands() if command[0] == "bayes-dispatch"]
    assert {command[1] for command in ours} >= {"generate", "train-expert", "chat", "compare", "diagnose"}
    for command in ours:
        group, words = known, command[1:]
        while hasattr(group, "commands"):
            group, words = group.commands[words[0]], words[1:]
        group.make_context(command[1], words)


@pytest.mark.usefixtures("unchecked")
def test_console_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    command, _, shown = blocks("shell", "console").partition("\n")
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main(shlex.split(command)[2:])
    printed, told = capfd.readouterr()
    assert (exit_.value.code, told) == (0, "")
    assert shape(printed) == shape(shown)
    assert numbers(printed) == pytest.approx(numbers(shown), abs=2e-3)  # no figures of an earlier dispatcher


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {command[1] for command in commands() if command[0] == "make"}
    named |= {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)`", text_of(page))}
    assert {"demo", "test"} <= named <= targets


def test_the_check_of_vllm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in an environment that `make check` does not have."""
    monkeypatch.setattr(sys, "argv", ["check", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("tests.vllm.check", run_name="__main__")
    assert exit_.value.code == 0


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str) -> None:
    text = text_of(page)
    links = [PAGES[page].parent / link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = [ROOT / name for name in re.findall(r"(?:benchmarks|notebooks|tests)/[\w/]+\.(?:py|ipynb)", text)]
    assert [path for path in [*links, *files] if not path.exists()] == []


def test_benchmarks_are_named() -> None:
    """In a guide, or in the Makefile, which runs them."""
    told = "".join(map(text_of, PAGES)) + (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name not in told] == []


def test_readme_is_short() -> None:
    assert len(text_of("README").split()) <= 1000


def test_results_are_the_shipped_bundles() -> None:
    written = text_of("results").partition("<!-- results -->\n")[2].partition("\n<!-- end of results -->")[0]
    bundle = load_bundle()
    assert written == report_markdown(bundle.report, bundle.gate)


def test_api_page_names_every_public_name() -> None:
    assert sorted(re.findall(r"^::: bayes_dispatch\.(\w+)$", text_of("api"), re.MULTILINE)) == sorted(
        bayes_dispatch.__all__
    )
