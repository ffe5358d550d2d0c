"""The Mamba-2 mixer (arXiv 2405.21060): in-projection, causal convolution, SSD scan, gated normalisation."""

import math
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
from bayes_dispatch.model.mambaformer.normalisation import RMSNorm, inverse_rms
from bayes_dispatch.model.mambaformer.scan.ssd import ssd_scan, ssd_step_
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

__all__ = ["Mamba2Mixer"]

PIECE = 512  # tokens of all rows that are worked on at a time where no gradient is recorded


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
        self._widths = [self.d_inner, conv_width, self.n_heads]
        self._inputs = [self.d_inner, self.n_groups * self.d_state, self.n_groups * self.d_state]
        self.dt_bounds = config.dt_bounds
        biased = "mamba2" in config.biased
        self.in_proj = SVDLinear(config.d_model, sum(self._widths), biased)
        self.out_proj = SVDLinear(self.d_inner, config.d_model, biased)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, config.d_conv).uniform_(-1, 1) * config.d_conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(conv_width))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        step = torch.empty(self.n_heads).uniform_(-6.9, -2.3).exp()  # step sizes of .001 to .1, as published
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # inverse of softplus
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = RMSNorm(self.d_inner, config.norm_eps, config.norm_groups)

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
        scales: Mapping[str, Scales],
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens of each row with those before them; ``state`` is read and replaced in place."""
        batch, length, _ = x.shape
        recording = torch.is_grad_enabled()
        size = length if recording or scales else max(self.chunk_size, PIECE // batch)
        if can_compile(x, *(() if state is None else (state.conv, state.ssm))):
            state = state or self.init_state(batch, x.dtype)
            arrays, starts = self.arrays(), range(0, length, size)
            pieces = [
                self._mix_compiled(x[:, t : t + size], _part(span, t, size), scales, state, arrays) for t in starts
            ]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        if state is not None and length == 1 and not recording:
            return self._step(x, span, scales, state)
        after = state
        if size >= length:
            y, after = self._mix(x, span, scales, state)
        else:
            after = self.init_state(batch, x.dtype) if state is None else state
            pieces = []
            for start in range(0, length, size):
                piece, after = self._mix(x[:, start : start + size], _part(span, start, size), scales, after)
                pieces.append(piece)
            y = torch.cat(pieces, dim=1)
        if state is not None and after is not None:
            state.update(after.conv, after.ssm.contiguous())
        return y

    def _mix(
        self, x: Tensor, span: Span, scales: Mapping[str, Scales], state: MambaState | None
    ) -> tuple[Tensor, MambaState | None]:
        """The outputs, and the state after them where one was given."""
        batch, length, _ = x.shape
        gate, xBC, dt = self.in_proj(x, scales.get("in_proj")).split(self._widths, dim=-1)
        dt = self._step_sizes(dt)  # (B, T, H)
        mask = span.mask(length)
        if mask is not None:  # a step of size 0 leaves the state as it is
            dt = dt * mask[..., None]
        xBC, history = continue_convolution(xBC, self.conv_weight, self.conv_bias, span, state)
        alone = not torch.is_grad_enabled()
        xBC, gate = F.silu(xBC, inplace=alone), F.silu(gate, inplace=alone)
        xs, B, C = xBC.split(self._inputs, dim=-1)
        xs, gate = (v.reshape(batch, length, self.n_heads, self.head_dim) for v in (xs, gate))
        B, C = (v.reshape(batch, length, self.n_groups, self.d_state) for v in (B, C))
        initial = None if state is None else state.ssm
        A = -self.A_log.exp()
        scanned = ssd_scan(xs, dt, A, B, C, self.chunk_size, self.D, initial, return_final_state=True, gate=gate)
        y, final = cast("tuple[Tensor, Tensor]", scanned)
        y = self._project(y.flatten(2), scales)
        return y, None if history is None else MambaState(history, final)

    def _mix_compiled(
        self, x: Tensor, span: Span, scales: Mapping[str, Scales], state: MambaState, arrays: tuple[Array, ...]
    ) -> Tensor:
        """``_mix`` where ``can_compile``; the state is changed in place."""
        batch, length, _ = x.shape
        projected = array(self.in_proj(x, scales.get("in_proj")))
        y = np.empty((batch, length, self.d_inner), projected.dtype)
        tokens = token_counts(span.tokens, batch, length)
        kernels().mix_mamba2(projected, tokens, *state.arrays(), *arrays, *self.arguments(), y)
        return self.out_proj(torch.from_numpy(y), scales.get("out_proj"))

    def arrays(self) -> tuple[Array, ...]:
        """The weights between the products, as the compiled loop takes them: taps first, and A itself."""
        weights = self.conv_weight.t(), self.conv_bias, -self.A_log.exp(), self.dt_bias, self.D, self.norm.weight
        return tuple(array(weight) for weight in weights)

    def arguments(self) -> tuple[float, int, int, float, float]:
        """What else it is told: the normalisation's eps and groups, groups of B and C, bounds of step sizes."""
        return self.norm.eps, self.norm.groups, self.n_groups, *self.dt_bounds

    def _step_sizes(self, dt: Tensor) -> Tensor:
        dt = F.softplus(dt + self.dt_bias)
        return dt if self.dt_bounds == (0, math.inf) else dt.clamp(*self.dt_bounds)

    def _step(self, x: Tensor, span: Span, scales: Mapping[str, Scales], state: MambaState) -> Tensor:
        """``_mix`` of one token of each row, where no gradient is recorded: few operations, the state in place."""
        gate, xBC, dt = self.in_proj(x, scales.get("in_proj")).split(self._widths, dim=-1)
        dt = self._step_sizes(dt)  # (B, 1, H)
        window = torch.cat([state.conv.to(xBC.dtype), xBC], dim=1)  # (B, taps, C)
        if span.tokens is None:
            state.conv.copy_(window.narrow(1, 1, self.d_conv - 1))
        else:
            new = span.tokens.view(-1, 1, 1) > 0
            dt = dt * new
            state.conv.copy_(torch.where(new, window[:, 1:], window[:, :-1]))
        xBC = F.silu((window * self.conv_weight.t()).sum(1).add_(self.conv_bias), inplace=True)
        xs, B, C = xBC.split(self._inputs, dim=-1)
        xs = xs.view(-1, self.n_heads, self.head_dim)
        B, C = (v.view(-1, self.n_groups, self.d_state) for v in (B, C))
        y = ssd_step_(xs, dt.squeeze(1), -self.A_log.exp(), B, C, self.D, state.ssm)
        return self._project(y.view(gate.shape).mul_(F.silu(gate)), scales)

    def _project(self, y: Tensor, scales: Mapping[str, Scales]) -> Tensor:
        """Normalise and project; without gradients, ``y`` is overwritten, and the narrower result is normalised."""
        z = scales.get("out_proj")
        if torch.is_grad_enabled() or self.norm.groups > 1 or self.out_proj.bias is not None:
            return self.out_proj(self.norm(y), z)
        inverse = inverse_rms(y, self.norm.eps)
        return self.out_proj(y.mul_(self.norm.weight), z).mul_(inverse)


def _part(span: Span, start: int, size: int) -> Span:
    """The span of ``size`` tokens from ``start`` on."""
    return span if span.tokens is None else replace(span, tokens=(span.tokens - start).clamp(0, size))
