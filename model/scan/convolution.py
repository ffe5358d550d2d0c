"""The causal depthwise convolution of a Mamba block, with a gradient of its own.

Autograd over shifted products keeps and zero-fills a padded copy for each tap, and the library's grouped convolution is
as slow on a CPU; accumulating in place halves the time of a training step's convolutions.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["causal_convolution"]


def causal_convolution(
    padded: Float[Tensor, "B L C"], weight: Float[Tensor, "C taps"], bias: Float[Tensor, " C"]
) -> Float[Tensor, "B T C"]:
    """``y[t] = bias + Σ_k weight[:, k] * padded[t + k]`` for T = L − taps + 1 outputs."""
    return _CausalConvolution.apply(padded, weight, bias)


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        taps = weight.shape[1]
        length = padded.shape[1] - taps + 1
        y = torch.addcmul(bias, padded[:, :length], weight[:, 0])
        for k in range(1, taps):
            y.addcmul_(padded[:, k : k + length], weight[:, k])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        length = grad.shape[1]
        d_padded = torch.zeros_like(padded)
        d_weight = torch.empty_like(weight)
        for k in range(weight.shape[1]):
            d_padded[:, k : k + length].addcmul_(grad, weight[:, k])
            d_weight[:, k] = (grad * padded[:, k : k + length]).sum((0, 1))
        return d_padded, d_weight, grad.sum((0, 1))
