"""What passes as a whole number, a number and a seed, and what is refused in one line."""

from collections.abc import Callable

import numpy as np
import pytest

from bayes_dispatch.arguments import real, seed, simplex, whole
from bayes_dispatch.errors import ConfigError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_numpy_numbers_are_numbers(value: object) -> None:
    for found in (whole("k", value, 1, 3), seed(value)):
        assert found == 3
        assert type(found) is int
    assert real("x", value) == 3.0
    assert type(real("x", np.float32(0.5))) is float


@pytest.mark.parametrize(
    "call",
    [lambda v: whole("k", v, 1, 3), seed],
)
@pytest.mark.parametrize("value", [-1, 1.5, 3.0, True, "3", None, np.nan, 2**70, 10**400])
def test_what_is_no_whole_number(call: Callable[[object], int], value: object) -> None:
    with pytest.raises(ConfigError, match=r"^expected (k|seed) to be a whole number .*, got "):
        call(value)


@pytest.mark.parametrize("value", [np.nan, np.inf, True, "1", None, -0.1, 0, 1.1, 10**400])
def test_what_is_no_number_within_bounds(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^expected x to be a finite number > 0 and ≤ 1, got "):
        real("x", value, 0, 1, above=True)


@pytest.mark.parametrize("value", [[10**400, 1], ["a"], [[0.5, 0.5], [1.0]], None])
def test_what_is_no_weights(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^expected w to be numbers, got [^\n]+$|^expected finite w, got"):
        simplex("w", value)
