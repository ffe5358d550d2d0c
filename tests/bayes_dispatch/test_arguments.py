"""What passes as a whole number, a number, a seed and weights, of Python and of NumPy, and what is refused in one
line."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bayes_dispatch.arguments import in_a_line, real, seed, several, shown, simplex, whole
from bayes_dispatch.errors import ConfigError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_numpy_numbers_are_numbers(value: object) -> None:
    for found in (whole("k", value, 1, 3), seed(value)):
        assert found == 3
        assert type(found) is int
    assert real("x", value) == 3.0
    assert type(real("x", np.float32(0.5))) is float


def test_numpy_values_are_shown_as_plain_ones() -> None:
    assert [shown(np.str_("x")), shown(np.float64(0.5)), shown("a\nb")] == ["'x'", "0.5", "'a\\nb'"]


def test_errors_of_libraries_are_cut_to_a_line() -> None:
    assert in_a_line(ValueError("a\n  b")) == "a b"
    assert in_a_line(ValueError("x" * 300)) == "x" * 198 + " …"
    assert in_a_line(ValueError("words " * 100)) == "words " * 33 + "…"


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


def test_sums_of_half_precision_may_miss_by_more() -> None:
    """Whose numbers they are: NumPy's as torch's."""
    for kind in (np.float16, np.float32):
        rough = np.array([0.334, 0.333, 0.334], dtype=kind)
        for value in (rough, torch.from_numpy(rough)):
            if kind == np.float16:
                assert simplex("w", value).shape == (3,)
            else:
                with pytest.raises(ConfigError, match=r"expected w that sum to 1, got a sum of 1\.001"):
                    simplex("w", value)


@pytest.mark.parametrize("value", ["ab", 3, None, (1, 2, 3), {1, 2}, np.zeros(3), np.array(1)])
def test_what_is_no_list_of_two(value: object) -> None:
    assert several("x", np.arange(2), 2) == [0, 1]
    with pytest.raises(ConfigError, match=r"^expected x to be a list of 2, got [^\n]+$"):
        several("x", value, 2)
