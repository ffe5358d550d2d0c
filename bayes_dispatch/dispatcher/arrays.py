"""Arrays that users pass to the dispatcher, and to the statistics that judge it, checked once where they enter.

Each function takes anything array-like and its name, and returns an array of known dtype and shape or raises
:class:`TensorError`. What keeps arrays is :class:`Frozen`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from bayes_dispatch.arguments import SLACK, off_torch, shown
from bayes_dispatch.errors import BayesDispatchError, TensorError

__all__ = [
    "Frozen",
    "as_codes",
    "as_flags",
    "as_labels",
    "as_numbers",
    "as_points",
    "as_rows",
    "as_values",
    "distinct_rows",
    "on_simplex",
    "short_repr",
]


def as_numbers(
    values: Any, name: str, dtype: Any = np.float64, error: type[BayesDispatchError] = TensorError
) -> np.ndarray:
    """A copy of any shape, in float64; in a type of its own where ``dtype`` is ``None``."""
    try:
        values = off_torch(values)
        if getattr(getattr(values, "dtype", None), "kind", "") == "c":
            raise TypeError  # NumPy would drop a part of them
        return np.array(values, dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        raise error(f"expected numbers as {name}, got {type(values).__name__} that holds others") from None


def as_values(values: Any, name: str, count: int | None = None) -> Float[np.ndarray, " value"]:
    """At least one finite number, in float64; exactly ``count`` of them where that is given."""
    array = as_numbers(values, name)
    wanted = "(N,), N ≥ 1" if count is None else f"({count},)"
    if array.ndim != 1 or len(array) == 0 or len(array) != (len(array) if count is None else count):
        raise TensorError(f"expected {name} of shape {wanted}, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise TensorError(f"expected finite {name}, got {int((~np.isfinite(array)).sum())} that are NaN or infinite")
    return array


def as_points(values: Any, name: str) -> Float[np.ndarray, "row class"]:
    """At least one row on the simplex, in float64."""
    array = as_numbers(values, name)
    if array.ndim != 2 or 0 in array.shape:
        raise TensorError(f"expected {name} of shape (N, classes), N ≥ 1, got shape {array.shape}")
    if not (np.isfinite(array).all() and (array >= 0).all() and np.allclose(array.sum(1), 1, atol=SLACK)):
        raise TensorError(f"expected {name} on the simplex, got rows that are negative or do not sum to 1")
    return array


def as_labels(labels: Any, count: int | None, classes: int, least: int = 0) -> Int[np.ndarray, " row"]:
    """``count`` integers from ``least`` to ``classes`` − 1; at least one where ``count`` is ``None``."""
    array = as_numbers(labels, "labels", None)
    if count is None and array.size == 0:
        raise TensorError("expected at least 1 label, got none")
    count = array.size if count is None else count
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise TensorError(f"expected {count} integer labels, got {array.dtype} of shape {array.shape}")
    if count and (array.min() < least or array.max() >= classes):
        raise TensorError(f"expected labels from {least} to {classes - 1}, got {array.min()} to {array.max()}")
    return array.astype(np.int64)


def as_codes(labels: Any, count: int | None, names: Sequence[str], least: int = 0) -> Int[np.ndarray, " row"]:
    """Labels as the numbers of ``names``, or as these, and ``None`` or NaN where −1 may be."""
    array = as_numbers(labels, "labels", None)
    if any(isinstance(label, str) for label in array.flat):
        known: dict[str | None, int] = {name: code for code, name in enumerate(names)}
        if least < 0:
            known[None] = -1
        given = [None if isinstance(label, float) and np.isnan(label) else label for label in array.flat]
        if odd := [label for label in given if not isinstance(label, str | None) or label not in known]:
            raise TensorError(f"expected labels among {', '.join(names)}, got {shown(odd[0])}")
        array = np.array([known[label] for label in given]).reshape(array.shape)
    return as_labels(array, count, len(names), least)


def as_rows(indices: Any, count: int, error: type[BayesDispatchError] = TensorError) -> Int[np.ndarray, "..."]:
    """The rows of ``count`` that integers, a slice or a mask stand for, in that order."""
    if isinstance(indices, list | tuple):
        indices = as_numbers(indices, "indices", None if indices else int, error)
    try:
        return np.ascontiguousarray(np.arange(count)[indices])  # torch takes no array that runs backwards
    except IndexError as problem:
        raise error(f"expected indices of {count} prompts, got {problem}") from None


def as_flags(values: Any, name: str, count: int) -> Bool[np.ndarray, " row"]:
    """``count`` booleans; zeros and ones pass for them."""
    array = as_numbers(values, name, None)
    if array.shape != (count,) or not (array.dtype == bool or np.isin(array, (0, 1)).all()):
        raise TensorError(f"expected {count} booleans as {name}, got {array.dtype} of shape {array.shape}")
    return array.astype(bool)


def distinct_rows(*arrays: np.ndarray) -> Int[np.ndarray, " row"]:
    """``(N,)`` which of the distinct rows each row of all arrays is, numbered as they first appear.

    Held-out splits are of these: a copy of a row that was learnt from would judge too well.
    """
    place: dict[bytes, int] = {}
    whole = (b"".join(part.tobytes() for part in row) for row in zip(*arrays, strict=True))
    hashes = (hashlib.blake2b(row, digest_size=16).digest() for row in whole)
    return np.array([place.setdefault(each, len(place)) for each in hashes], dtype=int)


def on_simplex(values: Float[np.ndarray, "*some weight"]) -> Float[np.ndarray, "*some weight"]:
    """Values ≥ 0 divided by their sum."""
    return values / values.sum(-1, keepdims=True)


class Frozen:
    """Of dataclasses that no one changes: nor are their arrays to be written to, in a copy or another process either.

    They are frozen once all have been checked, by ``super().__post_init__()``, and again where one is unpickled.
    """

    def __post_init__(self) -> None:
        self.__setstate__(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        _freeze(state)
        vars(self).update(state)


def _freeze(values: Mapping[str, Any]) -> None:
    for value in values.values():
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
        elif isinstance(value, Mapping):
            _freeze(value)


def short_repr(self: Any) -> str:
    """A dataclass in a line, as its ``__repr__``: arrays of more than eight numbers are shown by their shape."""
    shown = (f"{field.name}={_shown(getattr(self, field.name))}" for field in fields(self))
    return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.size > 8:
        return f"{value.dtype}{value.shape}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (tuple, list)) and any(isinstance(each, np.ndarray) for each in value):
        return f"({', '.join(map(_shown, value))})"
    return " ".join(repr(value).split())
