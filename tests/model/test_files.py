"""What is written is whole or not there at all; what is read is refused in one line when it is not what was written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import BundleError
from bayes_dispatch.model.files import (
    read_json,
    read_tensors,
    write_bytes,
    write_directory,
    write_files,
    write_json,
    write_tensors,
)


def listing(path: Path) -> dict[str, str]:
    return {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}


def fill(path: Path, content: str) -> None:
    with write_directory(path) as target:
        (target / "part").mkdir()
        (target / "part" / "a").write_text(content)
        (target / "b").write_text(content)


class TestDirectory:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "deep" / "kept"

    def test_it_appears_whole_and_replaces_the_old_one(self, path: Path) -> None:
        for content in ("old", "new"):
            fill(path, content)
            assert listing(path.parent) == {"kept/part/a": content, "kept/b": content}

    def test_files_that_are_not_written_again_are_gone(self, path: Path) -> None:
        fill(path, "old")
        with write_directory(path) as target:
            (target / "c").write_text("new")
        assert listing(path) == {"c": "new"}

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    def test_a_failure_in_the_middle_leaves_the_old_one(self, path: Path, error: BaseException) -> None:
        def fail() -> None:
            with write_directory(path) as target:
                (target / "b").write_text("half")
                raise error

        with pytest.raises(type(error)):
            fail()
        assert list(path.parent.iterdir()) == []
        fill(path, "old")
        with pytest.raises(type(error)):
            fail()
        assert listing(path.parent) == {"kept/part/a": "old", "kept/b": "old"}

    def test_a_failure_between_the_renames_brings_the_old_one_back(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(path, "old")
        rename = Path.rename

        def failing(self: Path, target: Path) -> Path:
            if (self / "c").exists():  # the new directory
                raise OSError("no more")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="no more"), write_directory(path) as directory:
            (directory / "c").write_text("new")
        assert listing(path.parent) == {"kept/part/a": "old", "kept/b": "old"}

    def test_a_file_is_not_replaced(self, path: Path) -> None:
        write_bytes(path, b"a file")
        with pytest.raises(BundleError, match=r"expected a directory at .*kept, got a file"):
            fill(path, "new")
        assert path.read_bytes() == b"a file"
        assert list(path.parent.iterdir()) == [path]

    def test_a_link_to_a_directory_stays_a_link(self, path: Path) -> None:
        fill(path, "old")
        link = path.with_name("link")
        link.symlink_to(path)
        fill(link, "new")
        assert link.is_symlink()
        assert listing(path) == {"part/a": "new", "b": "new"}
        assert {p.name for p in path.parent.iterdir()} == {"kept", "link"}


class Killed(BaseException):
    """The process ends here, and so does every later operation on files."""


class TestDisk:
    """All that is written has reached the disk when it takes its place: bytes, names, and those of its folders."""

    @pytest.fixture
    def synced(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Inodes whose content reached the disk, and −1 for each rename, in order."""
        events: list[int] = []
        fsync, replace, rename = os.fsync, os.replace, os.rename

        def noted_fsync(handle: int) -> None:
            events.append(os.fstat(handle).st_ino)
            fsync(handle)

        def noted(really: Callable[..., None]) -> Callable[..., None]:
            def move(*arguments: object) -> None:
                events.append(-1)
                really(*arguments)

            return move

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted(replace))
        monkeypatch.setattr(os, "rename", noted(rename))
        return events

    @pytest.mark.parametrize("existing", [True, False])
    def test_a_directory(self, tmp_path: Path, synced: list[int], existing: bool) -> None:
        path = tmp_path / "kept"
        if existing:
            fill(path, "old")
            del synced[:]
        fill(path, "new")
        parts = {each.stat().st_ino for each in (path, *path.rglob("*"))}
        first, last = synced.index(-1), len(synced) - 1 - synced[::-1].index(-1)
        assert parts <= set(synced[:first])
        assert path.parent.stat().st_ino in synced[last:]

    def test_a_file(self, tmp_path: Path, synced: list[int]) -> None:
        write_bytes(tmp_path / "file", b"new")
        assert synced == [(tmp_path / "file").stat().st_ino, -1, tmp_path.stat().st_ino]

    def test_files_in_a_directory(self, tmp_path: Path, synced: list[int]) -> None:
        with write_files(tmp_path / "out", ["a"]) as target:
            (target / "a").write_text("new")
        assert synced == [(tmp_path / "out" / "a").stat().st_ino, -1, (tmp_path / "out").stat().st_ino]

    def test_killed_at_any_of_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before the first rename the old directory is there, after the second one the new, each whole."""
        really, seen = os.fsync, []
        for turn in range(5):  # two files, two folders, and the one around them
            fill(tmp_path / str(turn) / "kept", "old")
            calls = []

            def killed(handle: int, calls: list[int] = calls, turn: int = turn) -> None:
                calls.append(handle)
                if len(calls) == turn + 1:
                    raise Killed
                really(handle)

            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", killed)
                with pytest.raises(Killed):
                    fill(tmp_path / str(turn) / "kept", "new")
            seen.append(listing(tmp_path / str(turn) / "kept"))
        old, new = ({"part/a": content, "b": content} for content in ("old", "new"))
        assert seen == [old] * 4 + [new]


def test_a_failed_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "file", b"old")

    def failing(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(tmp_path / "file", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, data: object) -> None:
    file = tmp_path_factory.getbasetemp() / "round-trip.json"
    write_json(file, data)
    assert read_json(file) == data


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1} extra', b"\xff\xfe", b"\x00\n\n", b"[" * 100_000])
def test_what_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    refused(lambda: read_json(tmp_path / "a.json"), r"expected JSON in .*a\.json, got")


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_what_is_not_there(tmp_path: Path, read: Callable[[Path], object]) -> None:
    refused(lambda: read(tmp_path / "none"), "expected a readable file .*none, got: No such file")
    refused(lambda: read(tmp_path), "expected a readable file .*, got: Is a directory")


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "c": torch.tensor(1.5, dtype=torch.float64)}
EXPECTED = {name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
WHOLE = safetensors.torch.save(TENSORS)


def refused(read: Callable[[], object], message: str) -> None:
    with pytest.raises(BundleError, match=message) as error:
        read()
    assert "\n" not in str(error.value)


def test_tensors_round_trip(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", WHOLE)
    read = read_tensors(tmp_path / "a", EXPECTED)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in TENSORS.items())


def test_written_tensors_are_what_safetensors_reads(tmp_path: Path) -> None:
    metadata = {"name": "x", "base": "ü\n", "empty": ""}
    write_tensors(tmp_path / "a", TENSORS, metadata)
    read = read_tensors(tmp_path / "a", EXPECTED)
    assert all(torch.equal(read[name], t) for name, t in TENSORS.items())
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == metadata
    reversed_order = (dict(reversed(content.items())) for content in (TENSORS, metadata))
    write_tensors(tmp_path / "b", *reversed_order)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (EXPECTED | {"d": ((1,), torch.float32)}, "expected 4 tensors in .*, got others or fewer: d"),
        ({"a": EXPECTED["a"]}, "expected 1 tensors in .*: b, c"),
        (EXPECTED | {"a": ((3, 2), torch.float32)}, r"expected a of shape \(3, 2\) .* got \(2, 3\) and torch.float32"),
        (EXPECTED | {"b": ((2,), torch.float32)}, r"expected b of .* torch.float32 in .* got \(2,\) and torch.int64"),
    ],
)
def test_other_tensors(tmp_path: Path, expected: dict[str, tuple[tuple[int, ...], torch.dtype]], message: str) -> None:
    write_bytes(tmp_path / "a", WHOLE)
    refused(lambda: read_tensors(tmp_path / "a", expected), message)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40, len(WHOLE) // 2, len(WHOLE) - 1, len(WHOLE) + 1])
def test_a_file_of_another_length(tmp_path: Path, length: int) -> None:
    write_bytes(tmp_path / "a", (WHOLE + b"\0")[:length])
    refused(lambda: read_tensors(tmp_path / "a", EXPECTED), "expected a whole safetensors file .*, got")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7 + len(WHOLE) - 40), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_damaged_header_never_escapes(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]) -> None:
    """Any changed bytes either are refused in one line or leave tensors of the right shapes and dtypes."""
    data = bytearray(WHOLE)
    for place, change in flips:
        data[place] ^= change
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(data)
    try:
        read = read_tensors(file, EXPECTED)
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert {name: (tuple(t.shape), t.dtype) for name, t in read.items()} == EXPECTED


def test_a_header_of_a_foreign_dtype(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).replace("F32", "X99").encode()
    write_bytes(tmp_path / "a", len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refused(lambda: read_tensors(tmp_path / "a"), "expected a whole safetensors file")
