"""Reading prompts with evidence functions: each gives one named view, all of them one piece of evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Shaped

from bayes_dispatch.arguments import SLACK, shown
from bayes_dispatch.dispatcher.arrays import as_numbers
from bayes_dispatch.dispatcher.evidence.evidence import LENGTHS, Evidence
from bayes_dispatch.errors import ConfigError, EvidenceError, PromptError

__all__ = ["COUNTS", "PROBABILITIES", "VECTORS", "EvidenceFunction", "checked_prompts", "kinds", "read", "table"]

COUNTS = "counts"  # non-negative counts whose sum says how much was counted
VECTORS = "vectors"  # any finite numbers
PROBABILITIES = "probabilities"  # rows on the simplex
KINDS = (COUNTS, VECTORS, PROBABILITIES)


@runtime_checkable
class EvidenceFunction(Protocol):
    """A view of prompts."""

    @property
    def name(self) -> str:
        """The view's name."""

    @property
    def kind(self) -> str:
        """``"counts"``, ``"vectors"`` or ``"probabilities"``: what the generative model takes the numbers for."""

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt width"]:
        """``(N, width)``, a row for each prompt that depends on that prompt alone; NaN rows where it is undefined."""


def read(
    functions: Sequence[EvidenceFunction],
    prompts: Sequence[str],
    lengths: Shaped[np.ndarray, " prompt"] | Sequence[int] | None = None,
) -> Evidence:
    """Read prompts with several functions; what a function raises is not caught.

    Args:
        functions: of different names.
        prompts: N texts.
        lengths: ``(N,)`` tokens of each prompt, 0 where unknown; ``None`` where unknown for all.

    Returns:
        A view by the name of each function. A view is missing for prompts whose row is NaN, and for those of which
        nothing was counted.

    Raises:
        ConfigError: no functions, one name twice, a name that is taken, or an unknown kind.
        PromptError: no prompts, or prompts that are no text.
        EvidenceError: values of another shape or range than the kind allows.
    """
    by_name = kinds(functions)
    texts = checked_prompts(prompts)
    views, missing = {}, {}
    for function in functions:
        values = table(function.name, function(texts), len(texts))
        absent = np.isnan(values).all(axis=1)
        if by_name[function.name] == COUNTS:
            absent |= values.sum(axis=1) == 0
        _check_kind(function.name, by_name[function.name], values[~absent])
        views[function.name] = values
        if absent.any():
            missing[function.name] = absent
    if lengths is not None and (unknown := np.asarray(lengths) == 0).any():
        missing[LENGTHS] = unknown
    return Evidence(views, None if lengths is None else np.asarray(lengths), missing)


def kinds(functions: Sequence[EvidenceFunction]) -> dict[str, str]:
    """The kind of each view by its name, in order.

    Raises:
        ConfigError: no functions, one without name or kind, one name twice, a name that is taken, or an unknown kind.
    """
    for each in functions:
        if not isinstance(each, EvidenceFunction):
            raise ConfigError(f"expected evidence functions that have a name and a kind, got {shown(each)}")
    names = [function.name for function in functions]
    if not names:
        raise ConfigError("expected at least one evidence function, got none")
    if len(set(names)) < len(names):
        raise ConfigError(f"expected evidence functions of different names, got {names}")
    for function in functions:
        if not function.name or function.name == LENGTHS:
            raise ConfigError(f"expected a name of a view other than {LENGTHS!r}, got {function.name!r}")
        if function.kind not in KINDS:
            raise ConfigError(f"expected view {function.name!r} of a kind of {', '.join(KINDS)}, got {function.kind!r}")
    return {function.name: function.kind for function in functions}


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        PromptError: no prompts, a single text, or prompts that are no text.
    """
    if isinstance(prompts, str | bytes):
        raise PromptError(f"expected a list of prompts, got a single {type(prompts).__name__}")
    texts = list(prompts)
    if not texts:
        raise PromptError("expected at least one prompt, got none")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"expected prompt {index} to be text, got {type(text).__name__}")
    return texts


def table(name: str, values: Any, rows: int) -> Float[np.ndarray, "prompt width"]:
    """What a function returned, as float64 ``(rows, width)``.

    Raises:
        EvidenceError: no numbers, or another shape.
    """
    array = as_numbers(values, repr(name), error=EvidenceError)
    if array.ndim != 2 or len(array) != rows or array.shape[1] == 0:
        raise EvidenceError(f"expected view {name!r} of shape ({rows}, width), got shape {array.shape}")
    return array


def _check_kind(name: str, kind: str, values: np.ndarray) -> None:
    """Refuse counts and probabilities out of range; ``Evidence`` itself refuses what is not finite."""
    if kind != VECTORS and (values < 0).any():
        raise EvidenceError(f"expected non-negative numbers in {name!r}, got {np.nanmin(values)}")
    sums = values.sum(axis=1)
    if kind == PROBABILITIES and (np.abs(sums - 1) > SLACK).any():
        raise EvidenceError(f"expected rows of {name!r} that sum to 1, got a sum of {sums[np.abs(sums - 1).argmax()]}")
