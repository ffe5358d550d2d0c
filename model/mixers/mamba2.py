"""The Mamba-2 mixer (arXiv 2405.21060): in-projection, causal convolution, SSD scan, gated normalisation."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.model.cache import MambaState
from bayes_dispatch.model.config import MambaFormerConfig
from bayes_dispatch.model.mixers.convolution import continue_convolution
from bayes_dispatch.model.mixers.span import Span
from bayes_dispatch.model.scan import ssd_scan, ssd_step
from bayes_dispatch.model.svd_linear import SVDLinear

__all__ = ["Mamba2Mixer"]


class Mamba2Mixer(nn.Module):
    """Mamba-2 (2405.21060): in-projection, causal convolution, SSD scan, gated normalisation, out-projection."""

    def __init__(self, config: MambaFormerConfig) -> None:
        super().__init__()
        self.d_inner = config.d_inner
        self.d_state = config.d_state
        self.n_groups = config.n_groups
        self.head_dim = config.head_dim
        self.n_heads = config.d_inner // config.head_dim
        self.chunk_size = config.chunk_size
        self.d_conv = config.d_conv
        conv_width = self.d_inner + 2 * self.n_groups * self.d_state
        self.in_proj = SVDLinear(config.d_model, self.d_inner + conv_width + self.n_heads)
        self.out_proj = SVDLinear(self.d_inner, config.d_model)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, config.d_conv).uniform_(-1, 1) * config.d_conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(conv_width))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        step = torch.empty(self.n_heads).uniform_(-6.9, -2.3).exp()  # step sizes of .001 to .1, as published
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # inverse of softplus
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)

    def init_state(self, batch_size: int, dtype: torch.dtype) -> MambaState:
        """The zero state that every sequence begins with."""
        new = self.A_log.detach().new_zeros
        return MambaState(
            conv=new(batch_size, self.d_conv - 1, self.conv_weight.shape[0], dtype=dtype),
            ssm=new(batch_size, self.n_heads, self.head_dim, self.d_state, dtype=dtype),
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
        xBC, history = continue_convolution(xBC, self.conv_weight, self.conv_bias, span, state)
        xBC = F.silu(xBC)
        xs, B, C = xBC.split([self.d_inner, self.n_groups * self.d_state, self.n_groups * self.d_state], dim=-1)
        xs = xs.reshape(batch, length, self.n_heads, self.head_dim)
        B, C = (v.reshape(batch, length, self.n_groups, self.d_state) for v in (B, C))
        A = -self.A_log.exp()
        initial = None if state is None else state.ssm.to(x.dtype)
        if initial is not None and length == 1:
            step, final = ssd_step(xs[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, initial)
            y = step[:, None]
        else:
            scanned = ssd_scan(xs, dt, A, B, C, self.chunk_size, self.D, initial, True)
            y, final = cast("tuple[Tensor, Tensor]", scanned)
        if state is not None and history is not None:
            state.update(history, final)
        y = self.norm(y.reshape(batch, length, self.d_inner) * F.silu(gate))
        return self.out_proj(y, scales.get("out_proj"))
