"""Checks of plain arguments, made where they enter; every part of the project may use them.

NumPy's numbers count as Python's. A truth value is no number, and ``3.0`` is no whole number.
"""

import math
import operator

from bayes_dispatch.errors import ConfigError


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
        raise ConfigError(f"expected {name} to be a whole number {bounds}, got {value!r}")
    return found


def real(
    name: str, value: object, at_least: float | int = -math.inf, at_most: float | int = math.inf, *, above: bool = False
) -> float:
    """A finite number within bounds, as a ``float``; ``above``: the lower bound itself is outside.

    Raises:
        ConfigError: naming the argument, what was expected and what came.
    """
    try:
        found = math.nan if isinstance(value, (bool, str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found) or found > at_most or found < at_least or (above and found == at_least):
        low = "" if at_least == -math.inf else f" {'>' if above else '≥'} {at_least:g}"
        high = "" if at_most == math.inf else f"{' and' if low else ''} ≤ {at_most:g}"
        raise ConfigError(f"expected {name} to be a finite number{low}{high}, got {value!r}")
    return found


def seed(value: object, name: str = "seed") -> int:
    """A seed: a whole number from 0 to 2⁶³ − 1, which every generator in use takes.

    Raises:
        ConfigError: likewise.
    """
    return whole(name, value, 0, 2**63 - 1)
