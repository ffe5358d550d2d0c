"""What is kept on disk. Laws:

- an output goes through links, into pipes, devices and standard output, keeps mode and owner, and is written whole;
- what is replaced is replaced at once, or is refused;
- a save takes the place of an earlier save, and of nothing else: it refuses links and what else lies there;
- wherever a save is stopped, by an error or for good, the old one or the new one is read, and the next one succeeds;
- whoever reads while others save has one save or another, whole;
- what is saved has reached the disk before it is what is read; saves into one directory take turns;
- JSON, tensors and arrays come back as they were, and the same content is the same bytes;
- tensors of other names, shapes or dtypes, and whatever is damaged, are refused in one line.
"""

import errno
import json
import os
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import xarray
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import BundleError
from bayes_dispatch.storage import (
    FINISHED,
    TEMPORARY,
    check_directory,
    check_tensors,
    check_unused,
    directories,
    files,
    parse_tensors,
    read_bytes,
    read_directory,
    read_json,
    read_saved,
    read_tensors,
    replace_file,
    save_directory,
    tensors_as_bytes,
    write_directory,
    write_json,
    write_output,
    write_tensors,
)

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from tests.bayes_dispatch.conftest import Sample

Contents = dict[str, str]


def contents(path: Path) -> Contents:
    return {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}


def refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(BundleError, match=message) as error:
        act()
    assert "\n" not in str(error.value)


