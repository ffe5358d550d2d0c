"""The serving prior in one JSON file that is always whole: the old state or the new one, however its writer ends.

A digest, the format and the version are checked when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bayes_dispatch.dispatcher.prior.online import STATE_ARRAYS, PriorState
from bayes_dispatch.errors import BundleError
from bayes_dispatch.storage import digest, expect_digest, expecting, read_json, replace_file

__all__ = ["read_prior", "update_prior", "write_prior"]

FORMAT = "serving-prior"
VERSION = 1


def write_prior(path: str | Path, state: PriorState) -> None:
    """Put a state into a file, in the place of the one before.

    When this returns, the state survives a crash of process and machine. When it raises, or the process is killed, the
    file holds the old state or the new one; what a killed process leaves is a temporary file that the next write
    uses up. Writers in several processes take turns, and the last one's state stays.

    Args:
        path: the file; missing directories are made.
        state: what to keep.

    Raises:
        BundleError: ``path`` is no file, or one that cannot be replaced: of another owner, or in a directory that takes
            no new files.
        OSError: the disk is full, or refuses.
    """
    replace_file(Path(path), _as_bytes(state))


def update_prior(path: str | Path, start: PriorState, change: Callable[[PriorState], PriorState]) -> PriorState:
    """Read the file's state, change it and write it, as one step: no event of another thread or process is lost.

    Args:
        path: the file, begun where there is none.
        start: what to begin it with; its names are those that the file is to have.
        change: from the state before to the one after.

    Returns:
        The state after.

    Raises:
        BundleError, OSError: as :func:`read_prior` and :func:`write_prior`; the file is as before.
    """
    path, after = Path(path), start

    def changed() -> bytes:
        nonlocal after
        after = change(read_prior(path, start.names) if path.exists() else start)
        return _as_bytes(after)

    replace_file(path, changed)
    return after


def read_prior(path: str | Path, names: Sequence[str]) -> PriorState:
    """Read what :func:`write_prior` wrote.

    Args:
        path: the file.
        names: of the components that are served, base last.

    Returns:
        The state, bit for bit.

    Raises:
        BundleError: the file is missing, truncated, edited, of another format, or of other components.
    """
    path = Path(path)
    body = read_json(path)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise BundleError(f"expected format {FORMAT!r} in {path}, got {found!r}")
    expect_digest(path, body.pop("digest", None), digest(body))
    for key, wanted in (("version", VERSION), ("names", list(names))):
        if body.get(key) != wanted:
            raise BundleError(f"expected {key} {wanted!r} in {path}, got {body.get(key)!r}")
    with expecting(f"a serving prior in {path}"):
        arrays = {name: np.array(body[name], dtype=np.float64) for name in STATE_ARRAYS}
        return PriorState(**arrays, names=tuple(names), events=body["events"])


def _as_bytes(state: PriorState) -> bytes:
    body = {
        "format": FORMAT,
        "version": VERSION,
        "names": list(state.names),
        "events": state.events,
        **{name: getattr(state, name).tolist() for name in STATE_ARRAYS},
    }
    return json.dumps({**body, "digest": digest(body)}, indent=1).encode()
