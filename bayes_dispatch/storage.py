"""A directory of one JSON document and one safetensors file that refuses to load when either was touched.

Both are written under temporary names and renamed when they are whole and on the disk; a digest over both binds them.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from bayes_dispatch.errors import BundleError

__all__ = ["read_directory", "sync", "write_directory"]


def write_directory(path: Path, kind: str, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``{kind}.json`` and ``{kind}.safetensors`` into ``path``, making the directory where needed.

    Args:
        path: the directory.
        kind: format of the content, and stem of both files.
        document: what JSON can hold.
        arrays: named arrays.

    Raises:
        BundleError: ``path`` is a file.
    """
    if path.exists() and not path.is_dir():
        raise BundleError(f"expected a directory at {path}, got a file")
    path.mkdir(parents=True, exist_ok=True)
    tensors = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    body = {"format": kind, **document}
    text = json.dumps({**body, "digest": _digest(body, tensors)}, indent=1)
    contents = {f"{kind}.safetensors": tensors, f"{kind}.json": text.encode()}
    temporary = {name: path / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            temporary[name].write_bytes(content)
            sync(temporary[name])
        for name, file in temporary.items():
            os.replace(file, path / name)
        sync(path)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def read_directory(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what :func:`write_directory` wrote.

    Raises:
        BundleError: a file is missing, truncated, edited, or of another format.
    """
    contents = {}
    for name in (f"{kind}.json", f"{kind}.safetensors"):
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise BundleError(f"expected a file {path / name}, got {error.strerror or error}") from None
    try:
        body = json.loads(contents[f"{kind}.json"])
    except ValueError:
        raise BundleError(f"expected JSON in {path / f'{kind}.json'}, got something else (truncated?)") from None
    if not isinstance(body, dict) or body.get("format") != kind:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise BundleError(f"expected format {kind!r} in {path / f'{kind}.json'}, got {found!r}")
    expected, tensors = body.pop("digest", None), contents[f"{kind}.safetensors"]
    got = _digest(body, tensors)
    if got != expected:
        raise BundleError(
            f"expected digest {str(expected)[:12]}… of the files in {path}, got {got[:12]}… (edited or truncated)"
        )
    return body, load(tensors)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(body: Mapping[str, Any], tensors: bytes) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode() + b"\0" + tensors).hexdigest()
