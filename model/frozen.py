"""Gradients with respect to scales, and none with respect to weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn

__all__ = ["frozen"]

_lock = Lock()
_held: WeakKeyDictionary[nn.Module, tuple[int, dict[nn.Parameter, bool]]] = WeakKeyDictionary()  # how often; as before


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Gradients on, but for the parameters of ``model``, which are as before once nobody holds them frozen."""
    if not isinstance(model, nn.Module):
        with torch.enable_grad():
            yield
        return
    with _lock:
        count, before = _held.get(model, (0, {}))
        _held[model] = count + 1, {parameter: parameter.requires_grad for parameter in model.parameters()} | before
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        with _lock:
            count, before = _held.pop(model)
            if count > 1:
                _held[model] = count - 1, before
            else:
                for parameter, required in before.items():
                    parameter.requires_grad_(required)
