"""Sums of memory that tell whether it has changed, at the speed at which it can be read."""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from bayes_dispatch.loops import compile_with

__all__ = ["checksum"]

SMALL = 512  # bytes, of a tensor that is no longer divided

Array = Any  # numba infers what its functions take


def _bytes(typing_context: Any, address: Any) -> Any:
    """A pointer to bytes, from an address."""
    pointer = types.CPointer(types.uint8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64), generate


_bytes_at: Any = intrinsic(_bytes)
_array_of: Any = numba.carray  # type: ignore[attr-defined]


@compile_with()
def checksum(memory: Array, first: int, parts: int, sums: Array) -> None:
    """``sums[p, k]`` of part ``first + p`` of the memory at address ``memory[0, k]``, of ``memory[1, k]`` bytes.

    The memory at each address is divided into ``parts``, as equal as can be. Words are mixed with their place and
    summed, modulo 2⁶⁴. Mixing is one to one: another value of any one word is another sum. It keeps no pattern: doubled
    numbers or other signs, which change all words alike, do not cancel.
    """
    for k in range(memory.shape[1]):
        size = memory[1, k]
        own = _array_of(_bytes_at(memory[0, k]), size)
        words = own[: size // 8 * 8].view(np.uint64)
        rest = np.uint64(0)
        for i in range(size // 8 * 8, size):
            rest = rest << np.uint64(8) | np.uint64(own[i])
        for p in range(len(sums)):
            start, stop = 0, len(words)
            if size > SMALL:
                start, stop = (first + p) * len(words) // parts, (first + p + 1) * len(words) // parts
            piece, total = words[start:stop], rest
            for i in range(len(piece)):  # from 0: an index that may be negative takes ten times as long
                value = piece[i] ^ np.uint64(i) * np.uint64(0x9E3779B97F4A7C15)
                value = (value ^ value >> np.uint64(29)) * np.uint64(0xD6E8FEB86659FD93)
                total += value ^ value >> np.uint64(32)
            sums[p, k] = total
