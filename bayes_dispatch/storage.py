"""All that is kept on disk: files and directories that are written whole or not at all, and checked when they are read.

One file: ``write_output`` replaces it at once, where that keeps what it is. A directory: ``save_directory``, which
takes the place of an earlier save and of nothing else. Digests tell what was truncated or edited. JSON, safetensors
and plain arrays alone are read; nothing is unpickled or executed.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from filelock import lock_descriptor
from safetensors import SafetensorError
from torch import Tensor

from bayes_dispatch.errors import BundleError

__all__ = [
    "EXPORTED_BY",
    "check_directory",
    "check_files",
    "check_tensors",
    "digest",
    "expect_digest",
    "keep_file",
    "parse_json",
    "parse_tensors",
    "read_bytes",
    "read_directory",
    "read_json",
    "read_tensors",
    "save_directory",
    "saved_at",
    "tensors_as_bytes",
    "write_directory",
    "write_files",
    "write_json",
    "write_output",
    "write_tensors",
]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# The file that tells what a saved directory consists of, and by its content the other files of such a save. What is no
# index of ours raises what such access raises.
CONTENTS: dict[str, Callable[[Any], Collection[str]]] = {
    "adapter_config.json": lambda index: index["peft_type"] and {"adapter_model.safetensors"},
    "bank.json": lambda index: {entry["file"] for entry in index["experts"]},
    "bundle.json": lambda index: index["files"].keys(),
    "config.json": lambda index: (
        {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        if index.get("exported_by") == EXPORTED_BY
        else (index.get("backbone") or index["encoder"])["mixer"]
        and {"model.safetensors", "tokenizer.json", FACTORS_FILE}
    ),
    "dispatcher.json": lambda index: {"dispatcher": {"dispatcher.safetensors"}}[index["format"]],
    "gate.json": lambda index: {"gate": {"gate.safetensors"}}[index["format"]],
    "vllm.json": lambda index: {
        f"{folder}/{file}"
        for folder in ("bank", *(f"experts/{name}" for name in index["ranks"]))
        for file in ADAPTER_FILES
    },
}
FACTORS_FILE = "factors.safetensors"
EXPORTED_BY = "bayes-dispatch"  # in the config.json of models that were written as other libraries have them
UNFINISHED, FINISHED = ".bayes-dispatch-unfinished", ".bayes-dispatch-finished"  # saves inside their directory
TEMPORARY = ".bayes-dispatch-temporary"
CLUTTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave where they look; nobody's
WITHOUT_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # some network file systems


def write_output(path: Path, data: bytes | Callable[[], bytes]) -> None:
    """Have ``path`` hold ``data``; afterwards it survives a crash.

    A file gets its content at once, and keeps mode and owner. A link stays one: its target is written. A pipe or a
    device is written to, and so is what standard output goes to. A file that cannot be replaced without loss (one of
    several names, of another owner, or in a directory that takes no new files) is overwritten where it is.

    Args:
        path: the file; missing directories are made. data: its bytes, or a function that makes them from what is there:
            it is called when no other writer can come between.

    Raises:
        BundleError: ``path`` is a directory. OSError: the disk is full, or refuses.
    """
    if path.is_dir():
        raise BundleError(f"expected a file at {path}, got a directory")
    old = path.stat() if path.exists() else None
    if old is not None:
        if (handle := _standard_stream(old)) is not None:
            return _write(handle, data)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if not stat.S_ISREG(old.st_mode):
            return _write(os.open(path, os.O_WRONLY), data)
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise BundleError(f"expected a file at {path}, got a link to itself")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent) as alone:
        if callable(data):
            if not alone:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))
            data = data()
        mark = "" if alone else f"-{os.getpid()}-{os.urandom(4).hex()}"
        temporary = path.with_name(f".{path.name}{TEMPORARY}{mark}")
        if old is not None and (old.st_nlink > 1 or not _replaceable(temporary, old)):
            return _write(os.open(path, os.O_WRONLY | os.O_TRUNC), data)
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            _write(handle, data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    """``write_output`` for JSON."""
    write_output(path, (json.dumps(data, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """``write_output`` for safetensors, with a digest of everything in their header."""
    write_output(path, tensors_as_bytes(tensors, {**metadata, "digest": _of_tensors(tensors, metadata)}))


@contextmanager
def write_files(directory: Path, names: Collection[str], title: str) -> Iterator[Path]:
    """A new directory to fill with a report and its pictures, which take their places in ``directory`` after the block.

    Other files in ``directory`` stay, and all do if the block ends with an error.

    Args:
        directory: made if need be. names: of the files; those of an earlier run that the block does not make go.
        title: first line of ``report.md``, one of them.

    Raises:
        BundleError: as :func:`check_files`.
    """
    check_files(directory, names, title)
    with tempfile.TemporaryDirectory() as new:
        yield Path(new)
        for name in sorted(names, key=lambda name: name != "report.md"):  # by which a stopped run is known
            if Path(new, name).exists():
                write_output(directory / name, Path(new, name).read_bytes())
            else:
                (directory / name).unlink(missing_ok=True)


def check_files(directory: Path, names: Collection[str], title: str) -> None:
    """Refuse a directory that has files of these names, unless its ``report.md`` is an earlier one of this title.

    Raises:
        BundleError: likewise, or it is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise BundleError(f"expected a directory at {directory}, got a file")
    report = directory / "report.md"
    if not (report.is_file() and report.read_bytes().startswith(title.encode() + b"\n")):
        for name in names:
            if os.path.lexists(directory / name):
                raise BundleError(f"expected no {name} in {directory}, or that of an earlier run, got another")