def forbid_modes(patch: pytest.MonkeyPatch, error: int = errno.EPERM) -> None:
    """No file can be given the owner and the mode of another."""

    def forbidden(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    patch.setattr(os, "fchown", forbidden)
    patch.setattr(os, "fchmod", forbidden)


class TestOutput:
    def test_it_replaces_a_file_and_keeps_its_mode(self, tmp_path: Path) -> None:
        file = tmp_path / "new" / "file"
        write_output(file, b"old")
        file.chmod(0o640)
        before = file.stat()
        write_output(file, b"new")
        assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"new", 0o640)
        assert file.stat().st_ino != before.st_ino  # at once
        assert os.listdir(file.parent) == ["file"]

    @pytest.mark.skipif(os.getuid() != 0, reason="gives a file to somebody else")
    def test_it_keeps_the_owner(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("old")
        os.chown(tmp_path / "file", 1234, 2345)
        write_output(tmp_path / "file", b"new")
        assert ((tmp_path / "file").stat().st_uid, (tmp_path / "file").stat().st_gid) == (1234, 2345)

    @pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP])
    def test_where_owner_and_mode_cannot_be_kept_the_file_is_overwritten(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
    ) -> None:
        forbid_modes(monkeypatch, error)
        (tmp_path / "file").write_text("old")
        before = (tmp_path / "file").stat()
        write_output(tmp_path / "file", b"new")
        assert ((tmp_path / "file").read_text(), (tmp_path / "file").stat().st_ino) == ("new", before.st_ino)
        assert os.listdir(tmp_path) == ["file"]

    @pytest.mark.parametrize("write", [write_output, replace_file])
    def test_a_disk_without_modes_has_none_to_keep(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], object]
    ) -> None:
        """All its files have one mode, and it sets none."""
        (tmp_path / "file").write_text("old")
        (tmp_path / "file").chmod(0o600)
        before = (tmp_path / "file").stat()
        forbid_modes(monkeypatch)
        write(tmp_path / "file", b"new")
        assert (tmp_path / "file").stat().st_ino != before.st_ino
        assert contents(tmp_path) == {"file": "new"}

    def test_all_names_of_a_file_have_its_content(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("a longer old one")
        os.link(tmp_path / "file", tmp_path / "other")
        write_output(tmp_path / "file", b"new")
        assert (tmp_path / "other").read_text() == "new"

    @pytest.mark.parametrize("exists", [True, False])
    def test_it_goes_through_links(self, tmp_path: Path, exists: bool) -> None:
        target, link = tmp_path / "far" / "file", tmp_path / "link"
        target.parent.mkdir()
        if exists:
            target.write_text("old")
        link.symlink_to("far/file")
        write_output(link, b"new")
        assert (link.is_symlink(), target.read_text()) == (True, "new")
        assert os.listdir(target.parent) == ["file"]

    def test_it_goes_into_pipes_and_devices(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        read: list[bytes] = []
        reader = Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
        reader.start()
        write_output(tmp_path / "pipe", b"x" * 200_000)  # more than a pipe holds
        reader.join()
        assert read == [b"x" * 200_000]
        assert (tmp_path / "pipe").is_fifo()
        write_output(Path("/dev/null"), b"x")
        assert Path("/dev/null").is_char_device()

    @pytest.mark.parametrize("name", ["/dev/stdout", "out"])
    def test_it_goes_where_standard_output_goes(self, tmp_path: Path, name: str) -> None:
        """In turn with what is printed, into a pipe and into a file."""
        script = (
            "import sys, pathlib; from bayes_dispatch.storage import write_output; print('before')\n"
            "write_output(pathlib.Path(sys.argv[1]), b'data\\n'); print('after')"
        )
        command = [sys.executable, "-c", script, name]
        where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}}
        with (tmp_path / "out").open("w") as out:
            subprocess.run(command, check=True, stdout=out, **where)
        assert (tmp_path / "out").read_text() == "before\ndata\nafter\n"

    def test_netcdf_from_threads(self, fitted: "Dispatcher", fresh: "Sample", tmp_path: Path) -> None:
        """Each writes all of it, through a link, over a file of another length."""
        (tmp_path / "far.nc").write_bytes(b"old")
        (tmp_path / "posterior.nc").symlink_to("far.nc")
        posterior, errors = fitted.posterior(fresh.evidence, draws=3, seed=0), []

        def write() -> None:
            try:
                posterior.to_netcdf(tmp_path / "posterior.nc")
            except BaseException as error:
                errors.append(error)

        threads = [Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        with xarray.open_datatree(tmp_path / "far.nc", engine="h5netcdf") as tree:
            np.testing.assert_array_equal(tree["posterior"]["weights"][0], posterior.weights)
        assert sorted(os.listdir(tmp_path)) == ["far.nc", "posterior.nc"]

    def test_what_it_refuses(self, tmp_path: Path) -> None:
        refused(lambda: write_output(tmp_path, b""), "expected a file at .*, got a directory")
        (tmp_path / "loop").symlink_to("loop")
        refused(lambda: write_output(tmp_path / "loop", b""), "expected a file at .*, got a link to itself")
        assert (tmp_path / "loop").is_symlink()

    @pytest.mark.parametrize("call", ["open", "fdopen", "fsync", "replace"])
    def test_an_error_leaves_the_old_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        write_output(tmp_path / "file", b"old")
        really, calls = getattr(os, call), []

        def failing(*arguments: Any, **given: Any) -> Any:
            calls.append(arguments)
            if call == "open" and len(calls) < 2:  # the directory's
                return really(*arguments, **given)
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            with pytest.raises(OSError, match="No space left"):
                write_output(tmp_path / "file", b"new")
        assert contents(tmp_path) == {"file": "old"}

    def test_what_a_killed_writer_left_is_used_up(self, tmp_path: Path) -> None:
        (tmp_path / f".file{TEMPORARY}").write_bytes(b"x" * 100)
        write_output(tmp_path / "file", b"new")
        assert contents(tmp_path) == {"file": "new"}

    def test_threads_and_disks_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*_: object, **__: object) -> bool:
            raise OSError(errno.ENOLCK, "No locks available")

        for locks in (True, False):
            if not locks:
                monkeypatch.setattr(files, "lock_descriptor", none)
            texts = [str(n).encode() * 10_000 for n in range(8)]
            threads = [Thread(target=write_output, args=(tmp_path / "file", text)) for text in texts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (tmp_path / "file").read_bytes() in texts
            with pytest.raises(KeyError):
                replace_file(tmp_path / "file", b"new", lambda: {}["not this one"])
            assert (tmp_path / "file").read_bytes() in texts
            assert os.listdir(tmp_path) == ["file"]


class TestReplacing:
    """Outputs of the same rules, but for these."""

    def test_other_names_keep_the_old_content(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("old")
        os.link(tmp_path / "file", tmp_path / "backup")
        replace_file(tmp_path / "file", lambda: (tmp_path / "file").read_bytes() + b"er")
        assert contents(tmp_path) == {"file": "older", "backup": "old"}

    def test_what_could_only_be_overwritten_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("old")
        forbid_modes(monkeypatch)
        (tmp_path / "file").chmod(0o640)
        why = "its directory takes no new files, or none of its owner and mode"
        refused(lambda: replace_file(tmp_path / "file", b"new"), f"expected a file that another .*/file: {why}$")
        assert contents(tmp_path) == {"file": "old"}
        os.mkfifo(tmp_path / "pipe")
        refused(lambda: replace_file(tmp_path / "pipe", b"new"), "expected a file at .*pipe, got a pipe or a device")
        refused(lambda: replace_file(tmp_path, b"new"), "expected a file at .*, got a directory")

    def test_a_change_takes_a_lock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "alone_in", lambda _: nullcontext(False))
        with pytest.raises(OSError, match="No locks available"):
            replace_file(tmp_path / "file", lambda: b"new")
        assert contents(tmp_path) == {}


def save(path: Path, text: str, more: str = "base.json") -> None:
    """A save like a bundle: ``gate/a.json`` and one other file, named in the index."""
    with save_directory(path, "bundle.json") as new:
        for name in ("gate/a.json", more):
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text)
        write_json(new / "bundle.json", {"files": {"gate/a.json": "", more: ""}, "text": text})


