"""The mixers are independent versions, written with loops in numpy from the papers' equations; a window ends where it
says."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.mixers import Mamba2Mixer, SelfAttention, Span

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]
ALL = Span()


def config(**changes: int | None) -> MambaFormerConfig:
    sizes: dict[str, int | None] = {
        "d_model": 16,
        "n_pairs": 1,
        "n_heads": 4,
        "d_state": 3,
        "head_dim": 8,
        "chunk_size": 4,
    }
    return MambaFormerConfig(**sizes | changes)  # type: ignore[arg-type]


def inputs(length: int = 11, seed: int = 0) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def silu(v: np.ndarray) -> np.ndarray:
    return v / (1 + np.exp(-v))


def softmax(v: np.ndarray) -> np.ndarray:
    e = np.exp(v - v.max())
    return e / e.sum()


@pytest.mark.parametrize("taps", [2, 4])
def test_mamba2_is_the_papers_recurrence(make_model: MakeModel, taps: int) -> None:
    c = config(d_conv=taps)
    mixer: Mamba2Mixer = make_model(c, dtype=torch.float64).blocks[0].mixer
    p = {name: value.detach().numpy() for name, value in mixer.named_parameters()}
    x = inputs().numpy()
    expected = np.empty_like(x)
    heads, width, n = mixer.n_heads, c.head_dim, c.d_state
    for b in range(2):
        projected = x[b] @ p["in_proj.weight"].T
        gate, xBC, dt = np.split(projected, [c.d_inner, 2 * c.d_inner + 2 * n], axis=1)
        dt = np.log1p(np.exp(dt + p["dt_bias"]))
        state = np.zeros((heads, width, n))
        for t in range(len(x[b])):
            mixed = p["conv_bias"].copy()
            for k in range(taps):
                if t - taps + 1 + k >= 0:
                    mixed += p["conv_weight"][:, k] * xBC[t - taps + 1 + k]
            u, B, C = np.split(silu(mixed), [c.d_inner, c.d_inner + n])
            u = u.reshape(heads, width)
            y = np.empty((heads, width))
            for h in range(heads):
                state[h] = np.exp(-dt[t, h] * np.exp(p["A_log"][h])) * state[h] + dt[t, h] * np.outer(u[h], B)
                y[h] = state[h] @ C + p["D"][h] * u[h]
            gated = y.reshape(-1) * silu(gate[t])
            normed = gated / np.sqrt(np.mean(gated**2) + 1e-5) * p["norm.weight"]
            expected[b, t] = p["out_proj.weight"] @ normed
    with torch.no_grad():
        np.testing.assert_allclose(mixer(inputs(), ALL, {}).numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_is_softmax_over_what_each_token_sees(
    make_model: MakeModel, kv_heads: int, window: int | None
) -> None:
    c = config(n_kv_heads=kv_heads, attention_window=window)
    mixer: SelfAttention = make_model(c, dtype=torch.float64).blocks[1].mixer
    x, width = inputs().numpy(), 4
    qkv, out = (m.weight.detach().numpy() for m in (mixer.qkv, mixer.out_proj))
    expected = np.empty_like(x)
    for b in range(2):
        q, k, v = np.split(x[b] @ qkv.T, [16, 16 + kv_heads * width], axis=1)
        for t in range(len(x[b])):
            first = 0 if window is None else max(0, t - window + 1)
            heads = []
            for h in range(4):
                own, shared = slice(h * width, (h + 1) * width), h * kv_heads // 4
                shared_slice = slice(shared * width, (shared + 1) * width)
                weights = softmax(k[first : t + 1, shared_slice] @ q[t, own] / np.sqrt(width))
                heads.append(weights @ v[first : t + 1, shared_slice])
            expected[b, t] = out @ np.concatenate(heads)
    with torch.no_grad():
        np.testing.assert_allclose(mixer(inputs(), ALL, {}).numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [2, 5])
def test_a_window_ends_where_it_says(make_model: MakeModel, window: int) -> None:
    mixer = make_model(config(attention_window=window), dtype=torch.float64).blocks[1].mixer
    t = 8
    with torch.no_grad():
        before = mixer(inputs(), ALL, {})[:, t]
        for back, seen in ((window - 1, True), (window, False)):
            changed = inputs()
            changed[:, t - back] += 1
            assert torch.allclose(mixer(changed, ALL, {})[:, t], before, rtol=0, atol=1e-12) != seen
