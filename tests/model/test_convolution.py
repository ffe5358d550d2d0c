"""The convolution with its own gradient equals the library's grouped convolution, is causal, goes on from a history,
and calls a fused kernel as that is defined."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.model.mambaformer.scan import causal_convolution, convolution
from bayes_dispatch.model.mambaformer.scan.convolution import causal_convolution_after


def tensors(seed: int, batch: int, length: int, channels: int, taps: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, length + taps - 1, channels), (channels, taps), (channels,)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    channels=st.integers(1, 5),
    taps=st.integers(1, 6),
)
def test_equals_the_library_in_value_and_gradient(seed: int, batch: int, length: int, channels: int, taps: int) -> None:
    padded, weight, bias = inputs = tensors(seed, batch, length, channels, taps)
    own = causal_convolution(*inputs)
    library = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=channels).transpose(1, 2)
    torch.testing.assert_close(own, library, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(own)
    for got, expected in zip(
        torch.autograd.grad(own, inputs, direction), torch.autograd.grad(library, inputs, direction), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(causal_convolution, tensors(0, 2, 5, 3, 4))


def test_it_is_causal() -> None:
    padded, weight, bias = tensors(1, 1, 8, 2, 4)
    changed = padded.detach().clone()
    changed[:, 3 + 5 :] += 1  # inputs from time 5 on
    before, after = (causal_convolution(p, weight, bias) for p in (padded, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 9), taps=st.integers(2, 5), empty=st.booleans())
def test_after_a_history_is_the_convolution_of_both(seed: int, length: int, taps: int, empty: bool) -> None:
    padded, weight, bias = (v.detach() for v in tensors(seed, 2, length, 3, taps))
    history, x = padded.split([taps - 1, length], dim=1)
    if empty:
        history.zero_()
    after = causal_convolution_after(None if empty else history, x, weight, bias)
    torch.testing.assert_close(after, causal_convolution(padded, weight, bias), rtol=1e-12, atol=1e-12)


def test_a_fused_kernel_is_called_as_causal_conv1d_defines_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight))

    calls: list[tuple[int, ...]] = []
    single = [v.detach().float() for v in tensors(0, 2, 6, 3, 4)]
    own = causal_convolution(*single)
    monkeypatch.setattr(convolution, "fused_convolution", lambda device: kernel)
    torch.testing.assert_close(causal_convolution(*single), own)
    causal_convolution(*tensors(0, 2, 6, 3, 4))  # no kernel knows float64,
    causal_convolution(*(v.float() for v in tensors(0, 2, 6, 3, 5)))  # or five taps
    assert calls == [(2, 3, 9)]
