"""Reading and writing what we keep on disk: JSON and safetensors, written whole or not at all, and never executed.

What is written has reached the disk, contents and names, before it takes the place of what was there, and after that.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bayes_dispatch.errors import BundleError

__all__ = [
    "parse_tensors",
    "read_bytes",
    "read_json",
    "read_tensors",
    "tensors_as_bytes",
    "write_bytes",
    "write_directory",
    "write_files",
    "write_json",
    "write_tensors",
]


@contextmanager
def write_directory(path: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the place of ``path`` once the block ends without an error.

    A crash leaves the old one or the new one, but for the instant between two renames: then the old one is beside it,
    under a name that ends in ``-old``.

    Raises:
        BundleError: ``path`` is a file.
    """
    path = path.resolve()  # a link to a directory stays a link
    if path.exists() and not path.is_dir():
        raise BundleError(f"expected a directory at {path}, got a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for each in (*temporary.rglob("*"), temporary):
            sync(each)
        if path.is_dir():
            old = temporary.with_name(temporary.name + "-old")
            path.rename(old)
            try:
                temporary.rename(path)
            except BaseException:
                old.rename(path)
                raise
            sync(path.parent)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def write_files(directory: Path, names: Sequence[str]) -> Iterator[Path]:
    """A new directory to fill with files of these names, which take their places in ``directory`` after the block.

    Other files in ``directory`` stay, and all do if the block ends with an error.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        yield Path(temporary)
        directory.mkdir(exist_ok=True)
        for name in names:
            sync(Path(temporary, name))
            os.replace(Path(temporary, name), directory / name)
        sync(directory)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name, then rename it to ``path``; afterwards it survives a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tensors_as_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: the same bytes for the same content, where its own writer shuffles metadata."""
    data = safetensors.torch.save(dict(tensors), dict(metadata))
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """``write_bytes`` for safetensors."""
    write_bytes(path, tensors_as_bytes(tensors, metadata))


def write_json(path: Path, data: Any) -> None:
    """``write_bytes`` for JSON."""
    write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())


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
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"expected JSON in {path}, got: {error}") from None


def parse_tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file.

    Args:
        data: its bytes. path: where they are from, for the error.

    Raises:
        BundleError: the file is truncated or no safetensors file.
    """
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"expected a whole safetensors file {path}, got: {error}") from None
    return tensors, metadata


def read_tensors(
    path: Path, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        path: the file. expected: shape and dtype of each name that it must hold, and it may hold no others; ``None``
            for any.

    Raises:
        BundleError: the file is missing, truncated or no safetensors file, or holds other names, shapes or dtypes.
    """
    tensors, _ = parse_tensors(read_bytes(path), path)
    if expected is not None:
        if set(tensors) != set(expected):
            odd = sorted(set(tensors) ^ set(expected))
            raise BundleError(f"expected {len(expected)} tensors in {path}, got others or fewer: {', '.join(odd[:4])}")
        for name, (shape, dtype) in expected.items():
            got = tensors[name]
            if tuple(got.shape) != shape or got.dtype != dtype:
                raise BundleError(
                    f"expected {name} of shape {shape} and {dtype} in {path}, got {tuple(got.shape)} and {got.dtype}"
                )
    return tensors
