"""The chunked scan equals the recurrence, and both equal the dense matrix form, in value and gradient, at every
length and in parts. No decay underflows into NaN; less precision rounds only what it says."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.mambaformer.scan import ssd, ssd_chunks, ssd_scan, ssd_scan_ref, ssd_step
from bayes_dispatch.model.mambaformer.scan.ssd import ssd_step_
from tests.model.tensors import assert_equal

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def random_inputs(
    seed: int, *, batch: int, length: int, heads: int, groups: int, width: int, state: int, rate: float = 1.0
) -> dict[str, Tensor]:
    draw = np.random.default_rng(seed)
    inputs = {
        "x": draw.normal(size=(batch, length, heads, width)),
        "dt": draw.exponential(0.3, size=(batch, length, heads)),
        "A": -rate * draw.exponential(size=heads),
        "B": draw.normal(size=(batch, length, groups, state)),
        "C": draw.normal(size=(batch, length, groups, state)),
        "D": draw.normal(size=heads),
        "initial_state": draw.normal(size=(batch, heads, width, state)),
    }
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def dense(inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """y = M x with M[t, j] = (C_t · B_j) exp(Σ_{j<k≤t} dt_k A) dt_j, one head at a time; and the final state."""
    x, dt, A, B, C = (inputs[name].numpy() for name in NAMES[:5])
    skip = inputs["D"].numpy() if inputs.get("D") is not None else np.zeros(len(A))
    batch, length, heads, width = x.shape
    initial = inputs.get("initial_state")
    initial = np.zeros((batch, heads, width, B.shape[-1])) if initial is None else initial.numpy()
    y, final = np.empty_like(x), np.empty_like(initial)
    for b in range(batch):
        for h in range(heads):
            g = h * B.shape[2] // heads
            decay = dt[b, :, h] * A[h]
            M = np.zeros((length, length))
            for t in range(length):
                for j in range(t + 1):
                    M[t, j] = C[b, t, g] @ B[b, j, g] * np.exp(decay[j + 1 : t + 1].sum()) * dt[b, j, h]
            from_start = np.exp(np.cumsum(decay))
            carried = from_start[:, None] * (C[b, :, g] @ initial[b, h].T)
            y[b, :, h] = M @ x[b, :, h] + carried + skip[h] * x[b, :, h]
            to_end = np.array([np.exp(decay[j + 1 :].sum()) * dt[b, j, h] for j in range(length)])
            final[b, h] = from_start[-1] * initial[b, h] + (to_end[:, None] * x[b, :, h]).T @ B[b, :, g]
    return y, final


def value_and_gradients(scan: Any, inputs: dict[str, Tensor], chunk: int) -> list[Tensor]:
    """Output, final state, and the gradients of one random function of both."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y, final = scan(**leaves, chunk_size=chunk, return_final_state=True)
    weights = torch.Generator().manual_seed(0)
    total = sum((v * torch.randn(v.shape, generator=weights, dtype=torch.float64).to(v)).sum() for v in (y, final))
    return [y.detach(), final.detach(), *torch.autograd.grad(total, list(leaves.values()))]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "length": st.integers(1, 20),
            "groups": st.integers(1, 3),
            "width": st.integers(1, 4),
            "state": st.integers(1, 4),
        }
    ),
    per_group=st.integers(1, 3),
    chunk=st.integers(1, 12),
    optional=st.sets(st.sampled_from(["D", "initial_state"])),
)
@example(0, {"batch": 1, "length": 1, "groups": 1, "width": 2, "state": 2}, 2, 8, set())
@example(1, {"batch": 2, "length": 7, "groups": 2, "width": 2, "state": 2}, 2, 8, {"D", "initial_state"})
@example(2, {"batch": 2, "length": 8, "groups": 2, "width": 2, "state": 2}, 1, 8, {"initial_state"})
@example(3, {"batch": 2, "length": 9, "groups": 1, "width": 2, "state": 2}, 3, 8, {"D"})
def test_chunked_scan_is_the_recurrence_is_the_dense_form(
    seed: int, sizes: dict[str, int], per_group: int, chunk: int, optional: set[str]
) -> None:
    inputs = random_inputs(seed, **sizes, heads=sizes["groups"] * per_group)
    inputs = {name: v for name, v in inputs.items() if name in {*NAMES[:5], *optional}}
    fast, slow = (value_and_gradients(scan, inputs, chunk) for scan in (ssd_scan, ssd_scan_ref))
    assert_equal(fast, slow)
    assert_equal(fast[:2], [torch.from_numpy(v) for v in dense(inputs)])


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 5),
    length=st.integers(1, 30),
    chunk=st.integers(1, 8),
    tokens=st.integers(1, 40),
)
def test_the_size_of_pieces_changes_nothing(seed: int, batch: int, length: int, chunk: int, tokens: int) -> None:
    inputs = random_inputs(seed, batch=batch, length=length, heads=4, groups=2, width=2, state=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd_chunks, "PIECE", tokens)
        fast = value_and_gradients(ssd_scan, inputs, chunk)
    assert_equal(fast, value_and_gradients(ssd_scan_ref, inputs, chunk))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1000])
