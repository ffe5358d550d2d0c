"""Gradients with respect to scales, and none with respect to weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn

__all__ = ["frozen"]

_lock = Lock()
_held: WeakKeyDictionary[nn.Module, tuple[int, list[bool]]] = WeakKeyDictionary()  # by how many, and what was before


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Gradients on, but for the parameters of ``model``, which are as before once nobody holds them frozen."""
    if not isinstance(model, nn.Module):
        with torch.enable_grad():
            yield
        return
    parameters = list(model.parameters())
    with _lock:
        count, before = _held.get(model, (0, [parameter.requires_grad for parameter in parameters]))
        _held[model] = count + 1, before
        model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        with _lock:
            count, before = _held.pop(model)
            if count > 1:
                _held[model] = count - 1, before
            else:
                for parameter, required in zip(parameters, before, strict=True):
                    parameter.requires_grad_(required)
