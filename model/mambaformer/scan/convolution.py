"""The causal depthwise convolution of a Mamba block, with a gradient of its own.

Autograd over shifted products keeps and zero-fills a padded copy for each tap, and the library's grouped convolution is
as slow on a CPU; accumulating in place halves the time of a training step's convolutions.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_dispatch.model.mambaformer.scan.fused import fused_convolution

__all__ = ["causal_convolution", "causal_convolution_after"]


def causal_convolution(
    padded: Float[Tensor, "B L C"], weight: Float[Tensor, "C taps"], bias: Float[Tensor, " C"]
) -> Float[Tensor, "B T C"]:
    """``y[t] = bias + Σ_k weight[:, k] * padded[t + k]`` for T = L − taps + 1 outputs."""
    kernel = fused_convolution(padded.device)
    lags = weight.shape[1] - 1
    if kernel is not None and lags < 4 and padded.dtype != torch.float64:  # all that the kernel knows
        return kernel(padded.mT.contiguous(), weight, bias).mT[:, lags:]
    return _CausalConvolution.apply(padded, weight, bias)


def causal_convolution_after(
    history: Float[Tensor, "B history C"] | None,
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C taps"],
    bias: Float[Tensor, " C"],
) -> Float[Tensor, "B T C"]:
    """``causal_convolution`` of ``x`` after ``history`` (zeros if ``None``) without a copy of both, and no gradient."""
    length, lags = x.shape[1], weight.shape[1] - 1
    by_lag = weight.t().contiguous().flip(0).unbind(0)
    y = torch.addcmul(bias, x, by_lag[0])
    for lag in range(1, lags + 1):
        if lag < length:
            y[:, lag:].addcmul_(x[:, :-lag], by_lag[lag])
        if history is not None:
            seen = min(lag, length)
            y[:, :seen].addcmul_(history[:, lags - lag : lags - lag + seen], by_lag[lag])
    return y


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        taps = weight.shape[1]
        length = padded.shape[1] - taps + 1
        by_tap = weight.t().contiguous()  # strided factors would slow every product
        y = torch.addcmul(bias, padded[:, :length], by_tap[0])
        for k in range(1, taps):
            y.addcmul_(padded[:, k : k + length], by_tap[k])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        length = grad.shape[1]
        d_padded = torch.zeros_like(padded)
        d_weight = torch.empty_like(weight)
        by_tap = weight.t().contiguous()
        for k in range(weight.shape[1]):
            d_padded[:, k : k + length].addcmul_(grad, by_tap[k])
            d_weight[:, k] = (grad * padded[:, k : k + length]).sum((0, 1))
        return d_padded, d_weight, grad.sum((0, 1))
