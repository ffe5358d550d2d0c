"""JSON, digests that tell what was truncated or edited, and what a file lacks, told in one line."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayes_dispatch.errors import BayesDispatchError, BundleError
from bayes_dispatch.storage.files import read_bytes, write_output

__all__ = ["digest", "expect_digest", "expecting", "finite", "parse_json", "read_json", "write_json"]


def write_json(path: Path, data: Any) -> None:
    """``write_output`` for JSON."""
    write_output(path, (json.dumps(data, indent=2) + "\n").encode())


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


def finite(value: Any) -> Any:
    """What JSON holds with ``None`` in the place of numbers that are NaN or infinite, of which it has none."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(document: Mapping[str, Any], parts: Iterable[bytes] = ()) -> str:
    """SHA-256 of what JSON holds and of further bytes, which may be made one part at a time."""
    found = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for part in parts:
        found.update(b"\0")
        found.update(part)
    return found.hexdigest()


def expect_digest(path: Path, expected: object, got: str) -> None:
    """Refuse what was edited or truncated."""
    if got != expected:
        raise BundleError(
            f"expected digest {str(expected)[:12]}… of {path}, got {got[:12]}…: it was edited or truncated"
        )


@contextmanager
def expecting(what: str) -> Iterator[None]:
    """Tell in one line what a file lacks: what is not as it was written raises whatever its use in the block does.

    Raises:
        BundleError: the block fails.
    """
    try:
        yield
    except (BayesDispatchError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise BundleError(f"expected {what}, got {reason}") from None
