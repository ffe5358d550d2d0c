"""The selective scan of Mamba, beside its sequential reference (arXiv 2312.00752, section 3).

Both compute, for each channel and each entry of its state, the recurrence

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t h_t + D u_t

Decays are multiplied, one step at a time; no cumulative logarithm is taken, so decay that underflows is an exact zero.
Signatures are those of ``mamba_ssm``. Shapes: batch b, channels d, length l, state n, groups g (g divides d).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.scan.kernels import fused_selective_scan

__all__ = ["selective_scan", "selective_scan_ref", "selective_step"]

Projection = Float[Tensor, "b n l"] | Float[Tensor, "b g n l"]
Scanned = Float[Tensor, "b d l"] | tuple[Float[Tensor, "b d l"], Float[Tensor, "b d n"]]


def selective_scan(
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d n"],
    B: Projection,
    C: Projection,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d l"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Float[Tensor, "b d n"] | None = None,
    chunk_size: int | None = None,
    lanes: int | None = None,
) -> Scanned:
    """The scan in chunks of time, in float32 at least; for a backward pass it keeps one state of each chunk.

    Views whose memory has time before channels (``(b, l, d)`` transposed, ``(b, n, d)`` for the state) are read fastest.

    Args:
        u: inputs. delta: step sizes; 0 leaves the state as it is. A: negative decay rates.
        B, C: input and output projections, shared by all channels or by each group of them.
        D: skip connection. z: the output is multiplied by ``silu(z)``.
        delta_bias: added to ``delta``. delta_softplus: then apply softplus.
        return_last_state: also return the state after the last token.
        initial_state: state before the first token; zeros if ``None``.
        chunk_size: tokens in a chunk. lanes: chunks that are scanned side by side, at the price of more
            multiplications. Any values give the same result; ``None`` for what suits sizes and device.

    Returns:
        y (b, d, l) in the dtype of ``u``, and, if asked for, the last state (b, d, n).

    Raises:
        TensorError: shapes that do not fit together.
    """
    groups = _check_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, delta, A, B, C = (v.to(dtype) for v in (u, delta, A, B, C))
    D, z, delta_bias, initial_state = (None if v is None else v.to(dtype) for v in (D, z, delta_bias, initial_state))
    with torch.autocast(u.device.type, enabled=False):
        kernel = fused_selective_scan(u.device) if dtype == torch.float32 and initial_state is None else None
        if kernel is not None and not (return_last_state and torch.is_grad_enabled()):
            out = kernel(x, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
            y, last = out if return_last_state else (out, None)
        else:
            if delta_bias is not None:
                delta = delta + delta_bias[:, None]
            if delta_softplus:
                delta = F.softplus(delta)
            y, last = _scan(x, delta, A, B, C, initial_state, groups, chunk_size, lanes)
            if D is not None:
                y = torch.addcmul(y, x, D[:, None])
            if z is not None:
                y = y * F.silu(z)
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y


def selective_step(
    u: Float[Tensor, "b 1 d"],
    delta: Float[Tensor, "b 1 d"],
    A: Float[Tensor, "n d"],
    B: Float[Tensor, "b 1 n"],
    C: Float[Tensor, "b 1 n"],
    D: Float[Tensor, " d"],
    state: Float[Tensor, "b n d"],
) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b n d"]]:
    """One token of the recurrence: its output and the next state, in the layout of a mixer, so that nothing is moved."""
    state = (delta * A).exp_() * state
    state.baddbmm_(B.mT, delta * u)
    return torch.addcmul(torch.bmm(C, state), u, D), state


def selective_scan_ref(
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d n"],
    B: Projection,
    C: Projection,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d l"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Float[Tensor, "b d n"] | None = None,
) -> Scanned:
    """``selective_scan`` as the recurrence is written, one token at a time, in the dtype of its inputs."""
    groups = _check_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    per_group = u.shape[1] // groups
    B, C = (v[:, None] if v.ndim == 3 else v for v in (B, C))  # (b, g, n, l)
    B, C = (v.repeat_interleave(per_group, dim=1) for v in (B, C))  # (b, d, n, l)
    state = u.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else initial_state
    outputs = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]  # (b, d, 1)
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        outputs.append((C[..., t] * state).sum(-1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_last_state else y


class _Plan(NamedTuple):
    """How time is cut: into segments of ``lanes`` chunks that are scanned side by side."""

    chunk: int
    lanes: int

    def segments(self, length: int) -> list[tuple[slice, int, int]]:
        """The tokens of each segment, its lanes and their steps; the last lane may have tokens to spare."""
        tokens = self.chunk * self.lanes
        segments = []
        for begin in range(0, length, tokens):
            size = min(tokens, length - begin)
            lanes = -(-size // self.chunk)
            segments.append((slice(begin, begin + size), lanes, self.chunk if lanes > 1 else size))
        return segments


def _plan(length: int, size: int, device: torch.device, chunk: int | None, lanes: int | None) -> _Plan:
    """Segments that fit a processor's cache, or a GPU's memory in few steps, for states of ``size`` numbers in all."""
    if device.type == "cpu":
        lanes = lanes or max(1, 2**13 // size)
        return _Plan(chunk or max(2, 2**17 // (size * lanes)), lanes)
    tokens = max(2**26 // size, 1)
    chunk = chunk or min(32, tokens)
    return _Plan(chunk, lanes or min(tokens // chunk, 32))


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    groups: int,
    chunk: int | None,
    lanes: int | None,
) -> tuple[Tensor, Tensor]:
    """``selective_scan`` without its trimmings: moves time to the front and channels to the back."""
    (batch, channels, length), n = u.shape, A.shape[1]
    rows, width = batch * groups, channels // groups  # each group of a row is a row of its own
    u, delta = (v.permute(2, 0, 1).reshape(length, rows, width) for v in (u, delta))
    A = A.t().reshape(n, groups, width).transpose(0, 1).expand(batch, groups, n, width).reshape(rows, n, width)
    B, C = (v.movedim(-1, 0).reshape(length, rows, n) for v in (B, C))
    if initial is None:
        initial = u.new_zeros(rows, n, width)
    else:
        initial = initial.mT.reshape(batch, n, groups, width).transpose(1, 2).reshape(rows, n, width)
    inputs = [v.contiguous() for v in (u, delta, A, B, C, initial)]
    plan = _plan(length, rows * n * width, u.device, chunk, lanes)
    if torch.is_grad_enabled() and any(v.requires_grad for v in inputs):
        y, last = _Scan.apply(*inputs, plan)
    else:
        y, last = _forward(*inputs, plan, None)
    last = last.reshape(batch, groups, n, width).transpose(1, 2).reshape(batch, n, channels).mT
    return y.reshape(length, batch, channels).permute(1, 2, 0), last


class _Scan(torch.autograd.Function):
    """Inputs u, Δ (l, m, p), A (m, n, p), B, C (l, m, n), initial state (m, n, p) for rows m and channels p."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.plan = inputs
        starts: list[Tensor] = []
        y, last = _forward(*tensors, ctx.plan, starts)
        ctx.save_for_backward(*tensors[:5], *starts)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(*ctx.saved_tensors[:5], ctx.saved_tensors[5:], dy.contiguous(), d_last, ctx.plan), None


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, plan: _Plan, starts: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state; ``starts`` takes the states before the lanes of each segment, (lanes, m, n, p)."""
    (length, rows, _), n = u.shape, A.shape[1]
    y = torch.empty_like(u)
    y_rows, C_rows = y.view(length * rows, 1, -1), C.view(length * rows, 1, n)
    delta, x, B = delta[:, :, None], (delta * u)[:, :, None], B[..., None]
    segments = plan.segments(length)
    decay_buffer, state_buffer = (A.new_empty(segments[0][1] * segments[0][2], *A.shape) for _ in range(2))
    for time, lanes, steps in segments:
        size, flat = time.stop - time.start, slice(time.start * rows, time.stop * rows)
        decays, states = decay_buffer[: lanes * steps], state_buffer[: lanes * steps]
        torch.mul(delta[time], A, out=decays[:size]).exp_()
        torch.mul(x[time], B[time], out=states[:size])
        decays[size:], states[size:] = 1, 0
        before = _recur_(decays, states, state, lanes)
        if starts is not None:
            starts.append(before)
        torch.bmm(C_rows[flat], states[:size].view(size * rows, n, -1), out=y_rows[flat])
        state = states[-1].clone()
    return y, state


def _backward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: tuple[Tensor, ...], dy: Tensor, d_state: Tensor, plan: _Plan
) -> tuple[Tensor, ...]:
    """Gradients of the inputs, and of the initial state; the states are computed again, segment by segment.

    With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}; that of Δ_t A is q_t = g_t a_t h_{t-1}.
    """
    (length, rows, _), n = u.shape, A.shape[1]
    x = delta * u
    dx, d_delta, dB, dC, dA = (torch.empty_like(v) for v in (u, u, B, C, A))
    dA.zero_()
    dy_rows, x_rows, dx_rows = (v.view(length * rows, 1, -1) for v in (dy, x, dx))
    B_rows, dB_rows, dC_rows = (v.view(length * rows, 1, n) for v in (B, dB, dC))
    steps4, x4, dy4 = (v[:, :, None] for v in (delta, x, dy))
    B4, C4 = B[..., None], C[..., None]
    segments = plan.segments(length)
    tokens = segments[0][1] * segments[0][2]
    decay_buffer, state_buffer, grad_buffer = (A.new_empty(tokens + 1, *A.shape) for _ in range(3))
    ones = A.new_ones(1, tokens)
    for (time, lanes, steps), start in zip(reversed(segments), reversed(starts), strict=True):
        size, flat, padded = time.stop - time.start, slice(time.start * rows, time.stop * rows), lanes * steps
        decays, states, grads = decay_buffer[: padded + 1], state_buffer[: padded + 1], grad_buffer[:padded]
        torch.mul(steps4[time], A, out=decays[:size]).exp_()
        torch.mul(x4[time], B4[time], out=states[1 : size + 1])
        torch.mul(dy4[time], C4[time], out=grads[:size])
        decays[size:], states[0], states[size + 1 :], grads[size:] = 1, start[0], 0, 0
        before = start
        for a, h in zip(*(v.view(lanes, steps, *A.shape).unbind(1) for v in (decays[:-1], states[1:])), strict=True):
            before = h.addcmul_(a, before)
        after = decays[1:] if lanes == 1 else decays[1:].clone()
        _recur_(after, grads, d_state, lanes, order=-1)
        decays, before, after, grads = decays[:size], states[:size], states[1 : size + 1], grads[:size]
        torch.bmm(dy_rows[flat], after.view(size * rows, n, -1).mT, out=dC_rows[flat])
        torch.bmm(x_rows[flat], grads.view(size * rows, n, -1).mT, out=dB_rows[flat])
        torch.bmm(B_rows[flat], grads.view(size * rows, n, -1), out=dx_rows[flat])
        d_state = grads.mul_(decays)[0].clone()
        q = grads.mul_(before)
        torch.sum(torch.mul(q, A, out=decays), 2, out=d_delta[time])
        dA.view(1, -1).addmm_(ones[:, :size], torch.mul(q, steps4[time], out=decays).view(size, -1))
    return dx * delta, d_delta.addcmul_(dx, u), dA, dB, dC, d_state


def _recur_(decays: Tensor, states: Tensor, start: Tensor, lanes: int, order: int = 1) -> Tensor:
    """Turn what is added to each state (t, m, n, p) into the states, forwards or (order −1) backwards in time.

    Decays are destroyed where there are several lanes. Returns the state before each lane, (lanes, m, n, p).
    """
    pairs = [v.view(lanes, -1, *start.shape).unbind(1)[::order] for v in (decays, states)]
    if lanes == 1:
        before = start[None]
        for a, h in zip(*pairs, strict=True):
            before = h.addcmul_(a, before)
        return start[None]
    decay, state = pairs[0][0], pairs[1][0]
    for a, h in zip(*(v[1:] for v in pairs), strict=True):
        state = h.addcmul_(a, state)  # as if the state before the lane were zero
        decay = a.mul_(decay)  # since the lane's beginning
    starts = torch.empty_like(state)
    for lane in range(lanes)[::order]:
        starts[lane] = start
        start = torch.addcmul(state[lane], decay[lane], start)
    for a, h in zip(*pairs, strict=True):
        h.addcmul_(a, starts)
    return starts


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> int:
    """The number of groups of B and C."""
    if u.ndim != 3 or A.ndim != 2 or not u.shape[2]:
        raise TensorError(f"expected u (b, d, l ≥ 1) and A (d, n), got {tuple(u.shape)} and {tuple(A.shape)}")
    (batch, channels, length), n = u.shape, A.shape[1]
    groups = B.shape[1] if B.ndim == 4 else 1
    if not groups or channels % groups:
        raise TensorError(f"expected the groups of B to divide {channels} channels, got {groups} groups")
    projection = (batch, groups, n, length)[:: 1] if B.ndim == 4 else (batch, n, length)
    for name, value, shape in (
        ("delta", delta, (batch, channels, length)),
        ("A", A, (channels, n)),
        ("B", B, projection),
        ("C", C, projection),
        ("D", D, (channels,)),
        ("z", z, (batch, channels, length)),
        ("delta_bias", delta_bias, (channels,)),
        ("initial_state", initial_state, (batch, channels, n)),
    ):
        if value is not None and value.shape != shape:
            raise TensorError(f"expected {name} of shape {shape}, got {tuple(value.shape)}")
    return groups
