"""Fused kernels are used where they are installed, on a GPU, and able to do the work."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from bayes_dispatch.model.mambaformer.scan import fused as kernels
from bayes_dispatch.model.mambaformer.scan import selective, selective_scan, selective_scan_ref


def test_the_fused_kernel_is_used_where_it_can_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(*args: Any) -> Any:
        calls.append(args)
        return selective_scan_ref(*args)

    monkeypatch.setattr(selective, "fused_selective_scan", lambda device: kernel)
    draw = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 4, 9), "delta": (2, 4, 9), "A": (4, 3), "B": (2, 3, 9), "C": (2, 3, 9)}
    shapes |= {"D": (4,), "z": (2, 4, 9), "delta_bias": (4,)}
    inputs = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    state = torch.randn(2, 4, 3, generator=draw)
    expected = selective_scan_ref(**inputs, delta_softplus=True)
    assert torch.equal(selective_scan(**inputs, delta_softplus=True), expected)
    with torch.no_grad():
        y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    assert torch.equal(y, expected)
    assert last.shape == state.shape
    assert len(calls) == 2
    selective_scan(**inputs, initial_state=state)  # the kernel begins with zeros,
    selective_scan(**inputs, return_last_state=True)  # has no gradient of the last state,
    selective_scan(**{name: v.double() for name, v in inputs.items()})  # and no float64
    assert len(calls) == 2


def test_kernels_are_found_where_installed_and_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "mamba_ssm.ops.selective_scan_interface": ("selective_scan_fn", kernels.fused_selective_scan),
        "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined", kernels.fused_ssd_scan),
        "causal_conv1d": ("causal_conv1d_fn", kernels.fused_convolution),
    }
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._kernel.cache_clear()
    assert all(find(gpu) is None for _, find in names.values())
    monkeypatch.setattr(kernels, "find_spec", lambda name: ModuleSpec(name, None))
    installed = {path: (lambda: None) for path in names}
    for path, (name, _) in names.items():
        parts = path.split(".")
        for i in range(len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), ModuleType(parts[i]))
        monkeypatch.setattr(sys.modules[path], name, installed[path], raising=False)
    kernels._kernel.cache_clear()
    assert [find(gpu) for _, find in names.values()] == list(installed.values())
    assert all(find(cpu) is None for _, find in names.values())
    kernels._kernel.cache_clear()
