"""What is installed: a light import, public names that resolve, every package, a small bundle, nothing else in the
wheel. Bare imports are banned."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import bayes_dispatch
from bayes_dispatch import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bayes_dispatch", "model", "experts", "inference", "serving")
HEAVY = {
    "arviz",
    "h5py",
    "jax",
    "matplotlib",
    "numpy",
    "numpyro",
    "pandas",
    "pyro",
    "scipy",
    "sklearn",
    "torch",
    "xarray",
}
MAX_BUNDLE_BYTES = 6 * 2**20


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, bayes_dispatch; dir(bayes_dispatch); print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert "bayes_dispatch" in loaded
    assert loaded & HEAVY == set()


def test_public_names_resolve() -> None:
    """The stub lists them, for type checkers and ``lazy_loader`` alike; every error is among them."""
    names = bayes_dispatch.__all__
    assert set(errors.__all__) <= set(names)
    assert len(names) == len(set(names))
    assert set(names) <= set(dir(bayes_dispatch))
    for name in names:
        assert getattr(bayes_dispatch, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Disptacher"):
        bayes_dispatch.Disptacher  # noqa: B018


@pytest.mark.parametrize("name", ["model", "experts", "inference", "serving"])
@pytest.mark.parametrize("statement", ["import {}", "import {}.a", "from {}.a import b"])
def test_bare_import_is_banned(name: str, statement: str) -> None:
    source = statement.format(name) + "\n"
    assert "TID251" in ruff(source)
    assert "TID251" not in ruff(source.replace(name, f"bayes_dispatch.{name}"))


def ruff(source: str) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "tests/test_any.py", "-"]
    return subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True).stdout


def test_shipped_bundles_are_small() -> None:
    files = [path for path in (ROOT / "bayes_dispatch").glob("shipped*/**/*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= MAX_BUNDLE_BYTES


def test_every_package_is_listed() -> None:
    """setuptools takes the packages that are named, so that each folder of sources must be."""
    found = {
        ".".join(parts if parts[0] == "bayes_dispatch" else ("bayes_dispatch", *parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
        for parts in [path.relative_to(ROOT).parent.parts]
    }
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert set(tomllib.load(file)["tool"]["setuptools"]["packages"]) == found


@pytest.mark.slow
def test_wheel_contents(tmp_path: Path) -> None:
    """The wheel holds every source file and the bundle, once, under bayes_dispatch/, and nothing else."""
    tree = tmp_path / "tree"  # a copy: setuptools leaves build/ beside the sources, and takes stale files from it
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-qq",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(tree),
    ]
    subprocess.run(build, check=True)

    expected = {
        path.relative_to(tree).as_posix()
        for folder in FOLDERS
        for path in (tree / folder).rglob("*")
        if path.is_file() and not any(parent.is_symlink() for parent in path.parents)
    }
    expected = {name if name.startswith("bayes_dispatch/") else f"bayes_dispatch/{name}" for name in expected}
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(expected)