def test_lengths_around_the_chunk(length: int) -> None:
    inputs = random_inputs(length, batch=1, length=length, heads=4, groups=2, width=3, state=4)
    assert_equal(value_and_gradients(ssd_scan, inputs, 32), value_and_gradients(ssd_scan_ref, inputs, 32))


@pytest.mark.parametrize("rate", [800.0, 1e4])
def test_decay_that_underflows_is_zero_and_has_finite_gradients(rate: float) -> None:
    inputs = random_inputs(5, batch=2, length=40, heads=2, groups=1, width=2, state=3)
    inputs["dt"] = inputs["dt"].clamp(min=0.1) + 0.9
    inputs["A"] = torch.tensor([-rate, -1.0], dtype=torch.float64)
    inputs["x"][:, :, 1] = 0
    inputs["x"][:, 0, 1] = 1
    assert (-rate * inputs["dt"].min()).exp() < 1e-300  # the premise
    assert_equal(value_and_gradients(ssd_scan, inputs, 16), value_and_gradients(ssd_scan_ref, inputs, 16))


def forgetting(dtype: torch.dtype, step: float) -> dict[str, Tensor]:
    """Slow decay by logs of 1e-3, and a few steps that forget everything, whose logs add up to thousands."""
    inputs = random_inputs(6, batch=1, length=256, heads=2, groups=1, width=4, state=8)
    inputs["dt"] = inputs["dt"] / 100
    inputs["dt"][:, ::37] = step
    inputs["x"][:, ::37] /= step
    return {name: v.to(dtype) for name, v in inputs.items()}


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / (exact.abs().max() + 1e-20))


@pytest.mark.parametrize("step", [1e4, 1e9])
@pytest.mark.parametrize("chunk", [32, 256])
def test_large_sums_of_logs_lose_no_digits(chunk: int, step: float) -> None:
    double = forgetting(torch.float64, step)
    assert_equal(value_and_gradients(ssd_scan, double, chunk), value_and_gradients(ssd_scan_ref, double, chunk))
    single = forgetting(torch.float32, step)
    exact = value_and_gradients(ssd_scan_ref, {name: v.double() for name, v in single.items()}, chunk)
    for got, expected in zip(value_and_gradients(ssd_scan, single, chunk), exact, strict=True):
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("rate", [0.01, 1.0, 100.0])
def test_float32_is_close_to_float64(rate: float) -> None:
    inputs = random_inputs(6, batch=1, length=300, heads=2, groups=1, width=4, state=8, rate=rate)
    single = {name: v.float() for name, v in inputs.items()}
    exact = value_and_gradients(ssd_scan_ref, {name: v.double() for name, v in single.items()}, 32)
    for got, expected in zip(value_and_gradients(ssd_scan, single, 32), exact, strict=True):
        assert relative_error(got, expected) < 1e-6


def test_in_bfloat16_only_inputs_and_outputs_are_rounded() -> None:
    half = {
        n: v.bfloat16() for n, v in random_inputs(7, batch=1, length=100, heads=2, groups=1, width=4, state=8).items()
    }
    exact = ssd_scan_ref(**{name: v.double() for name, v in half.items()}, chunk_size=16)
    y, final = ssd_scan(**half, chunk_size=16, return_final_state=True)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(y, exact) < 2**-8  # half a unit in the last place


