"""Compiling loops for the CPU with numba."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["compile_with"]

F = TypeVar("F", bound=Callable[..., Any])


def compile_with(*fast: str, parallel: bool = False) -> Callable[[F], F]:
    """Compile with these liberties in floating-point arithmetic, and keep the program on disk where that can be.

    Functions that call each other are best in one file: a program is made anew only when its own file changes.
    """

    def compile_function(function: F) -> F:
        function = inspect.unwrap(function)  # out of the checks that tests put around annotated functions
        options: Any = {"nogil": True, "error_model": "numpy", "fastmath": set(fast), "parallel": parallel}
        try:
            return cast(F, numba.njit(cache=True, **options)(function))
        except RuntimeError:  # no directory that can be written to
            return cast(F, numba.njit(**options)(function))

    return compile_function
