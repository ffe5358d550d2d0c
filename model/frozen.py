"""Gradients with respect to scales, and none with respect to weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["frozen"]


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Gradients on, but for the parameters of ``model``, which are as before afterwards."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
