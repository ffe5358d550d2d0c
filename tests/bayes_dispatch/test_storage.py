"""Directories on disk: what was saved is what is loaded, or one clear line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.errors import BundleError
from bayes_dispatch.storage import read_directory, write_directory

if TYPE_CHECKING:
    from tests.bayes_dispatch.conftest import Sample

ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([True, False])}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_directory(tmp_path / "dir", "thing", {"note": "naïve", "size": [1, 2.5]}, ARRAYS)
    return tmp_path / "dir"


def test_round_trip(saved: Path) -> None:
    document, arrays = read_directory(saved, "thing")
    assert document == {"format": "thing", "note": "naïve", "size": [1, 2.5]}
    assert all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())
    assert sorted(file.name for file in saved.iterdir()) == ["thing.json", "thing.safetensors"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def edit(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"2.5", b"3.5").replace(b"BOOL", b"I8  "))


def make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", ["thing.json", "thing.safetensors"])
@pytest.mark.parametrize(
    "damage", [cut, edit, flip, Path.unlink, make_directory, lambda file: file.write_bytes(b""),
               lambda file: file.write_bytes(b"[1, 2]"), lambda file: file.write_bytes(b"\xff\xfe\x00")]
)  # fmt: skip
def test_damaged_files(saved: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(saved / name)
    with pytest.raises(BundleError, match=r"^expected [^\n]*got [^\n]+$"):
        read_directory(saved, "thing")


def test_foreign_directories(saved: Path, tmp_path: Path) -> None:
    for suffix in ("json", "safetensors"):
        shutil.copy(saved / f"thing.{suffix}", saved / f"other.{suffix}")
    with pytest.raises(BundleError, match=r"expected format 'other' in .* got 'thing'"):
        read_directory(saved, "other")
    with pytest.raises(BundleError, match=r"^expected a file .*got No such file"):
        read_directory(tmp_path / "nowhere", "thing")


def test_saving_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match=r"^expected a directory at .*, got a file$"):
        write_directory(tmp_path / "file", "thing", {}, ARRAYS)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("owner", "attribute", "calls"),
    [(Path, "write_bytes", 1), (Path, "write_bytes", 2), (os, "fsync", 1), (os, "fsync", 2), (os, "replace", 1)],
)
def test_a_failed_save_leaves_the_old_files(
    saved: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, attribute: str, calls: int
) -> None:
    """The disk is full at one write or rename: the old content still loads, and nothing else lies about."""
    real, made = getattr(owner, attribute), []

    def fails(*arguments: Any) -> object:
        made.append(arguments)
        if len(made) == calls:
            raise OSError("no space left")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, fails)
        with pytest.raises(OSError, match="no space left"):
            write_directory(saved, "thing", {"note": "new"}, {"a": np.zeros(9)})
    assert read_directory(saved, "thing")[0]["note"] == "naïve"
    assert len(list(saved.iterdir())) == 2


def test_what_is_saved_has_reached_the_disk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files before either takes its place, then their directory."""
    events: list[int] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        events.append(os.fstat(handle).st_ino)
        fsync(handle)

    def noted_replace(*arguments: Any) -> None:
        events.append(-1)
        replace(*arguments)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_directory(saved, "thing", {"note": "new"}, {"a": np.zeros(9)})
    files = [(saved / f"thing.{kind}").stat().st_ino for kind in ("safetensors", "json")]
    assert events == [*files, -1, -1, saved.stat().st_ino]


def test_a_save_killed_between_its_renames_is_refused(saved: Path, tmp_path: Path) -> None:
    """New arrays beside an old document are not the pair that was saved."""
    write_directory(tmp_path / "new", "thing", {"note": "naïve", "size": [1, 2.5]}, {"a": np.zeros(9)})
    shutil.copy(tmp_path / "new" / "thing.safetensors", saved)
    with pytest.raises(BundleError, match=r"expected digest .*got .*edited or truncated"):
        read_directory(saved, "thing")


def test_dispatcher_round_trip(fitted: Dispatcher, fresh: "Sample", tmp_path: Path) -> None:
    """Saving and loading changes nothing, bit for bit: draws, probabilities, simulations, settings, a second save."""
    fitted.save(tmp_path / "a")
    loaded = Dispatcher.load(tmp_path / "a")
    for name in ("experts", "random_state", "svi", "guide", "features"):
        assert getattr(loaded, name) == getattr(fitted, name)
    draws = [d.posterior(fresh.evidence, draws=5, seed=3).weights for d in (fitted, loaded)]
    assert np.array_equal(*draws)
    assert np.array_equal(fitted.predict_proba(fresh.evidence), loaded.predict_proba(fresh.evidence))
    for ours, theirs in zip(fitted.simulate(9, 4), loaded.simulate(9, 4), strict=True):
        assert np.array_equal(getattr(ours, "weights", ours), getattr(theirs, "weights", theirs))
    loaded.save(tmp_path / "b")
    for suffix in ("json", "safetensors"):
        a, b = (tmp_path / d / f"dispatcher.{suffix}" for d in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_dispatchers_of_other_formats(fitted: Dispatcher, tmp_path: Path) -> None:
    """Whole files, with a right digest, that are no dispatcher of ours."""
    fitted.save(tmp_path)
    document, arrays = read_directory(tmp_path, "dispatcher")
    document.pop("format")
    one_less = {name: array for name, array in arrays.items() if name != "guide.network.0.weight"}
    for changes, held in (
        ({"version": 99}, arrays),
        ({"experts": ["a", "b"]}, arrays),
        ({"views": {"smell": 3}}, arrays),
        ({}, one_less),
        ({}, {name: array for name, array in arrays.items() if not name.startswith("like.")}),
        ({}, {**arrays, "guide.center": np.zeros(2, np.float32)}),
        ({"guide": None}, arrays),
        ({"svi": {"stepz": 3}}, arrays),
    ):
        write_directory(tmp_path, "dispatcher", {**document, **changes}, held)
        with pytest.raises(BundleError, match=r"^expected [^\n]*got [^\n]+$"):
            Dispatcher.load(tmp_path)
    del document["experts"]
    write_directory(tmp_path, "dispatcher", document, arrays)
    with pytest.raises(BundleError, match=r"^expected [^\n]*got [^\n]+$"):
        Dispatcher.load(tmp_path)
    assert json.loads((tmp_path / "dispatcher.json").read_text())["format"] == "dispatcher"
