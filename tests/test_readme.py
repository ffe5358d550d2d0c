"""The README says what is so: its code runs, its commands work, its numbers are the shipped bundle's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.tables import report_markdown

ROOT = Path(__file__).resolve().parent.parent
LONG = ("train", "demo", "diagnose", "train-expert", "calibrate-gate", "measure")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = "".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program + " ")]


def run_python(code: str, directory: Path) -> str:
    command = [sys.executable, "-c", "import matplotlib\nmatplotlib.use('agg')\n" + code]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # else tests that run at once slow each other down many times
    return subprocess.run(command, cwd=directory, env=one_thread, check=True, capture_output=True, text=True).stdout


def test_first_python_block(tmp_path: Path) -> None:
    assert "'reverse'" in run_python(blocks("python")[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_all_python_blocks_in_order(tmp_path: Path) -> None:
    assert "weighted_average" in run_python("".join(blocks("python")), tmp_path)


@pytest.mark.parametrize(
    "command", [c for c in commands("bayes-dispatch") if c[1] not in LONG], ids=lambda c: " ".join(c[:6])
)
def test_commands(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "bayes_dispatch", *command[1:]], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command", [c for c in commands("bayes-dispatch") if c[1] in LONG], ids=" ".join)
def test_options_of_long_commands_exist(command: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "bayes_dispatch", command[1], "--help"], capture_output=True, text=True
    )
    assert all(option in shown.stdout for option in command if option.startswith("--"))


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {command[1] for command in commands("make")} | set(re.findall(r"`make ([a-z-]+)`", README))
    assert named >= {"demo", "test", "train", "check"}
    assert named <= targets


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_results_are_the_shipped_bundles() -> None:
    written = README.partition("<!-- results -->\n")[2].partition("\n<!-- end of results -->")[0]
    assert written == report_markdown(load_bundle().report)
