"""Directories whose files belong together: the earlier save or the new one is read, whatever stops its writer, and
however far it has come (``read_saved``)."""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy

from bayes_dispatch.errors import BundleError
from bayes_dispatch.storage.documents import digest, expect_digest, read_json
from bayes_dispatch.storage.files import TEMPORARY, alone_in, keep_file, read_bytes, sync

__all__ = [
    "CLUTTER",
    "EXPORTED_BY",
    "FINISHED",
    "check_directory",
    "check_unused",
    "read_directory",
    "read_saved",
    "save_directory",
    "saved_at",
    "work_beside",
    "write_directory",
]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What files of experts, and of bundles, are called: others in an index are not ours, whoever wrote it.
EXPERT = re.compile(r"[\w-]+\.[0-9a-f]+\.safetensors", re.ASCII)
BUNDLED = re.compile(r"base\.json|(model|experts|dispatcher|gate|evidence)/[^/]+\.(json|safetensors|npz)")
# The file that tells what a saved directory consists of, and by its content the other files of such a save. What is no
# index of ours raises what such access raises.
CONTENTS: dict[str, Callable[[Any], Collection[str]]] = {
    "adapter_config.json": lambda index: index["peft_type"] and {"adapter_model.safetensors"},
    "bank.json": lambda index: {entry["file"] for entry in index["experts"] if EXPERT.fullmatch(entry["file"])},
    "bundle.json": lambda index: {name for name, _ in index["files"].items() if BUNDLED.fullmatch(name)},
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
T = TypeVar("T")
CLUTTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave where they look; nobody's


@contextmanager
def save_directory(path: Path, index: str) -> Iterator[Path]:
    """A new directory to fill, whose files take the place of those of an earlier save in ``path`` after the block.

    Whatever stops it, the process killed included, ``saved_at`` then gives the old save or the new one, whole; a
    directory that was not there appears when it is whole. The block's files are made under a hidden name; one rename
    makes them what is read; then they are linked under their own names, and only then is the hidden name given up. How
    the block writes does not matter: all of it reaches the disk before the rename. Saves into one directory take turns;
    what is written beside it waits for none.

    Args:
        path: the directory. index: the file that tells what the save consists of; a key of ``CONTENTS``.

    Raises:
        BundleError: as :func:`check_directory`.
    """
    _check_place(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}{UNFINISHED}")
    with ExitStack() as locks:
        there = _take_turn(path, aside, locks)
        if there:
            check_directory(path, index)
            if (path / FINISHED).is_dir():
                _settle(path, index)
        new = (path if there else aside) / UNFINISHED
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
        finally:
            with suppress(OSError):
                aside.rmdir()
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


def check_unused(path: Path) -> None:
    """Refuse a directory that holds anything: an earlier save, too, whose content may be nowhere else.

    Raises:
        BundleError: it is a file, a link, or holds something; that is named.
    """
    _check_place(path)
    if found := FINISHED if saved_at(path) != path else _foreign(path, ()):
        raise BundleError(f"expected a new or empty directory, got {path}, which holds {found}")


def saved_at(path: Path) -> Path:
    """Where a saved directory is read: ``path``, but for the time between the two steps of a save."""
    return path / FINISHED if (path / FINISHED).is_dir() else path


def work_beside(out: Path) -> Path:
    """``OUT.work``, where what a long run has made so far is kept; ``out`` may be ``.``."""
    whole = out.resolve()
    return whole.parent / f"{whole.name}.work"


def write_directory(path: Path, kind: str, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Save a document and named arrays, bound by a digest, as ``{kind}.json`` and ``{kind}.safetensors``.

    Args:
        path: the directory. kind: format of the content. document: what JSON can hold.

    Raises:
        BundleError: as :func:`check_directory`.
    """
    tensors = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    body = {"format": kind, **document}
    text = json.dumps({**body, "digest": digest(body, [tensors])}, indent=1)
    with save_directory(path, f"{kind}.json") as new:
        (new / f"{kind}.safetensors").write_bytes(tensors)
        (new / f"{kind}.json").write_bytes(text.encode())


def read_saved(path: Path, index: str, read: Callable[[Path], T]) -> T:
    """What ``read`` makes of a saved directory: of the earlier save or the new one, whatever is saved there meanwhile.

    It is asked again where a save came between the files that it read, whether it failed or mixed the two.

    Args:
        path: the directory. index: as for :func:`save_directory`. read: takes the directory where the files are.

    Raises:
        What ``read`` raises of one save.
    """
    while True:
        version = _version(path, index)
        try:
            found = read(version[0])
        except Exception:
            if _version(path, index) == version:
                raise
        else:
            if _version(path, index) == version:
                return found


def read_directory(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what :func:`write_directory` wrote.

    Raises:
        BundleError: a file is missing, truncated, edited, or of another format.
    """
    return read_saved(path, f"{kind}.json", partial(_read, kind))


def _read(kind: str, path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    body = read_json(path / f"{kind}.json")
    if not isinstance(body, dict) or body.get("format") != kind:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise BundleError(f"expected format {kind!r} in {path / f'{kind}.json'}, got {found!r}")
    expected, tensors = body.pop("digest", None), read_bytes(path / f"{kind}.safetensors")
    expect_digest(path, expected, digest(body, [tensors]))
    return body, safetensors.numpy.load(tensors)


def _version(path: Path, index: str) -> tuple[Path, int, int]:
    """Where a save is read, and what tells it from the next: the file of its index, which takes its place last."""
    place = saved_at(path)
    try:
        found = (place / index).stat()
    except OSError:
        return place, 0, 0
    return place, found.st_ino, found.st_mtime_ns


def _take_turn(path: Path, aside: Path, locks: ExitStack) -> bool:
    """Wait for other saves into ``path``, and keep them out; whether it is there.

    Where it is not, they are made in the directory ``aside``, one after the other.
    """
    while True:
        there = path.exists()
        with suppress(FileNotFoundError), ExitStack() as turn:  # the save that was waited for has removed it
            if not there:
                aside.mkdir(exist_ok=True)
            turn.enter_context(alone_in(path if there else aside))
            if path.exists() == there:
                locks.push(turn.pop_all())
                return there


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