def load(path: Path, meanwhile: Callable[[], object] = lambda: None) -> str:
    """Which save it is; that it is whole, whatever happens once between the reading of index and files."""
    happens = iter([meanwhile])

    def read(place: Path) -> tuple[str, set[str]]:
        index = read_json(place / "bundle.json")
        next(happens, lambda: None)()
        return index["text"], {(place / name).read_text() for name in index["files"]}

    text, found = read_saved(path, "bundle.json", read)
    assert found == {text}
    return text


FOREIGN: dict[str, Callable[[Path], object]] = {
    "thesis.txt": lambda path: (path / "thesis.txt").write_text("mine"),
    "gate/note": lambda path: (path / "gate").mkdir(exist_ok=True) or (path / "gate" / "note").write_text("mine"),
    "empty": lambda path: (path / "empty").mkdir(),
    r"thing \(a link\)": lambda path: (path / "thing").symlink_to(path.parent),
    r"gate/a\.json \(a link\)": lambda path: (
        (path / "gate").mkdir(exist_ok=True),
        (path / "gate" / "a.json").unlink(missing_ok=True),
        (path / "gate" / "a.json").symlink_to(path.parent / "elsewhere"),
    ),
    "pipe": lambda path: os.mkfifo(path / "pipe"),
}


class TestSaving:
    def test_it_takes_the_place_of_an_earlier_save(self, tmp_path: Path) -> None:
        """Alone: what that had and this has not is gone, with its folder."""
        path = tmp_path / "deep" / "kept"
        save(path, "old", "evidence/file.npz")
        inode = path.stat().st_ino
        save(path, "new")
        assert (load(path), path.stat().st_ino) == ("new", inode)
        assert sorted(contents(path)) == ["base.json", "bundle.json", "gate/a.json"]
        assert sorted(os.listdir(path)) == ["base.json", "bundle.json", "gate"]

    @pytest.mark.parametrize("earlier", [True, False])
    @pytest.mark.parametrize("name", FOREIGN)
    def test_what_is_not_its_own_is_refused_and_stays(self, tmp_path: Path, name: str, earlier: bool) -> None:
        path = tmp_path / "kept"
        path.mkdir()
        (tmp_path / "elsewhere").write_text("mine")
        if earlier:
            save(path, "old")
        FOREIGN[name](path)
        before = sorted((str(each), each.lstat().st_ino) for each in tmp_path.rglob("*"))
        found = name if earlier else f"({name}|gate)"
        refused(lambda: save(path, "new"), f"expected .*kept to be new, empty or an earlier save .*: {found}$")
        assert sorted((str(each), each.lstat().st_ino) for each in tmp_path.rglob("*")) == before
        assert (tmp_path / "elsewhere").read_text() == "mine"

    @pytest.mark.parametrize(
        ("index", "text"),
        [
            *(
                ("bundle.json", text)
                for text in ("{", "{}", "[1]", '{"files": 3}', '"a"', '{"files": ["bundle.json"]}')
            ),
            ("config.json", '{"model_type": "maskformer", "backbone": "resnet50"}'),
            ("config.json", '{"model_type": "encoder-decoder", "encoder": {"model_type": "bert"}}'),
        ],
    )
    def test_what_only_has_its_name_is_no_earlier_save(self, tmp_path: Path, index: str, text: str) -> None:
        (tmp_path / index).write_text(text)
        refused(lambda: check_directory(tmp_path, index), f"got other things in it: {index}")

    @pytest.mark.parametrize("mine", ["thesis.doc", "gate/thesis.doc", "thesis/a.json", "gate", ""])
    def test_only_files_of_its_kind_are_its_own(self, tmp_path: Path, mine: str) -> None:
        """Whatever an index lists, which somebody else may have written."""
        save(tmp_path, "old")
        files = read_json(tmp_path / "bundle.json")["files"]
        write_json(tmp_path / "bundle.json", {"files": {**files, mine: ""}, "text": "old"})
        if not (tmp_path / mine).exists():
            (tmp_path / mine).parent.mkdir(exist_ok=True)
            (tmp_path / mine).write_text("mine")
            refused(lambda: save(tmp_path, "new"), "got other things in it: .*thesis")
            assert (tmp_path / mine).read_text() == "mine"
        else:
            save(tmp_path, "new")
            assert load(tmp_path) == "new"

    def test_what_file_managers_leave_is_no_obstacle(self, tmp_path: Path) -> None:
        save(tmp_path, "old", "evidence/file.npz")
        for folder in (".", "gate", "evidence"):
            (tmp_path / folder / ".DS_Store").write_text("icons")
        save(tmp_path, "new")
        assert sorted(contents(tmp_path)) == [".DS_Store", "base.json", "bundle.json", "gate/.DS_Store", "gate/a.json"]
        (tmp_path / "Thumbs.db").mkdir()
        refused(lambda: save(tmp_path, "newer"), "got other things in it: Thumbs.db")

    def test_a_directory_that_is_to_be_unused(self, tmp_path: Path) -> None:
        """An earlier save is no such one, not even between its two steps; what a killed save has left is nothing."""
        path = tmp_path / "kept"
        for _ in range(2):
            check_unused(path)
            path.mkdir(exist_ok=True)
        (path / ".DS_Store").write_text("icons")
        (path / directories.UNFINISHED).mkdir()
        check_unused(path)
        (path / directories.UNFINISHED).rename(path / FINISHED)
        refused(lambda: check_unused(path), f"expected a new or empty directory, got .*kept, which holds {FINISHED}$")
        (path / FINISHED).rmdir()
        save(path, "old")
        refused(lambda: check_unused(path), "got .*kept, which holds base.json$")
        (tmp_path / "link").symlink_to("kept")
        refused(lambda: check_unused(tmp_path / "link"), "expected a directory at .*link, got a link")

    def test_files_keep_their_modes(self, tmp_path: Path) -> None:
        save(tmp_path, "old")
        (tmp_path / "gate/a.json").chmod(0o640)
        save(tmp_path, "new")
        assert (load(tmp_path), stat.S_IMODE((tmp_path / "gate/a.json").stat().st_mode)) == ("new", 0o640)

    def test_links_and_files_in_the_place_of_the_directory(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        refused(lambda: save(tmp_path / "link", "new"), "expected a directory at .*link, got a link.* real")
        (tmp_path / "file").write_text("mine")
        refused(lambda: save(tmp_path / "file", "new"), "expected a directory at .*file, got a file")
        assert contents(tmp_path) == {"file": "mine"}

    def test_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The working directory stays the one that it is."""
        monkeypatch.chdir(tmp_path)
        for text in ("old", "new"):
            save(Path("."), text)
            assert load(Path(".")) == text
        assert os.path.samefile(".", tmp_path)

    def test_without_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*_: object, **__: object) -> None:
            raise PermissionError("Operation not permitted")

        monkeypatch.setattr(os, "link", none)
        for text in ("old", "new"):
            save(tmp_path, text)
            assert load(tmp_path) == text

    def test_saves_take_turns(self, tmp_path: Path) -> None:
        begun: list[str] = []
        with save_directory(tmp_path, "bundle.json") as new:
            other = Thread(target=lambda: (begun.append("other"), save(tmp_path, "other"), begun.append("done")))
            other.start()
            other.join(0.1)
            assert begun == ["other"]
            write_json(new / "bundle.json", {"files": {}, "text": "first"})
        other.join()
        assert load(tmp_path) == "other"

    def test_saves_of_a_new_directory_take_turns_and_keep_nobody_else(self, tmp_path: Path) -> None:
        done: list[str] = []
        acts = {"other": lambda: save(tmp_path / "new", "other"), "beside": lambda: write_output(tmp_path / "a", b"")}
        threads = {name: Thread(target=lambda name=name: (acts[name](), done.append(name))) for name in acts}
        with save_directory(tmp_path / "new", "bundle.json") as new:
            for thread in threads.values():
                thread.start()
            threads["beside"].join(30)
            assert done == ["beside"]
            write_json(new / "bundle.json", {"files": {}, "text": "first"})
        threads["other"].join()
        assert load(tmp_path / "new") == "other"
        assert sorted(os.listdir(tmp_path)) == ["a", "new"]

    def test_a_directory_that_another_save_has_made_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was not there when this one looked, and is there when its turn comes."""

        def late(directory: Path) -> AbstractContextManager[bool]:
            monkeypatch.undo()
            save(tmp_path / "new", "other")
            directory.mkdir()
            return files.alone_in(directory)

        monkeypatch.setattr(directories, "alone_in", late)
        save(tmp_path / "new", "mine")
        assert load(tmp_path / "new") == "mine"
        assert os.listdir(tmp_path) == ["new"]

    def test_a_save_that_gives_up_lets_the_next_one_begin(self, tmp_path: Path) -> None:
        """Though what the next one waits for is gone with it."""
        other = Thread(target=save, args=(tmp_path / "new", "other"))
        with suppress(ZeroDivisionError), save_directory(tmp_path / "new", "bundle.json"):
            other.start()
            other.join(0.1)
            raise ZeroDivisionError
        other.join()
        assert load(tmp_path / "new") == "other"
        assert os.listdir(tmp_path) == ["new"]

    def test_it_has_reached_the_disk_before_it_is_what_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path / "kept", "old")
        synced: set[int] = set()
        fsync, rename, seen = os.fsync, Path.rename, []

        def noted(handle: int) -> None:
            synced.add(os.fstat(handle).st_ino)
            fsync(handle)

        def checked(self: Path, target: Path) -> Path:
            if target.name == FINISHED:
                seen.append({each.stat().st_ino for each in (self, *self.rglob("*"))} <= synced)
            else:
                seen.append((tmp_path / "kept").stat().st_ino in synced)
            return rename(self, target)

        monkeypatch.setattr(os, "fsync", noted)
        monkeypatch.setattr(Path, "rename", checked)
        save(tmp_path / "kept", "new")
        assert seen == [True, True]


