"""Files of packages are found by their records, and a package that is not there is told with the command that helps."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains.sources import Source

Install = Callable[..., Path]
SOURCE = Source("two-files", "1.2")


def test_files_by_suffix(install: Install) -> None:
    files = {"two/b.txt": b"b", "two/a.txt": b"a", "two/__init__.py": b"raise SystemExit", "../out.txt": b"o"}
    directory = install("two-files", "1.2+cpu", files)
    assert SOURCE.files(".txt", directory) == {
        "two/a.txt": directory / "two/a.txt",
        "two/b.txt": directory / "two/b.txt",
    }


def test_files_of_an_installed_package(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = install("two-files", "1.2", {"two/a.txt": b"a"})
    monkeypatch.setattr(sys, "path", [*sys.path, str(directory)])
    assert SOURCE.files(".txt") == {"two/a.txt": directory / "two/a.txt"}


def test_the_readme(install: Install) -> None:
    assert SOURCE.readme(install("two-files", "1.2", {}, "# Two\n\nfiles")) == "# Two\n\nfiles"


def test_a_missing_package(install: Install, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        SOURCE.files(".txt")
    assert str(error.value) == "expected two-files 1.2 (pip install --no-deps two-files==1.2), got none"
    install("two-files", "1.3", {})
    with pytest.raises(ConfigError) as error:
        SOURCE.files(".txt", tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"--target {tmp_path} two-files==1.2), got 1.3")
