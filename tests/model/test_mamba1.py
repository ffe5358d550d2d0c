"""Mamba-1's mixer is the paper's recurrence, written with loops in numpy. Splits, padding and scales are exact,
gradients flow through the state, less precision is close, weights begin as published."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.model.mambaformer.cache import MambaState
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.mixers import Mamba1Mixer, Span, mamba1
from bayes_dispatch.model.mambaformer.scan import selective

WIDTH, LENGTH = 8, 11


def make_mixer(dtype: torch.dtype = torch.float64, **changes: int) -> Mamba1Mixer:
    """Random weights: no bias, decay or skip is at its initial value, and steps are long enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = Mamba1Mixer(MambaFormerConfig(**{"d_model": WIDTH, "d_state": 3, "head_dim": 16} | changes))
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                if not name.endswith("weight"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
            mixer.dt_bias.add_(3)
            mixer.x_proj.weight.mul_(3)
    return mixer.to(dtype)


def inputs(length: int = LENGTH, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextmanager
def gradients(recorded: bool) -> Iterator[None]:
    with torch.enable_grad() if recorded else torch.inference_mode():
        yield


def assert_equal(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def by_the_paper(mixer: Mamba1Mixer, x: np.ndarray, taps: int, rank: int) -> np.ndarray:
    def silu(v: np.ndarray) -> np.ndarray:
        return v / (1 + np.exp(-v))

    p = {name: value.detach().numpy() for name, value in mixer.named_parameters()}
    channels, n = len(p["D"]), len(p["A_log"])
    expected = np.empty_like(x)
    for b in range(len(x)):
        projected = [p["in_proj.weight"] @ v for v in x[b]]
        state = np.zeros((channels, n))
        for t in range(len(x[b])):
            u = p["conv_bias"].copy()
            for k in range(taps):
                if t - taps + 1 + k >= 0:
                    u += p["conv_weight"][:, k] * projected[t - taps + 1 + k][:channels]
            u = silu(u)
            low, B, C = np.split(p["x_proj.weight"] @ u, [rank, rank + n])
            step = np.log1p(np.exp(p["dt_proj.weight"] @ low + p["dt_bias"]))
            y = np.empty(channels)
            for d in range(channels):
                decay = np.exp(-step[d] * np.exp(p["A_log"][:, d]))
                state[d] = decay * state[d] + step[d] * B * u[d]
                y[d] = C @ state[d] + p["D"][d] * u[d]
            expected[b, t] = p["out_proj.weight"] @ (y * silu(projected[t][channels:]))
    return expected


@pytest.mark.parametrize(("taps", "rank"), [(2, 1), (4, 3)])
def test_it_is_the_papers_recurrence(taps: int, rank: int) -> None:
    mixer = make_mixer(d_conv=taps, dt_rank=rank)
    expected = by_the_paper(mixer, inputs().numpy(), taps, rank)
    np.testing.assert_allclose(mixer(inputs(), Span(), {}).detach().numpy(), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    taps=st.integers(2, 5),
    piece=st.sampled_from([1, 3, 256]),
    recorded=st.booleans(),
)
@example([1] * 6, 4, 256, False)
@example([7], 2, 3, False)
@example([2, 1, 4], 4, 256, True)
def test_any_split_through_the_cache_is_one_prefill(lengths: list[int], taps: int, piece: int, recorded: bool) -> None:
    mixer, x = make_mixer(d_conv=taps), inputs(sum(lengths))
    whole = mixer(x, Span(), {})
    with pytest.MonkeyPatch.context() as patch, gradients(recorded):
        patch.setattr(mamba1, "PIECE", piece)
        state = mixer.init_state(2, torch.float64)
        parts, read = [], 0
        for part in x.split(lengths, dim=1):
            parts.append(mixer(part, Span(before=read), {}, state))
            read += part.shape[1]
        assert_equal(torch.cat(parts, 1), whole)
        assert_equal(mixer(x, Span(), {}), whole)


def test_gradients_flow_through_the_cached_state() -> None:
    mixer, x = make_mixer(), inputs()
    weights = list(mixer.parameters())
    whole = torch.autograd.grad(mixer(x, Span(), {}).square().sum(), weights)
    state = mixer.init_state(2, torch.float64)
    split = torch.cat([mixer(part, Span(), {}, state) for part in x.split([4, 1, 6], dim=1)], 1)
    for got, expected in zip(torch.autograd.grad(split.square().sum(), weights), whole, strict=True):
        assert_equal(got, expected)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("piece", [2, 256])
def test_a_padded_row_is_that_row_alone(piece: int, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba1, "PIECE", piece)
    mixer = make_mixer()
    calls = [[5, 0, 11], [1, 1, 0], [0, 1, 1], [3, 2, 0]]  # new tokens of each row: a prefill, two steps, a prefill
    state, alone = mixer.init_state(3, torch.float64), [mixer.init_state(1, torch.float64) for _ in range(3)]
    with gradients(recorded):
        for seed, tokens in enumerate(calls):
            x = inputs(max(tokens), rows=3, seed=seed)
            y = mixer(x, Span(torch.tensor(tokens)), {}, state)
            for row, count in enumerate(tokens):
                if count:
                    expected = mixer(x[row : row + 1, :count], Span(), {}, alone[row])
                    assert_equal(y[row : row + 1, :count], expected)
                for name, value in alone[row].tensors().items():
                    assert_equal(state.tensors()[name][row : row + 1], value)


@pytest.mark.parametrize("cached", [True, False])
def test_gradients_of_a_padded_row_are_those_alone(cached: bool) -> None:
    mixer, tokens = make_mixer(), [4, 11, 1]
    x = inputs(rows=3)
    leaf = x.clone().requires_grad_()

    def loss(x: Tensor, span: Span) -> Tensor:
        state = mixer.init_state(len(x), torch.float64) if cached else None
        y = mixer(x, span, {}, state)
        mask = span.mask(x.shape[1])
        y = y if mask is None else y * mask[..., None]
        return y.square().sum() + (state.ssm.square().sum() + state.conv.square().sum() if state is not None else 0)

    loss(leaf, Span(torch.tensor(tokens))).backward()
    padded = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    mixer.zero_grad()
    for row, count in enumerate(tokens):
        single = x[row : row + 1, :count].clone().requires_grad_()
        loss(single, Span()).backward()
        assert_equal(leaf.grad[row : row + 1, :count], single.grad)
        assert not leaf.grad[row, count:].any()
    for name, p in mixer.named_parameters():
        assert_equal(padded[name], p.grad)


@pytest.mark.parametrize("lengths", [[6, 1, 1, 3], [11]])
def test_a_state_in_bfloat16_is_close(lengths: list[int]) -> None:
    mixer, x = make_mixer(), inputs()
    with torch.no_grad():
        whole = mixer(x, Span(), {})
        state = mixer.init_state(2, torch.bfloat16)
        got = torch.cat([mixer(part, Span(), {}, state) for part in x.split(lengths, dim=1)], 1)
    assert state.conv.dtype == state.ssm.dtype == torch.bfloat16
    assert_equal(got[:, : lengths[0]], whole[:, : lengths[0]])  # nothing was rounded yet
    assert_equal(got, whole, 0.02 * float(whole.abs().max()))


def test_a_state_more_precise_than_the_mixer_is_kept_so() -> None:
    mixer, x = make_mixer().bfloat16(), inputs().bfloat16()
    with torch.no_grad():
        once, stepped = (mixer.init_state(2, torch.float32) for _ in range(2))
        expected = mixer(x, Span(), {}, once)
        got = torch.cat([mixer(part, Span(), {}, stepped) for part in x.split(1, dim=1)], 1)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert_equal(stepped.ssm, once.ssm, 0.02 * float(once.ssm.abs().max()))


@pytest.mark.parametrize("matrix", ["in_proj", "x_proj", "dt_proj", "out_proj"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scales_adapt_each_matrix(matrix: str, per_row: bool) -> None:
    mixer, x = make_mixer(), inputs()
    linear = getattr(mixer, matrix)
    z = 1 + 0.5 * torch.randn(2, linear.rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        plain = mixer(x, Span(), {})
        got = mixer(x, Span(), {matrix: z if per_row else z[0]})
        stepped = torch.empty_like(got)
        state = mixer.init_state(2, torch.float64)
        for t in range(LENGTH):
            stepped[:, t : t + 1] = mixer(x[:, t : t + 1], Span(), {matrix: z if per_row else z[0]}, state)
        U, s, Vt, _ = linear.factors()
        for row in range(2):
            changed = make_mixer()
            getattr(changed, matrix).weight.copy_((U * (s * z[row if per_row else 0])) @ Vt)
            expected = changed(x[row : row + 1], Span(), {})
            assert_equal(got[row : row + 1], expected)
            assert_equal(stepped[row : row + 1], expected)
            assert (expected - plain[row : row + 1]).abs().max() > 1e-4


def test_autocast_scans_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = make_mixer(torch.float32), inputs().float()
    seen: list[torch.dtype] = []
    scan = selective.scan_chunks

    def spy(*args: Any) -> Any:
        seen.extend(v.dtype for v in args if isinstance(v, Tensor))
        return scan(*args)

    monkeypatch.setattr(selective, "scan_chunks", spy)
    whole = mixer(x, Span(), {}).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x, Span(), {})
        y.float().square().sum().backward()
        state = mixer.init_state(2, torch.float32)
        with torch.no_grad():
            stepped = torch.cat([mixer(x[:, t : t + 1], Span(), {}, state) for t in range(LENGTH)], 1)
    assert set(seen) == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    for got in (y.detach(), stepped):
        assert (got.float() - whole).abs().max() < 0.05 * whole.abs().max()


def test_weights_begin_as_published() -> None:
    mixer = Mamba1Mixer(MambaFormerConfig(d_model=WIDTH, d_state=3, head_dim=16))
    state = mixer.init_state(2, torch.bfloat16)
    assert_equal(mixer.A_log.exp(), torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 16), 1e-6)
    assert (mixer.D == 1).all()
    assert 0 < mixer.dt_proj.weight.abs().max() <= 1
    steps = F.softplus(mixer.dt_bias)
    assert ((steps > 0.0009) & (steps < 0.11)).all()
    assert {name: v.shape for name, v in state.tensors().items()} == {"conv": (2, 3, 16), "ssm": (2, 3, 16)}
    assert all(v.dtype == torch.bfloat16 and not v.any() for v in state.tensors().values())


def test_a_step_changes_the_state_in_place() -> None:
    mixer = make_mixer()
    state = mixer.init_state(2, torch.float64)
    before: Mapping[str, Tensor] = state.tensors()
    with torch.no_grad():
        mixer(inputs(1), Span(), {}, state)
        mixer(inputs(5), Span(), {}, state)
    assert isinstance(state, MambaState)
    assert all(state.tensors()[name] is value and value.any() for name, value in before.items())