def test_autocast_leaves_the_scan_in_float32() -> None:
    inputs = random_inputs(7, batch=1, length=100, heads=2, groups=1, width=4, state=8)
    inputs = {name: v.float() for name, v in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = value_and_gradients(ssd_scan, inputs, 16)
    for got, expected in zip(mixed, value_and_gradients(ssd_scan, inputs, 16), strict=True):
        assert torch.equal(got, expected)


def test_a_gate_multiplies_the_output() -> None:
    inputs = random_inputs(7, batch=2, length=21, heads=2, groups=1, width=3, state=4)
    gate = torch.randn(inputs["x"].shape, dtype=torch.float64, requires_grad=True)
    expected = ssd_scan_ref(**inputs, chunk_size=8) * gate
    recorded = ssd_scan(**inputs, chunk_size=8, gate=gate)
    with torch.no_grad():
        plain = ssd_scan(**inputs, chunk_size=8, gate=gate)
        whole = ssd_scan(**inputs, chunk_size=7, gate=gate)
    assert_equal([recorded, plain, whole], [expected] * 3)
    assert_equal([*torch.autograd.grad(recorded.sum(), gate)], [expected / gate])


def test_two_scans_in_a_row_are_one() -> None:
    inputs = random_inputs(7, batch=2, length=50, heads=2, groups=2, width=3, state=4)
    whole, final = ssd_scan(**inputs, chunk_size=8, return_final_state=True)
    state, outputs = inputs["initial_state"], []
    for part in (slice(0, 13), slice(13, 14), slice(14, 50)):
        cut = {name: v[:, part] if name in ("x", "dt", "B", "C") else v for name, v in inputs.items()}
        y, state = ssd_scan(**cut | {"initial_state": state}, chunk_size=8, return_final_state=True)
        outputs.append(y)
    assert_equal([torch.cat(outputs, 1), state], [whole, final])


def test_steps_are_the_dense_form() -> None:
    inputs = random_inputs(8, batch=2, length=12, heads=4, groups=2, width=3, state=5)
    state, outputs = inputs["initial_state"], []
    for t in range(12):
        x, dt, B, C = (inputs[name][:, t] for name in ("x", "dt", "B", "C"))
        y, state = ssd_step(x, dt, inputs["A"], B, C, inputs["D"], state)
        outputs.append(y)
    assert_equal([torch.stack(outputs, 1), state], [torch.from_numpy(v) for v in dense(inputs)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_step_in_place_is_the_step(groups: int, dtype: torch.dtype) -> None:
    inputs = random_inputs(8, batch=3, length=1, heads=4, groups=groups, width=3, state=5)
    x, dt, B, C = (inputs[name][:, 0] for name in ("x", "dt", "B", "C"))
    state = inputs["initial_state"].to(dtype)
    y, after = ssd_step(x, dt, inputs["A"], B, C, inputs["D"], state.double())
    in_place = ssd_step_(x, dt, inputs["A"], B, C, inputs["D"], state)
    assert_equal([in_place], [y])
    assert torch.equal(state, after.to(dtype)) or dtype == torch.float64
    torch.testing.assert_close(state, after.to(dtype))


def test_a_step_of_size_zero_leaves_the_state() -> None:
    inputs = random_inputs(9, batch=2, length=20, heads=2, groups=1, width=3, state=4)
    inputs["dt"][:, 11:] = 0
    cut = {name: v[:, :11] if name in ("x", "dt", "B", "C") else v for name, v in inputs.items()}
    _, padded = ssd_scan(**inputs, chunk_size=8, return_final_state=True)
    _, short = ssd_scan(**cut, chunk_size=8, return_final_state=True)
    assert_equal([padded], [short])
    still = inputs | {"dt": torch.zeros_like(inputs["dt"])}
    _, final = ssd_scan(**still, chunk_size=8, return_final_state=True)
    assert torch.equal(final, inputs["initial_state"])
    assert_equal(value_and_gradients(ssd_scan, inputs, 8), value_and_gradients(ssd_scan_ref, inputs, 8))


def test_a_fused_kernel_is_called_as_mamba_ssm_defines_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: None = None,
        dt_bias: None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
    ) -> Any:
        calls.append(chunk_size)
        return ssd_scan_ref(x, dt, A, B, C, chunk_size, D, initial_states, return_final_states)

    calls: list[int] = []
    inputs = random_inputs(10, batch=2, length=9, heads=2, groups=1, width=3, state=4)
    single = {name: v.float() for name, v in inputs.items()}
    gate = torch.randn(single["x"].shape)
    own = ssd_scan(**single, chunk_size=4, return_final_state=True, gate=gate)
    monkeypatch.setattr(ssd, "fused_ssd_scan", lambda device: kernel)
    fused = ssd_scan(**single, chunk_size=4, return_final_state=True, gate=gate)
    assert_equal([*fused], [*own], 1e-5)
    ssd_scan(**inputs, chunk_size=4)  # no kernel knows float64
    assert len(calls) == 1


@pytest.mark.parametrize("scan", [ssd_scan, ssd_scan_ref])
def test_groups_must_divide_heads(scan: Any) -> None:
    inputs = random_inputs(0, batch=1, length=3, heads=4, groups=3, width=2, state=2)
    with pytest.raises(TensorError, match="expected the groups of B to divide 4 heads, got 3 groups"):
        scan(**inputs, chunk_size=2)
