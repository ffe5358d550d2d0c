"""The guides in docs/ say what is so: their code runs, and the tests that one names exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "guide", ["model", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dispatcher", "experts", "inference"))]
)
def test_python_blocks_run_in_order(guide: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tests_of_the_feature_list_exist() -> None:
    named = set(re.findall(r"`pytest ([^`]+)`", GUIDE))
    assert len(named) > 10
    for command in named:
        file, *selection = shlex.split(command)
        found = re.findall(r"def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"))
        assert found, command
        assert selection == [] or (selection[0] == "-k" and selection[1:] == [selection[1]] and selection[1] in found)
