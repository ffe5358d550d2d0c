"""The Mamba-2 mixer (arXiv 2405.21060): in-projection, causal convolution, SSD scan, gated normalisation."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.model.cache import MambaState
from bayes_dispatch.model.config import MambaFormerConfig
from bayes_dispatch.model.mixers.span import Span
from bayes_dispatch.model.scan import causal_convolution, ssd_scan, ssd_step
from bayes_dispatch.model.svd_linear import SVDLinear

__all__ = ["Mamba2Mixer"]


class Mamba2Mixer(nn.Module):
    """Mamba-2 (2405.21060): in-projection, causal convolution, SSD scan, gated normalisation, out-projection."""

    def __init__(self, config: MambaFormerConfig) -> None:
        super().__init__()
        self.d_inner = config.d_inner
        self.d_state = config.d_state
        self.head_dim = config.head_dim
        self.n_heads = config.d_inner // config.head_dim
        self.chunk_size = config.chunk_size
        self.d_conv = config.d_conv
        conv_width = self.d_inner + 2 * self.d_state
        self.in_proj = SVDLinear(config.d_model, self.d_inner + conv_width + self.n_heads)
        self.out_proj = SVDLinear(self.d_inner, config.d_model)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, config.d_conv).uniform_(-1, 1) * config.d_conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(conv_width))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        step = torch.empty(self.n_heads).uniform_(-6.9, -2.3).exp()  # step sizes of .001 to .1, as published
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # inverse of softplus
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)

    def init_state(self, batch_size: int, capacity: int) -> MambaState:
        """Zero state; its size does not depend on ``capacity``."""
        new = self.A_log.detach().new_zeros
        return MambaState(
            conv=new(batch_size, self.conv_weight.shape[0], self.d_conv - 1),
            ssm=new(batch_size, self.n_heads, self.head_dim, self.d_state),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        span: Span,
        scales: Mapping[str, Tensor],
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens of each row with those before them; ``state`` is read and replaced in place."""
        batch, length, _ = x.shape
        gate, xBC, dt = self.in_proj(x, scales.get("in_proj")).split(
            [self.d_inner, self.conv_weight.shape[0], self.n_heads], dim=-1
        )
        dt = F.softplus(dt + self.dt_bias)  # (B, T, H)
        mask = span.mask(length)
        if mask is not None:
            dt = dt * mask[..., None]
        xBC = F.silu(self._convolve(xBC, span, state))
        xs, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        xs = xs.reshape(batch, length, self.n_heads, self.head_dim)
        A = -self.A_log.exp()
        if state is not None and length == 1:
            step, final = ssd_step(xs[:, 0], dt[:, 0], A, B, C, self.D, state.ssm)
            y = step[:, None]
        else:
            initial = None if state is None else state.ssm
            scanned = ssd_scan(xs, dt, A, B[:, :, None], C[:, :, None], self.chunk_size, self.D, initial, True)
            y, final = cast("tuple[Tensor, Tensor]", scanned)
        if state is not None:
            state.ssm.copy_(final)
        y = self.norm(y.reshape(batch, length, self.d_inner) * F.silu(gate))
        return self.out_proj(y, scales.get("out_proj"))

    def _convolve(self, xBC: Tensor, span: Span, state: MambaState | None) -> Tensor:
        length, history = xBC.shape[1], self.d_conv - 1
        if state is None:
            padded = F.pad(xBC, (0, 0, history, 0))
        else:
            padded = torch.cat([state.conv.transpose(1, 2), xBC], dim=1)
            if span.tokens is None:
                last = padded[:, length:]
            else:  # the last inputs before each row's padding
                index = span.tokens[:, None] + torch.arange(history)
                last = padded.gather(1, index[..., None].expand(-1, -1, padded.shape[-1]))
            state.conv.copy_(last.transpose(1, 2))
        return causal_convolution(padded, self.conv_weight, self.conv_bias)
