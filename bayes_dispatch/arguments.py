"""Checks of plain arguments, made where they enter; every part of the project may use them.

NumPy's numbers count as Python's. A truth value is no number, and ``3.0`` is no whole number.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from bayes_dispatch.errors import ConfigError

MOST = 2**63 - 1  # that generators and ranges take
SLACK = 1e-4  # by which weights may miss a sum of 1, as rounded percentages do; of half precision, 100 times as much


def whole(name: str, value: object, at_least: int, at_most: int | None = None) -> int:
    """A whole number within bounds, as an ``int``.

    Raises:
        ConfigError: naming the argument, what was expected and what came.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or found < at_least or (at_most is not None and found > at_most):
        bounds = f"≥ {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ConfigError(f"expected {name} to be a whole number {bounds}, got {shown(value)}")
    return found


def real(
    name: str,
    value: object,
    at_least: float | int = -math.inf,
    at_most: float | int = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """A finite number within bounds, as a ``float``; ``above``, ``below``: the bound itself is outside.

    Raises:
        ConfigError: naming the argument, what was expected and what came.
    """
    found = number(value)
    outside = found > at_most or found < at_least or (above and found == at_least) or (below and found == at_most)
    if not math.isfinite(found) or outside:
        low = "" if at_least == -math.inf else f" {'>' if above else '≥'} {at_least:g}"
        high = "" if at_most == math.inf else f"{' and' if low else ''} {'<' if below else '≤'} {at_most:g}"
        raise ConfigError(f"expected {name} to be a finite number{low}{high}, got {shown(value)}")
    return found


def fraction(name: str, value: object) -> float:
    """A number between 0 and 1, and neither of them, as a ``float``.

    Raises:
        ConfigError: naming what was expected and what came.
    """
    if not 0 < (found := number(value)) < 1:
        raise ConfigError(f"expected {name} between 0 and 1, got {shown(value)}")
    return found


def number(value: object) -> float:
    """A number as a ``float``; NaN, which is within no bounds, for what is none."""
    try:
        return math.nan if isinstance(value, (bool, str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def off_torch(value: Any) -> Any:
    """A tensor as an array, whatever its device, gradients and precision; those of a list, too; all else as it came."""
    if isinstance(value, list | tuple):
        return [off_torch(each) for each in value] if any(hasattr(each, "detach") for each in value) else value
    if not hasattr(value, "detach"):
        return value
    tensor = value.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16


def truth(name: str, value: object) -> bool:
    """True or false, as a ``bool``: no number, and no text.

    Raises:
        ConfigError: likewise.
    """
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"expected {name} to be true or false, got {shown(value)}")
    return bool(value)


def several(name: str, value: object, count: int | None = None) -> list[Any]:
    """What a sequence or an array has, ``count`` things where that is given; a text is one thing, a set has no order.

    Raises:
        ConfigError: likewise.
    """
    found = None
    if not isinstance(value, (str, bytes, set, frozenset)):
        with suppress(TypeError):
            found = list(value)  # type: ignore[call-overload]
    if found is None or len(found) != (len(found) if count is None else count):
        raise ConfigError(f"expected {name} to be a list{'' if count is None else f' of {count}'}, got {shown(value)}")
    return found


def shown(value: object) -> str:
    """What came, in a line."""
    plain = value.item() if isinstance(value, np.generic) else value
    return f"{' '.join(repr(plain).split()):.80}"


def in_a_line(error: BaseException) -> str:
    """What an error of a library says, in a line of at most 200 characters; it ends with a word that is not long."""
    text = " ".join(str(error).split())
    words = text[:199].rpartition(" ")[0]
    return text if len(text) <= 200 else f"{words if len(words) > 100 else text[:198]} …"


def seed(value: object, name: str = "seed") -> int:
    """A seed: a whole number from 0 to 2⁶³ − 1, which every generator in use takes.

    Raises:
        ConfigError: likewise.
    """
    return whole(name, value, 0, MOST)


def set_whole(settings: object, **at_least: int) -> None:
    """Check fields of a frozen dataclass, and keep them as Python's whole numbers.

    Args:
        settings: whose they are; its ``seed``, if it has one, is checked, too. at_least: the fields, and their bounds.

    Raises:
        ConfigError: likewise.
    """
    for name, least in at_least.items():
        object.__setattr__(settings, name, whole(name, getattr(settings, name), least, MOST))
    if hasattr(settings, "seed"):
        object.__setattr__(settings, "seed", seed(settings.seed))


def in_order(name: str, given: Mapping[str, Any], components: Sequence[str]) -> list[Any]:
    """What was given by the name of a component, in the order of the components; who is not named has 0.

    Raises:
        ConfigError: a name of none of them.
    """
    if unknown := [each for each in given if each not in components]:
        raise ConfigError(f"expected {name} of {', '.join(components)}, got one of {shown(unknown[0])}")
    return [given.get(each, 0) for each in components]


def simplex(name: str, value: object) -> np.ndarray:
    """Weights along the last axis, at least 0 and of sum 1, as an array of doubles.

    Args:
        value: a tensor, an array, or nested sequences of numbers.

    Raises:
        ConfigError: likewise.
    """
    slack = SLACK * (100 if getattr(value, "itemsize", 4) < 4 else 1)
    try:
        found = np.asarray(off_torch(value), dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"expected {name} to be numbers, got {shown(value)}") from None
    if not np.isfinite(found).all():
        raise ConfigError(f"expected finite {name}, got NaN or infinite ones")
    if (found < 0).any():
        raise ConfigError(f"expected {name} of at least 0, got {found.min():.6g}")
    sums = np.atleast_1d(found).sum(-1)
    if (off := np.abs(sums - 1) > slack).any():
        raise ConfigError(f"expected {name} that sum to 1, got a sum of {sums[off].flat[0]:.6g}")
    return found
