"""The short causal convolution of a state-space block, continued from its cached inputs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.model.mambaformer.cache import MambaState
from bayes_dispatch.model.mambaformer.mixers.span import Span
from bayes_dispatch.model.mambaformer.scan.convolution import causal_convolution, causal_convolution_after

__all__ = ["continue_convolution"]


def continue_convolution(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C taps"],
    bias: Float[Tensor, " C"],
    span: Span,
    state: MambaState | None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B history C"] | None]:
    """Convolve each row with what came before it.

    Returns:
        The outputs, and the last taps − 1 real inputs of each row for ``state`` (``None`` without one).
    """
    length, history = x.shape[1], weight.shape[1] - 1
    plain = not torch.is_grad_enabled() and x.device.type == "cpu"
    if plain and span.tokens is None and length >= history:
        y = causal_convolution_after(None if state is None else state.conv.to(x.dtype), x, weight, bias)
        return y, None if state is None else x[:, length - history :]
    if state is None:
        return causal_convolution(F.pad(x, (0, 0, history, 0)), weight, bias), None
    padded = torch.cat([state.conv.to(x.dtype), x], dim=1)
    if span.tokens is None:
        last = padded[:, length:]
    else:  # the last inputs before each row's padding
        index = span.tokens[:, None] + torch.arange(history, device=x.device)
        last = padded.gather(1, index[..., None].expand(-1, -1, padded.shape[-1]))
    return causal_convolution(padded, weight, bias), last