class Killed(BaseException):
    """The process ends here, and so does every later operation on files."""


def fail_at(patch: pytest.MonkeyPatch, turn: int, error: BaseException) -> list[str]:
    """Have operation ``turn`` raise; if the process is killed by it, all later ones too. Returns what was done."""
    done: list[str] = []

    def failing(name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **given: Any) -> Any:
            stopped = len(done) == turn or (len(done) > turn and isinstance(error, Killed))
            done.append(f"{name} failed" if stopped else name)
            if stopped:
                raise error
            return None if name == "fsync" else really(*arguments, **given)  # 10,000 take their time

        return operation

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "link", "fsync"):
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return done


@pytest.mark.parametrize("error", [OSError("disk full"), Killed()], ids=["error", "kill"])
@pytest.mark.parametrize("existing", [True, False], ids=["existing", "new"])
def test_a_save_that_is_stopped_anywhere(tmp_path: Path, error: BaseException, existing: bool) -> None:
    """Each operation fails in turn. A new directory is there when it is whole, and what was left is used up."""
    seen = set()
    for turn in count():
        path = tmp_path / str(turn) / "kept"
        if existing:
            save(path, "old", "evidence/file.npz")
        with pytest.MonkeyPatch.context() as patch:
            done = fail_at(patch, turn, error)
            with suppress(OSError, Killed):
                save(path, "new")
        if path.exists():
            seen.add(load(path))
            (path / "note").mkdir()  # whatever was stopped, this is no part of it
            refused(lambda path=path: save(path, "newer"), "got other things in it: note")
            (path / "note").rmdir()
            assert load(path, lambda path=path: save(path, "newer")) == "newer"
        else:
            assert not existing
            save(path, "newer")
        assert load(path) == "newer"
        assert sorted(contents(path)) == ["base.json", "bundle.json", "gate/a.json"]
        assert os.listdir(path.parent) == ["kept"]
        if not any(operation.endswith("failed") for operation in done):
            break
    assert turn > (15 if existing else 8)
    assert seen == ({"old", "new"} if existing else {"new"})


ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([True, False])}


