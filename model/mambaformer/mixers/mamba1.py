"""The mixer of Mamba (arXiv 2312.00752, section 3.4): in-projection, causal convolution, selective scan, gate."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.model.adaptation import Scales
from bayes_dispatch.model.mambaformer.cache import MambaState
from bayes_dispatch.model.mambaformer.compiled.switch import Array, array, can_compile, kernels, token_counts
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.mixers.convolution import continue_convolution
from bayes_dispatch.model.mambaformer.mixers.span import Span
from bayes_dispatch.model.mambaformer.scan import selective_scan, selective_step_
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

__all__ = ["Mamba1Mixer"]

PIECE = 256  # tokens of all rows that are worked on at a time where no gradient is recorded


class Mamba1Mixer(nn.Module):
    """Mamba (2312.00752): in-projection, causal convolution, selective scan, gate, out-projection.

    Step sizes, B and C come from ``x_proj``, and the step sizes go on through ``dt_proj``. What has a number for each
    channel and each entry of its state has the channels last, as the scan reads it: ``A_log`` and the cached state.
    """

    def __init__(self, config: MambaFormerConfig) -> None:
        super().__init__()
        self.d_inner = config.d_inner
        self.d_state = config.d_state
        self.d_conv = config.d_conv
        self._widths = [config.step_rank, config.d_state, config.d_state]
        biased = "mamba1" in config.biased
        self.in_proj = SVDLinear(config.d_model, 2 * self.d_inner, biased)
        self.x_proj = SVDLinear(self.d_inner, sum(self._widths))
        self.dt_proj = SVDLinear(config.step_rank, self.d_inner)
        self.out_proj = SVDLinear(self.d_inner, config.d_model, biased)
        nn.init.uniform_(self.dt_proj.weight, -(config.step_rank**-0.5), config.step_rank**-0.5)
        self.conv_weight = nn.Parameter(torch.empty(self.d_inner, config.d_conv).uniform_(-1, 1) * config.d_conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(self.d_inner))
        rates = torch.arange(1.0, self.d_state + 1)[:, None].repeat(1, self.d_inner)
        self.A_log = nn.Parameter(rates.log())  # (N, d_inner)
        step = torch.empty(self.d_inner).uniform_(-6.9, -2.3).exp()  # step sizes of .001 to .1, as published
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # inverse of softplus
        self.D = nn.Parameter(torch.ones(self.d_inner))

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
        scales: Mapping[str, Scales],
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens of each row with those before them; ``state`` is read and replaced in place."""
        projected = self.in_proj(x, scales.get("in_proj"))
        if can_compile(x, *(() if state is None else (state.conv, state.ssm))):
            state = state or self.init_state(x.shape[0], x.dtype)
            return self.out_proj(self._scan_compiled(projected, span, scales, state), scales.get("out_proj"))
        x, gate = projected.chunk(2, dim=-1)
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            y = self._step(x, gate, span, scales, state)
        else:
            y = self._scan(x, gate, span, scales, state)
        return self.out_proj(y, scales.get("out_proj"))

    def _scan_compiled(
        self, projected: Tensor, span: Span, scales: Mapping[str, Scales], state: MambaState
    ) -> Float[Tensor, "B T d_inner"]:
        """``_scan`` where ``can_compile``; the state is changed in place."""
        batch, length, _ = projected.shape
        taps, bias, A, D, dt_bias = self.arrays()
        history, final = state.arrays()
        tokens = token_counts(span.tokens, batch, length)
        inputs = array(projected)
        x = np.empty((batch, length, self.d_inner), inputs.dtype)
        kernels().convolve(inputs, tokens, history, taps, bias, x)
        selected = self.x_proj(torch.from_numpy(x), scales.get("x_proj"))
        steps = self.dt_proj(selected[..., : self._widths[0]], scales.get("dt_proj"))
        y = np.empty_like(x)
        kernels().scan_mamba1(x, array(steps), array(selected), inputs, tokens, A, D, dt_bias, final, y)
        return torch.from_numpy(y)

    def arrays(self) -> tuple[Array, ...]:
        """The weights between the products, as the compiled loops take them: taps first, and A itself."""
        weights = self.conv_weight.t(), self.conv_bias, -self.A_log.exp(), self.D, self.dt_bias
        return tuple(array(weight) for weight in weights)

    def _scan(
        self, x: Tensor, gate: Tensor, span: Span, scales: Mapping[str, Scales], state: MambaState | None
    ) -> Float[Tensor, "B T d_inner"]:
        batch, length, _ = x.shape
        size = length if torch.is_grad_enabled() else max(1, PIECE // batch)
        if size >= length:
            y, after = self._scan_piece(x, gate, span, scales, state)
        else:  # pieces whose intermediate results stay in a processor's cache
            after = self.init_state(batch, x.dtype) if state is None else state
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            for start in range(0, length, size):
                piece = slice(start, start + size)
                part = span if span.tokens is None else replace(span, tokens=(span.tokens - start).clamp(0, size))
                y[:, piece], after = self._scan_piece(x[:, piece], gate[:, piece], part, scales, after)
        if state is not None and after is not None:
            state.update(after.conv, after.ssm)
        return y

    def _scan_piece(
        self, x: Tensor, gate: Tensor, span: Span, scales: Mapping[str, Scales], state: MambaState | None
    ) -> tuple[Float[Tensor, "B T d_inner"], MambaState | None]:
        """The gated outputs, and the state after them where one was given."""
        x, history = continue_convolution(x, self.conv_weight, self.conv_bias, span, state)
        x = F.silu(x, inplace=True)
        delta, B, C = self._select(x, scales)
        mask = span.mask(x.shape[1])
        if mask is not None:  # a step of size 0 leaves the state as it is
            delta = delta * mask[..., None]
        A = -self.A_log.exp()
        channels_first = (x.mT, delta.mT, A.mT, B.mT, C.mT, self.D, gate.mT)
        if state is None or history is None:
            return cast(Tensor, selective_scan(*channels_first)).mT, None
        scanned = selective_scan(*channels_first, return_last_state=True, initial_state=state.ssm.mT)
        y, final = cast("tuple[Tensor, Tensor]", scanned)
        return y.mT, MambaState(history, final.mT)

    def _step(
        self, x: Tensor, gate: Tensor, span: Span, scales: Mapping[str, Scales], state: MambaState
    ) -> Float[Tensor, "B 1 d_inner"]:
        """One token of each row, where no gradient is recorded: few operations, and the state changes in place."""
        window = torch.cat([state.conv.to(x.dtype), x], dim=1)  # (B, taps, d_inner)
        x = (window * self.conv_weight.t()).sum(1, keepdim=True).add_(self.conv_bias)
        delta, B, C = self._select(F.silu(x, inplace=True), scales)
        history = window.narrow(1, 1, self.d_conv - 1)
        if span.tokens is not None:  # rows without a new token keep their state
            new = span.tokens[:, None, None] > 0
            delta = delta * new
            history = torch.where(new, history, state.conv)
        y = selective_step_(x, delta, -self.A_log.exp(), B, C, self.D, state.ssm)
        state.conv.copy_(history)
        return y.mul_(F.silu(gate))

    def _select(self, x: Tensor, scales: Mapping[str, Scales]) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (B, T, d_inner), and B and C (B, T, N), for the inputs of the scan."""
        projected = self.x_proj(x, scales.get("x_proj"))
        delta, B, C = projected.split_with_sizes(self._widths, dim=-1)
        return F.softplus(self.dt_proj(delta, scales.get("dt_proj")) + self.dt_bias), B, C
