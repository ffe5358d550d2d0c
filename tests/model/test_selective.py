"""The chunked selective scan equals the recurrence, and both equal the sum in closed form, in value and gradient, at
every length and in parts. Memory grows with chunks; wrong shapes are told."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.mambaformer.scan import selective_scan, selective_scan_ref, selective_step_
from tests.model.tensors import assert_equal

NEEDED = ("u", "delta", "A", "B", "C")
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def random_inputs(
    seed: int, *, batch: int, channels: int, length: int, state: int, groups: int | None = None, rate: float = 1.0
) -> dict[str, Tensor]:
    draw = np.random.default_rng(seed)
    projection = (batch, state, length) if groups is None else (batch, groups, state, length)
    inputs = {
        "u": draw.normal(size=(batch, channels, length)),
        "delta": draw.exponential(0.3, size=(batch, channels, length)),
        "A": -rate * draw.exponential(size=(channels, state)),
        "B": draw.normal(size=projection),
        "C": draw.normal(size=projection),
        "D": draw.normal(size=channels),
        "z": draw.normal(size=(batch, channels, length)),
        "delta_bias": draw.exponential(0.3, size=channels),
        "initial_state": draw.normal(size=(batch, channels, state)),
    }
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def closed_form(inputs: dict[str, Tensor], softplus: bool) -> list[Tensor]:
    """h_t = Π_{k≤t} a_k h_0 + Σ_{j≤t} Π_{j<k≤t} a_k Δ_j B_j u_j, each sum on its own, one channel at a time."""
    given = {name: value.numpy() for name, value in inputs.items()}
    u, delta, A, B, C = (given[name] for name in NEEDED)
    delta = delta + given.get("delta_bias", np.zeros(len(A)))[:, None]
    delta = np.log1p(np.exp(delta)) if softplus else delta
    batch, channels, length = u.shape
    B, C = (v[:, None] if v.ndim == 3 else v for v in (B, C))
    y, final = np.empty_like(u), np.empty((batch, *A.shape))
    for b in range(batch):
        for d in range(channels):
            g = d * B.shape[1] // channels
            for t in range(length):
                h = np.zeros(A.shape[1])
                if "initial_state" in given:
                    h = np.exp(delta[b, d, : t + 1].sum() * A[d]) * given["initial_state"][b, d]
                for j in range(t + 1):
                    h = (
                        h
                        + np.exp(delta[b, d, j + 1 : t + 1].sum() * A[d]) * delta[b, d, j] * B[b, g, :, j] * u[b, d, j]
                    )
                y[b, d, t] = C[b, g, :, t] @ h
            final[b, d] = h
    y = y + given["D"][:, None] * u if "D" in given else y
    y = y * given["z"] / (1 + np.exp(-given["z"])) if "z" in given else y
    return [torch.from_numpy(y), torch.from_numpy(final)]


def value_and_gradients(scan: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Output, last state, and the gradients of one random function of both."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y, last = scan(**leaves, **options, return_last_state=True)
    weights = torch.Generator().manual_seed(0)
    total = sum((v * torch.randn(v.shape, generator=weights, dtype=torch.float64).to(v)).sum() for v in (y, last))
    return [y.detach(), last.detach(), *torch.autograd.grad(total, list(leaves.values()))]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.fixed_dictionaries({"batch": st.integers(1, 2), "length": st.integers(1, 12), "state": st.integers(1, 4)}),
    groups=st.none() | st.integers(1, 3),
    per_group=st.integers(1, 3),
    chunk=st.none() | st.integers(1, 12),
    lanes=st.none() | st.integers(1, 5),
    optional=st.sets(st.sampled_from(OPTIONAL)),
    softplus=st.booleans(),
)
@example(0, {"batch": 1, "length": 1, "state": 2}, None, 2, 8, 1, set(), False)
@example(1, {"batch": 2, "length": 7, "state": 2}, 2, 2, 8, 1, set(OPTIONAL), True)
@example(4, {"batch": 2, "length": 19, "state": 2}, None, 3, 3, 4, set(OPTIONAL), True)
def test_chunked_scan_is_the_recurrence_is_the_closed_form(
    seed: int,
    sizes: dict[str, int],
    groups: int | None,
    per_group: int,
    chunk: int | None,
    lanes: int | None,
    optional: set[str],
    softplus: bool,
) -> None:
    inputs = random_inputs(seed, **sizes, groups=groups, channels=(groups or 1) * per_group)
    inputs = {name: v for name, v in inputs.items() if name in {*NEEDED, *optional}}
    fast = value_and_gradients(selective_scan, inputs, delta_softplus=softplus, chunk_size=chunk, lanes=lanes)
    assert_equal(fast, value_and_gradients(selective_scan_ref, inputs, delta_softplus=softplus))
    assert_equal(fast[:2], closed_form(inputs, softplus))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1000])
def test_lengths_around_the_chunk(length: int) -> None:
    inputs = random_inputs(length, batch=1, channels=4, length=length, state=3, groups=2)
    slow = value_and_gradients(selective_scan_ref, inputs)
    for chunk, lanes in ((32, None), (32, 1), (32, 3), (None, None), (None, 1)):
        assert_equal(value_and_gradients(selective_scan, inputs, chunk_size=chunk, lanes=lanes), slow)


@pytest.mark.parametrize("lanes", [1, 3])
def test_decay_that_underflows_is_zero_and_has_finite_gradients(lanes: int) -> None:
    inputs = random_inputs(5, batch=2, channels=3, length=40, state=3)
    inputs["A"][1:] = -800 / inputs["delta"].mean()
    decay = (inputs["delta"][..., None] * inputs["A"][:, None]).exp()
    assert (decay[:, 1:] == 0).any()  # the premise
    assert (decay[:, :1] > 0.1).any()
    fast = value_and_gradients(selective_scan, inputs, chunk_size=7, lanes=lanes)
    assert_equal(fast, value_and_gradients(selective_scan_ref, inputs))


def test_gradients_by_finite_differences() -> None:
    inputs = random_inputs(6, batch=1, channels=2, length=3, state=2)
    leaves = [inputs[name].requires_grad_() for name in (*NEEDED, *OPTIONAL)]

    def scan(*values: Tensor) -> Any:
        named = dict(zip((*NEEDED, *OPTIONAL), values, strict=True))
        return selective_scan(**named, delta_softplus=True, return_last_state=True, chunk_size=2)

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


@pytest.mark.parametrize("rate", [0.01, 1.0, 100.0])
def test_float32_is_close_to_float64(rate: float) -> None:
    inputs = random_inputs(7, batch=1, channels=4, length=300, state=8, rate=rate)
    exact = value_and_gradients(selective_scan_ref, inputs)
    single = value_and_gradients(selective_scan, {name: v.float() for name, v in inputs.items()})
    for got, expected in zip(single, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_rows_that_are_scanned_in_parts_are_those_alone() -> None:
    inputs = random_inputs(8, batch=5, channels=128, length=9, state=64)  # more states than are scanned together
    inputs = {name: v for name, v in inputs.items() if name in {*NEEDED, "initial_state"}}
    whole = value_and_gradients(selective_scan, inputs)
    for row in range(5):
        alone = {name: v if name == "A" else v[row : row + 1] for name, v in inputs.items()}
        y, last = selective_scan_ref(**alone, return_last_state=True)
        assert_equal([v[row : row + 1] for v in whole[:2]], [y, last])
    assert_equal(whole, value_and_gradients(selective_scan_ref, inputs))


def test_two_scans_in_a_row_are_one() -> None:
    inputs = random_inputs(9, batch=2, channels=3, length=50, state=4)
    whole, last = selective_scan(**inputs, return_last_state=True)
    state, outputs = inputs["initial_state"], []
    for part in (slice(0, 13), slice(13, 14), slice(14, 50)):
        cut = {name: v[..., part] if name in ("u", "delta", "B", "C", "z") else v for name, v in inputs.items()}
        y, state = selective_scan(**cut | {"initial_state": state}, return_last_state=True)
        outputs.append(y)
    assert_equal([torch.cat(outputs, -1), state], [whole, last])


def test_a_step_of_size_zero_leaves_the_state() -> None:
    inputs = random_inputs(10, batch=2, channels=3, length=20, state=4)
    del inputs["delta_bias"]
    inputs["delta"][..., 11:] = 0
    cut = {name: v[..., :11] if name in ("u", "delta", "B", "C", "z") else v for name, v in inputs.items()}
    _, padded = selective_scan(**inputs, return_last_state=True, chunk_size=4)
    _, short = selective_scan(**cut, return_last_state=True, chunk_size=4)
    assert_equal([padded], [short])


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.bfloat16])
def test_steps_in_place_are_the_scan(state_dtype: torch.dtype) -> None:
    inputs = random_inputs(11, batch=2, channels=3, length=12, state=5)
    del inputs["z"], inputs["delta_bias"]
    inputs["A"][0] = -1e4  # underflows
    state = inputs["initial_state"].mT.to(state_dtype, copy=True)
    inputs["initial_state"] = state.double().mT.clone()
    y, last = selective_scan(**inputs, return_last_state=True)
    outputs = []
    for t in range(12):
        u, delta, B, C = (inputs[name][..., t][:, None] for name in ("u", "delta", "B", "C"))
        outputs.append(selective_step_(u, delta, inputs["A"].mT, B, C, inputs["D"], state))
    if state_dtype == torch.float64:
        assert_equal([torch.cat(outputs, 1).mT, state.mT], [y, last])
    else:
        assert_equal([outputs[0].mT], [y[..., :1]])  # nothing is rounded before the first output
        assert_equal([state.double().mT], [last], 0.05)


def test_what_is_kept_for_the_backward_pass_grows_with_chunks_not_with_tokens() -> None:
    def kept(length: int, chunk: int) -> int:
        sizes: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            sizes[value.data_ptr()] = value.numel()
            return value

        inputs = random_inputs(12, batch=2, channels=8, length=length, state=16)
        inputs = {name: inputs[name].requires_grad_() for name in NEEDED}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            selective_scan(**inputs, chunk_size=chunk, lanes=1)
        return sum(sizes.values())

    token, states = 2 * (8 + 8 + 16 + 16), 2 * 8 * 16  # u, delta, B and C; one state, and as many decay rates
    for length, chunk, chunks in ((128, 16, 8), (256, 16, 16), (256, 8, 32), (33, 16, 3), (7, 16, 1)):
        assert kept(length, chunk) == length * token + states + chunks * states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scanned_in_single_precision(dtype: torch.dtype) -> None:
    half = {name: v.to(dtype) for name, v in random_inputs(13, batch=1, channels=4, length=64, state=4).items()}
    expected, last = selective_scan(**{name: v.float() for name, v in half.items()}, return_last_state=True)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, state = selective_scan(**half, return_last_state=True)
        assert torch.equal(y, expected.to(dtype))
        assert torch.equal(state, last)


def test_autocast_changes_neither_scan_nor_step() -> None:
    inputs = {name: v.float() for name, v in random_inputs(14, batch=2, channels=4, length=30, state=4).items()}
    expected = value_and_gradients(selective_scan, inputs)
    step = [inputs[n][..., 0][:, None] for n in ("u", "delta")] + [inputs["A"].mT]
    step += [inputs[n][..., 0][:, None] for n in ("B", "C")] + [inputs["D"]]
    states = [inputs["initial_state"].mT.clone() for _ in range(2)]
    alone = selective_step_(*step, states[0])
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass too
        assert_equal(value_and_gradients(selective_scan, inputs), expected, 0)
        step[3], step[4] = (v.bfloat16() for v in step[3:5])  # as a projection under autocast gives them
        cast = selective_step_(*step, states[1])
    assert cast.dtype == torch.float32
    assert_equal([cast, states[1]], [alone, states[0]], 0.02)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_else_changes(mode: Callable[[], Any]) -> None:
    inputs = random_inputs(15, batch=2, channels=4, length=30, state=4)
    expected = value_and_gradients(selective_scan, inputs)[:2]
    with mode():
        got = selective_scan(**inputs, return_last_state=True)
    assert_equal(list(got), expected)
    assert torch.equal(selective_scan(**inputs), got[0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_devices_agree_with_the_reference(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    inputs = random_inputs(16, batch=2, channels=16, length=100, state=16)
    expected = value_and_gradients(selective_scan_ref, inputs, delta_softplus=True)
    moved = {name: v.float().to(device) for name, v in inputs.items()}
    for names in ({*NEEDED, *OPTIONAL}, {*NEEDED, "D", "z", "delta_bias"}):
        chosen = {name: v for name, v in moved.items() if name in names}
        with torch.no_grad():
            y = selective_scan(**chosen, delta_softplus=True)
            reference = selective_scan_ref(**chosen, delta_softplus=True)
        torch.testing.assert_close(y, reference, rtol=1e-3, atol=1e-3)
    got = value_and_gradients(selective_scan, moved, delta_softplus=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("scan", [selective_scan, selective_scan_ref])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": (2, 3)}, r"expected u \(b, d, l\) and A \(d, n\), none empty, got \(2, 3\) and \(4, 3\)"),
        ({"u": (2, 4, 0)}, r"none empty, got \(2, 4, 0\)"),
        ({"delta": (2, 4, 6)}, r"expected delta of shape \(2, 4, 5\), got \(2, 4, 6\)"),
        ({"A": (5, 3)}, r"expected A of shape \(4, 3\), got \(5, 3\)"),
        ({"B": (2, 3, 3, 5)}, "expected the groups of B to divide 4 channels, got 3 groups"),
        ({"B": (2, 0, 3, 5)}, "expected the groups of B to divide 4 channels, got 0 groups"),
        ({"B": (2, 2, 5)}, r"expected B of shape \(2, 3, 5\), got \(2, 2, 5\)"),
        ({"C": (2, 1, 3, 5)}, r"expected C of shape \(2, 3, 5\), got \(2, 1, 3, 5\)"),
        ({"D": (1,)}, r"expected D of shape \(4,\), got \(1,\)"),
        ({"z": (1, 4, 5)}, r"expected z of shape \(2, 4, 5\), got \(1, 4, 5\)"),
        ({"delta_bias": (3,)}, r"expected delta_bias of shape \(4,\), got \(3,\)"),
        ({"initial_state": (2, 3, 4)}, r"expected initial_state of shape \(2, 4, 3\), got \(2, 3, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_told(scan: Any, changes: dict[str, tuple[int, ...]], message: str) -> None:
    inputs = random_inputs(0, batch=2, channels=4, length=5, state=3)
    with pytest.raises(TensorError, match=message):
        scan(**inputs | {name: torch.zeros(shape) for name, shape in changes.items()})