def test_documents_round_trip(tmp_path: Path) -> None:
    write_directory(tmp_path, "gate", {"note": "naïve", "size": [1, 2.5]}, ARRAYS)
    document, arrays = read_directory(tmp_path, "gate")
    assert document == {"format": "gate", "note": "naïve", "size": [1, 2.5]}
    assert all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())
    assert sorted(os.listdir(tmp_path)) == ["gate.json", "gate.safetensors"]
    for suffix in ("json", "safetensors"):
        (tmp_path / f"gate.{suffix}").rename(tmp_path / f"dispatcher.{suffix}")
    refused(lambda: read_directory(tmp_path, "dispatcher"), "expected format 'dispatcher' in .* got 'gate'")


def test_documents_are_read_while_another_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two files of one; what was edited is no such case."""
    write_directory(tmp_path, "gate", {"note": "old"}, ARRAYS)

    def later(path: Path) -> bytes:
        monkeypatch.undo()
        write_directory(tmp_path, "gate", {"note": "new"}, {"a": ARRAYS["b"]})
        return read_bytes(path)

    monkeypatch.setattr(directories, "read_bytes", later)
    document, arrays = read_directory(tmp_path, "gate")
    assert (document["note"], list(arrays)) == ("new", ["a"])
    (tmp_path / "gate.safetensors").write_bytes(b"")
    refused(lambda: read_directory(tmp_path, "gate"), "expected digest .*: it was edited or truncated")


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


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "c": torch.tensor(1.5, dtype=torch.float64)}
EXPECTED = {name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
WHOLE = safetensors.torch.save(TENSORS)


def test_tensors_round_trip(tmp_path: Path) -> None:
    """Those that share memory, too, and those that are no rows of memory; another library reads them."""
    whole = torch.arange(6.0)
    tensors = {**TENSORS, "d": whole, "e": whole.view(2, 3).T, "f": whole[2:4], "g": whole, "h": torch.zeros(0)}
    metadata = {"name": "x", "base": "ü\n", "empty": ""}
    write_tensors(tmp_path / "a", tensors, metadata)
    read, header = read_tensors(tmp_path / "a")
    assert header == metadata
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in tensors.items())
    assert safetensors.torch.load_file(tmp_path / "a").keys() == tensors.keys()
    write_tensors(tmp_path / "b", *(dict(reversed(each.items())) for each in (tensors, metadata)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_are_hashed_one_at_a_time(tmp_path: Path) -> None:
    count, size = 16, 2**16
    write_tensors(tmp_path / "a", {f"t{n}": torch.full((size // 4,), float(n)) for n in range(count)}, {})
    tracemalloc.start()
    try:
        parse_tensors(read_bytes(tmp_path / "a"), tmp_path / "a")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * count * size  # the file, its tensors, and few of them once more


def test_a_file_of_tensors_is_made_with_no_more_copies_than_its_library_makes() -> None:
    tensors = {f"t{n}": torch.full((2**14,), float(n)) for n in range(16)}
    tracemalloc.start()
    try:
        size = len(tensors_as_bytes(tensors, {}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * size


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (EXPECTED | {"d": ((1,), torch.float32)}, "expected 4 tensors in .*, got others or fewer: d"),
        ({"a": EXPECTED["a"]}, "expected 1 tensors in .*: b, c"),
        (EXPECTED | {"a": ((3, 2), torch.float32)}, r"expected a of shape \(3, 2\) .* got \(2, 3\) and torch.float32"),
        (EXPECTED | {"b": ((2,), torch.float32)}, r"expected b of .* torch.float32 in .* got \(2,\) and torch.int64"),
    ],
)
def test_other_tensors(expected: dict[str, tuple[tuple[int, ...], torch.dtype]], message: str) -> None:
    refused(lambda: check_tensors(Path("file"), TENSORS, expected), message)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7 + len(WHOLE) - 40), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_damaged_header_never_escapes(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]) -> None:
    """Of a file without a digest: it is refused in one line, or leaves tensors."""
    data = bytearray(WHOLE)
    for place, change in flips:
        data[place] ^= change
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(data)
    try:
        read_tensors(file)
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_a_header_of_a_foreign_dtype(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "X99", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refused(lambda: read_tensors(tmp_path / "a"), "expected a whole safetensors file")
