"""The serving prior in one JSON file that is always whole: the old state or the new one, however its writer ends.

The text goes to a temporary name in the same directory, reaches the disk, and only then takes the file's name. The
temporary file is the lock: who holds it may read, change and write, and all others wait. A digest, the format and the
version are checked when it is read; nothing is pickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bayes_dispatch.dispatcher.prior.online import PriorState
from bayes_dispatch.errors import BayesDispatchError, BundleError
from bayes_dispatch.storage import sync

__all__ = ["LOCK", "read_prior", "update_prior", "write_prior"]

FORMAT = "serving-prior"
VERSION = 1
ARRAYS = ("mean", "covariance", "initial")


LOCK = threading.RLock()  # held while a prior in memory is read, changed and put back, whichever dispatcher's it is


def write_prior(path: str | Path, state: PriorState, fingerprint: str) -> None:
    """Put a state into a file, in the place of the one before.

    When this returns, the state survives a crash of process and machine. When it raises, or the process is killed, the
    file holds the old state or the new one; what a killed process leaves is a temporary file that the next write
    reuses. Writers in several processes take turns, and the last one's state stays.

    Args:
        path: the file; missing directories are made.
        state: what to keep.
        fingerprint: names the dispatcher whose guide serves this prior.

    Raises:
        BundleError: ``path`` is a directory.
        OSError: the disk is full, or refuses.
    """
    _replace(path, lambda _: state, fingerprint)


def update_prior(
    path: str | Path, start: PriorState, fingerprint: str, change: Callable[[PriorState], PriorState]
) -> PriorState:
    """Read the file's state, change it and write it, as one step: no event of another thread or process is lost.

    Args:
        path: the file, begun where there is none.
        start: what to begin it with; its names are those that the file is to have.
        fingerprint: of the dispatcher.
        change: from the state before to the one after.

    Returns:
        The state after.

    Raises:
        BundleError, OSError: as :func:`read_prior` and :func:`write_prior`; the file is as before.
    """
    return _replace(
        path, lambda file: change(read_prior(file, start.names, fingerprint) if file.exists() else start), fingerprint
    )


def _replace(path: str | Path, make: Callable[[Path], PriorState], fingerprint: str) -> PriorState:
    path = Path(path).resolve()  # a link to a file stays a link
    if path.is_dir():
        raise BundleError(f"expected a file at {path}, got a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    handle = _open_alone(temporary)
    try:
        state = make(path)
        body = {
            "format": FORMAT,
            "version": VERSION,
            "dispatcher": fingerprint,
            "names": list(state.names),
            "events": state.events,
            **{name: getattr(state, name).tolist() for name in ARRAYS},
        }
        data = json.dumps({**body, "digest": _digest(body)}, indent=1).encode()
        os.ftruncate(handle, 0)
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(handle)
    sync(path.parent)
    return state


def read_prior(path: str | Path, names: Sequence[str], fingerprint: str) -> PriorState:
    """Read what :func:`write_prior` wrote.

    Args:
        path: the file.
        names: of the components that are served, base last.
        fingerprint: of the dispatcher that serves them.

    Returns:
        The state, bit for bit.

    Raises:
        BundleError: the file is missing, truncated, edited, of another format, or of other components or another
            dispatcher.
    """
    path = Path(path)
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"expected a file {path}, got {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise BundleError(f"expected JSON in {path}, got something else (truncated?)") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise BundleError(f"expected format {FORMAT!r} in {path}, got {found!r}")
    expected, got = body.pop("digest", None), _digest(body)
    if got != expected:
        raise BundleError(f"expected digest {str(expected)[:12]}… of {path}, got {got[:12]}… (edited)")
    for key, wanted in (("version", VERSION), ("dispatcher", fingerprint), ("names", list(names))):
        if body.get(key) != wanted:
            raise BundleError(f"expected {key} {wanted!r} in {path}, got {body.get(key)!r}")
    try:
        arrays = {name: np.array(body[name], dtype=np.float64) for name in ARRAYS}
        return PriorState(**arrays, names=tuple(names), events=body["events"])
    except (BayesDispatchError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise BundleError(f"expected a serving prior in {path}, got {reason}") from None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _open_alone(temporary: Path) -> int:
    """The temporary file, locked; where another writer gave it its final name meanwhile, a new one."""
    while True:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(temporary)):
                return handle
        os.close(handle)
