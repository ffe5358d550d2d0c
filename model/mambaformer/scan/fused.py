"""Fused CUDA kernels of the mamba_ssm and causal_conv1d packages, where they are installed.

Each function returns a kernel that runs on the given device, or ``None``; nothing is imported before it is asked for.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["fused_convolution", "fused_selective_scan", "fused_ssd_scan"]

Kernel = Callable[..., Any]


def fused_selective_scan(device: torch.device) -> Kernel | None:
    """``selective_scan_fn``: no initial state, no gradient through the last state, no float64."""
    return _kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn") if device.type == "cuda" else None


def fused_ssd_scan(device: torch.device) -> Kernel | None:
    """``mamba_chunk_scan_combined``."""
    return _kernel("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined") if device.type == "cuda" else None


def fused_convolution(device: torch.device) -> Kernel | None:
    """``causal_conv1d_fn``."""
    return _kernel("causal_conv1d", "causal_conv1d_fn") if device.type == "cuda" else None


@cache
def _kernel(module: str, name: str) -> Kernel | None:
    if find_spec(module.partition(".")[0]) is None:
        return None
    kernel: Kernel = getattr(import_module(module), name)
    return kernel
