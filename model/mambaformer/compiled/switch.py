"""The one switch between compiled loops and tensor operations, and tensors as the arrays that the loops take."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from operator import is_not
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayes_dispatch.model.mambaformer.compiled.threads import prepare_threads

__all__ = ["Array", "Views", "array", "can_compile", "kernels", "tensors_only", "token_counts"]

Array = npt.NDArray[Any]

_only_tensors = ContextVar("only_tensors", default=False)


@cache
def kernels() -> ModuleType:
    """The module, imported when it is first needed."""
    module = import_module("bayes_dispatch.model.mambaformer.compiled.loops")
    prepare_threads()  # else the first loop does what this does, and all of it is seen
    return module


@contextmanager
def tensors_only() -> Iterator[None]:
    """Within this context, everything is computed by tensor operations: the reference of the compiled loops."""
    token = _only_tensors.set(True)
    try:
        yield
    finally:
        _only_tensors.reset(token)


def can_compile(x: Tensor, *states: Tensor) -> bool:
    """Whether the loops know what to do: no gradient, a CPU, and one dtype of float32 and float64 throughout."""
    dtype = x.dtype
    return (
        not torch.is_grad_enabled()
        and not _only_tensors.get()
        and (dtype == torch.float32 or dtype == torch.float64)
        and type(x) is Tensor  # and no tracer's stand-in
        and x.device.type == "cpu"
        and all(state.dtype == dtype for state in states)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def array(tensor: Tensor) -> Array:
    """The same memory as an array; a copy where the tensor is not contiguous."""
    values: Array = tensor.detach().contiguous().numpy()
    return values


def token_counts(tokens: Tensor | None, batch: int, length: int) -> Array:
    """New tokens of each row, (B,)."""
    return np.full(batch, length) if tokens is None else tokens.numpy()


class Views:
    """Arrays of the same memory as some contiguous tensors, for as long as these are the same objects."""

    def __init__(self) -> None:
        self._tensors: tuple[Tensor | None, ...] = ()
        self._arrays: tuple[Array, ...] = ()
        self._counted: list[Tensor] = []

    def __reduce__(self) -> tuple[type["Views"], tuple[()]]:
        return Views, ()  # of other tensors

    def of(self, first: Tensor, *others: Tensor | None) -> tuple[Array, ...]:
        """Arrays to write to; autograd is told, as by an operation in place. Of bfloat16 they are the bits.

        ``None`` is an array with as many rows and heads as the first, but no slots.
        """
        tensors = first, *others
        if len(tensors) != len(self._tensors) or any(map(is_not, tensors, self._tensors)):
            self._tensors = tensors
            nothing = first.new_empty(*first.shape[:2], 0, 1, dtype=torch.float32)  # whatever the default dtype is
            self._arrays = tuple(_raw(nothing if tensor is None else tensor) for tensor in tensors)
            self._counted = [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]
        if self._counted:
            torch.autograd.graph.increment_version(self._counted)
        return self._arrays


def _raw(tensor: Tensor) -> Array:
    values = tensor.detach()
    numbers: Array = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
    return numbers