@contextmanager
def save_directory(path: Path, index: str) -> Iterator[Path]:
    """A new directory to fill, whose files take the place of those of an earlier save in ``path`` after the block.

    Whatever stops it, the process killed included, ``saved_at`` then gives the old save or the new one, whole; a
    directory that was not there appears when it is whole. The block's files are made under a hidden name; one rename
    makes them what is read; then they are linked under their own names, and only then is the hidden name given up. How
    the block writes does not matter: all of it reaches the disk before the rename. Saves into one directory take turns.

    Args:
        path: the directory. index: the file that tells what the save consists of; a key of ``CONTENTS``.

    Raises:
        BundleError: as :func:`check_directory`.
    """
    _check_place(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        if not path.exists():
            locks.enter_context(_alone(path.parent))
        there = path.exists()  # another save may have been waited for
        if there:
            locks.enter_context(_alone(path))
            check_directory(path, index)
            if (path / FINISHED).is_dir():
                _settle(path, index)
        new = path / UNFINISHED if there else path.with_name(f".{path.name}{UNFINISHED}")
        if new.exists():
            shutil.rmtree(new)
        new.mkdir()
        try:
            yield new
            for each in (*new.rglob("*"), new):
                sync(each)
            new.rename(path / FINISHED if there else path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if there:
            _settle(path, index)
        sync(path.parent)


def check_directory(path: Path, index: str) -> None:
    """Refuse a directory that holds anything but an earlier save with this index.

    Raises:
        BundleError: it is a file, a link, or holds something else; that is named.
    """
    _check_place(path)
    ours = _contents(path, index) | _names(path / FINISHED)
    if foreign := _foreign(path, ours | {f"{folder}/" for name in ours for folder in Path(name).parents}):
        expected = f"expected {path} to be new, empty or an earlier save (with {index}) alone"
        raise BundleError(f"{expected}, got other things in it: {foreign}")


def saved_at(path: Path) -> Path:
    """Where a saved directory is read: ``path``, but for the time between the two steps of a save."""
    return path / FINISHED if (path / FINISHED).is_dir() else path


def keep_file(old: Path, new: Path) -> None:
    """The same file under a second name, or a copy of it where the file system has no links."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def write_directory(path: Path, kind: str, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Save a document and named arrays, bound by a digest, as ``{kind}.json`` and ``{kind}.safetensors``.

    Args:
        path: the directory. kind: format of the content. document: what JSON can hold.

    Raises:
        BundleError: as :func:`check_directory`.
    """
    tensors = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    body = {"format": kind, **document}
    text = json.dumps({**body, "digest": digest(body, tensors)}, indent=1)
    with save_directory(path, f"{kind}.json") as new:
        (new / f"{kind}.safetensors").write_bytes(tensors)
        (new / f"{kind}.json").write_bytes(text.encode())


def read_directory(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what :func:`write_directory` wrote.

    Raises:
        BundleError: a file is missing, truncated, edited, or of another format.
    """
    path = saved_at(path)
    body = read_json(path / f"{kind}.json")
    if not isinstance(body, dict) or body.get("format") != kind:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise BundleError(f"expected format {kind!r} in {path / f'{kind}.json'}, got {found!r}")
    expected, tensors = body.pop("digest", None), read_bytes(path / f"{kind}.safetensors")
    expect_digest(path, expected, digest(body, tensors))
    return body, safetensors.numpy.load(tensors)


def read_bytes(path: Path) -> bytes:
    """The bytes of ``path``.

    Raises:
        BundleError: the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"expected a readable file {path}, got: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """The JSON of ``path``.

    Raises:
        BundleError: the file is missing or is no JSON.
    """
    return parse_json(read_bytes(path), path)


def parse_json(data: bytes, path: Path) -> Any:
    """The JSON of a file's bytes; ``path`` is for the error."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"expected JSON in {path}, got: {error}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file.

    Raises:
        BundleError: the file is missing, truncated, no safetensors file, or has another digest than it states.
    """
    return parse_tensors(read_bytes(path), path)


def parse_tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``read_tensors`` of a file's bytes; ``path`` is for the error. A digest is checked where the header has one."""
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"expected a whole safetensors file {path}, got: {error}") from None
    if (expected := metadata.pop("digest", None)) is not None:
        expect_digest(path, expected, _of_tensors(tensors, metadata))
    return tensors, metadata


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Refuse tensors of a file that have other names, shapes or dtypes.

    Raises:
        BundleError: naming the first few.
    """
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise BundleError(f"expected {len(expected)} tensors in {path}, got others or fewer: {', '.join(odd[:4])}")
    for name, (shape, dtype) in expected.items():
        got = tensors[name]
        if tuple(got.shape) != shape or got.dtype != dtype:
            raise BundleError(
                f"expected {name} of shape {shape} and {dtype} in {path}, got {tuple(got.shape)} and {got.dtype}"
            )


def tensors_as_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: the same bytes for the same content, where its own writer shuffles metadata.

    Tensors that share memory are written each for itself, and will no longer share it.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in whole.items():
        if (place := tensor.untyped_storage().data_ptr()) in seen:
            whole[name] = tensor.clone()
        seen.add(place)
    data = safetensors.torch.save(whole, dict(metadata))
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def digest(document: Mapping[str, Any], *parts: bytes) -> str:
    """SHA-256 of what JSON holds and of further bytes."""
    found = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for part in parts:
        found.update(b"\0" + part)
    return found.hexdigest()


def expect_digest(path: Path, expected: object, got: str) -> None:
    """Refuse what was edited or truncated."""
    if got != expected:
        raise BundleError(
            f"expected digest {str(expected)[:12]}… of {path}, got {got[:12]}…: it was edited or truncated"
        )


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(handle: int, data: bytes | Callable[[], bytes]) -> None:
    """All bytes, down to the disk where there is one."""
    with os.fdopen(handle, "wb", buffering=0) as file:
        rest = memoryview(data() if callable(data) else data)
        while rest:
            rest = rest[file.write(rest) :]
        if stat.S_ISREG(os.fstat(handle).st_mode):
            os.fsync(handle)


def _standard_stream(file: os.stat_result) -> int | None:
    """A handle of standard output or error, where that is this file."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or no file of this system
            if os.path.samestat(file, os.fstat(stream.fileno())):
                stream.flush()
                return os.dup(stream.fileno())
    return None


def _replaceable(temporary: Path, old: os.stat_result) -> bool:
    """Make a temporary file of the old one's owner and mode; false where that is not allowed."""
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except PermissionError:
        return False
    try:
        os.fchown(handle, old.st_uid, old.st_gid)
        os.fchmod(handle, stat.S_IMODE(old.st_mode))
    except OSError:  # not allowed, or unknown to the file system
        os.unlink(temporary)
        return False
    finally:
        os.close(handle)
    return True


@contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Wait until nobody else writes in this directory, and keep others out; false where its disk has no locks."""
    handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            locked = lock_descriptor(handle, poll_interval=0.005)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            locked = False
        yield locked
    finally:
        os.close(handle)


def _check_place(path: Path) -> None:
    if path.is_symlink():
        raise BundleError(f"expected a directory at {path}, got a link: name what it links to, {path.readlink()}")
    if path.exists() and not path.is_dir():
        raise BundleError(f"expected a directory at {path}, got a file")


def _settle(path: Path, index: str) -> None:
    """Put the files of a finished save in their places; until all are there, they are read where they are."""
    new, link = path / FINISHED, path / TEMPORARY
    sync(path)
    names = sorted(_names(new), key=lambda name: (name == index, name))  # the index last: it tells what the rest are
    for name in _contents(path, index) - set(names):
        (path / name).unlink(missing_ok=True)
        for folder in [path / folder for folder in Path(name).parents][:-1]:
            if folder.is_dir() and {each.name for each in folder.iterdir()} <= CLUTTER:
                shutil.rmtree(folder)
    for name in names:
        if not ((path / name).exists() and os.path.samefile(new / name, path / name)):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            if (path / name).exists():
                shutil.copymode(path / name, new / name)
            link.unlink(missing_ok=True)
            keep_file(new / name, link)
            os.replace(link, path / name)
    for folder in {(path / name).parent for name in names}:
        sync(folder)
    new.rename(path / UNFINISHED)
    shutil.rmtree(path / UNFINISHED)


def _contents(path: Path, index: str) -> set[str]:
    """Names of the files that an earlier save in ``path`` consists of; none where there was none."""
    try:
        names = {index, *CONTENTS[index](read_json(path / index))}
        return {name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts}
    except (BundleError, KeyError, TypeError, AttributeError):
        return set()


def _names(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def _foreign(path: Path, ours: Collection[str]) -> str | None:
    """The first thing in a directory that is none of these files and folders, no unfinished save and no clutter."""
    for folder, folders, files in os.walk(path):
        for name in sorted((*files, *folders)):
            each, short = Path(folder, name), Path(folder, name).relative_to(path).as_posix()
            if short in (UNFINISHED, FINISHED, TEMPORARY) or (name in CLUTTER and name in files):
                continue
            if each.is_symlink():
                return f"{short} (a link)"
            if (f"{short}/" if name in folders else short) not in ours or not (name in folders or each.is_file()):
                return short
        folders[:] = [name for name in folders if name not in (UNFINISHED, FINISHED)]
    return None


def _of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return digest(
        metadata,
        *(
            f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode()
            + tensor.detach().cpu().reshape(-1, 1).contiguous().view(torch.uint8).numpy().tobytes()
            for name, tensor in sorted(tensors.items())
        ),
    )
