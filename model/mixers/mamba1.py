"""The mixer of Mamba (arXiv 2312.00752, section 3.4): in-projection, causal convolution, selective scan, gate."""

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
from bayes_dispatch.model.scan.selective import selective_scan, selective_step
from bayes_dispatch.model.svd_linear import SVDLinear

__all__ = ["Mamba1Mixer"]


class Mamba1Mixer(nn.Module):
    """Mamba (2312.00752): in-projection, causal convolution, selective scan, gate, out-projection.

    The matrices of ``in_proj``, ``x_proj`` (step sizes, B and C), ``dt_proj`` and ``out_proj`` can be adapted. What has
    a number for each channel and each entry of its state has the channels last: ``A_log`` and the cached state.
    """

    def __init__(self, config: MambaFormerConfig) -> None:
        super().__init__()
        self.d_inner = config.d_inner
        self.d_state = config.d_state
        self.d_conv = config.d_conv
        self.step_rank = config.step_rank
        self.in_proj = SVDLinear(config.d_model, 2 * self.d_inner)
        self.x_proj = SVDLinear(self.d_inner, self.step_rank + 2 * self.d_state)
        self.dt_proj = SVDLinear(self.step_rank, self.d_inner)
        self.out_proj = SVDLinear(self.d_inner, config.d_model)
        nn.init.uniform_(self.dt_proj.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        self.conv_weight = nn.Parameter(torch.empty(self.d_inner, config.d_conv).uniform_(-1, 1) * config.d_conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(self.d_inner))
        decay = torch.arange(1.0, self.d_state + 1)[:, None].expand(-1, self.d_inner)
        self.A_log = nn.Parameter(decay.log())  # (N, d_inner)
        step = torch.empty(self.d_inner).uniform_(-6.9, -2.3).exp()  # step sizes of .001 to .1, as published
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # inverse of softplus
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def init_state(self, batch_size: int, dtype: torch.dtype) -> MambaState:
        """The zero state that every sequence begins with: conv (B, taps − 1, d_inner), ssm (B, N, d_inner)."""
        new = self.A_log.detach().new_zeros
        return MambaState(
            conv=new(batch_size, self.d_conv - 1, self.d_inner, dtype=dtype),
            ssm=new(batch_size, self.d_state, self.d_inner, dtype=dtype),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        span: Span,
        scales: Mapping[str, Tensor],
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens of each row with those before them; ``state`` is read and replaced in place."""
        length = x.shape[1]
        x, gate = self.in_proj(x, scales.get("in_proj")).chunk(2, dim=-1)
        if state is not None and length == 1 and span.tokens is None:
            window = torch.cat([state.conv, x], dim=1)
            history = window.narrow(1, 1, self.d_conv - 1)
            x = (window * self.conv_weight.t()).sum(1, keepdim=True).add_(self.conv_bias)
        else:
            x, history = continue_convolution(x, self.conv_weight, self.conv_bias, span, state)
        x = F.silu(x)
        projected = self.x_proj(x, scales.get("x_proj"))
        delta, B, C = projected.split_with_sizes([self.step_rank, self.d_state, self.d_state], dim=-1)
        delta = F.softplus(self.dt_proj(delta, scales.get("dt_proj")) + self.dt_bias)
        mask = span.mask(length)
        if mask is not None:  # a step of size 0 leaves the state as it is
            delta = delta * mask[..., None]
        A = self._rates()
        if state is not None and length == 1:
            y, final = selective_step(x, delta, A, B, C, self.D, state.ssm)
            y = y * F.silu(gate)
        else:
            channels_first = (v.mT for v in (x, delta, A, B, C))
            initial = None if state is None else state.ssm.mT
            scanned = selective_scan(
                *channels_first, self.D, gate.mT, return_last_state=state is not None, initial_state=initial
            )
            y, final = scanned if isinstance(scanned, tuple) else (scanned, x)
            y, final = y.mT, final.mT
        if state is not None and history is not None:
            state.update(history, final)
        return self.out_proj(y, scales.get("out_proj"))

    def _rates(self) -> Float[Tensor, "N d_inner"]:
        """A, kept for the next call where no gradient is recorded, until the weights change."""
        if torch.is_grad_enabled():
            return -self.A_log.exp()
        key = (self.A_log._version, self.A_log.data_ptr(), self.A_log.dtype, self.A_log.device)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, -self.A_log.exp())
        return self._kept[1]
