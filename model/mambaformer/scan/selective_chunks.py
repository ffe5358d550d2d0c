"""The chunked selective scan, with a gradient of its own, on tensors with time first and channels last.

What is computed for a token are rows of contiguous channels, so that a step of the recurrence is one fused product and
sum over all states. Shapes: length l, rows m (the groups of all sequences), state n, channels p.

On a CPU, decays below about 1e-28 in float32 (1e-230 in float64) count as that: they are lost in rounding all the same,
while numbers that underflow, and what is made of them, take a processor tens of times as long. Matrix products are
written to given tensors, which autocast leaves alone.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["DECAY_FLOOR", "scan_chunks"]

# The least logarithm of a decay: a product with a few other numbers stays far from underflow.
DECAY_FLOOR = {dtype: 0.75 * math.log(torch.finfo(dtype).tiny) for dtype in (torch.float32, torch.float64)}


def scan_chunks(
    u: Float[Tensor, "l m p"],
    delta: Float[Tensor, "l m p"],
    A: Float[Tensor, "m n p"],
    B: Float[Tensor, "l m n"],
    C: Float[Tensor, "l m n"],
    initial: Float[Tensor, "m n p"],
    chunk: int | None,
    lanes: int | None,
) -> tuple[Float[Tensor, "l m p"], Float[Tensor, "m n p"]]:
    """Outputs without skip connection, and the last state; see ``selective_scan`` for ``chunk`` and ``lanes``."""
    rows = len(A)
    saving = torch.is_grad_enabled() and any(v.requires_grad for v in (u, delta, A, B, C, initial))
    plan = _plan(delta, A, saving, chunk, lanes)
    part = plan.rows
    ys, lasts = [], []
    by_time = (v.split(part, dim=1) for v in (u, delta, B, C))
    for u_k, delta_k, B_k, C_k, A_k, state_k in zip(*by_time, A.split(part), initial.split(part), strict=True):
        inputs = _Inputs(*(v.contiguous() for v in (u_k, delta_k, A_k, B_k, C_k)))
        state = state_k.contiguous()
        y, last = _Scan.apply(*inputs, state, plan) if saving else _forward(inputs, state, plan, None)
        ys.append(y)
        lasts.append(last)
    return (ys[0], lasts[0]) if part >= rows else (torch.cat(ys, dim=1), torch.cat(lasts))


class _Inputs(NamedTuple):
    """u and Δ (l, m, p), A (m, n, p), B and C (l, m, n), all contiguous."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


class _Plan(NamedTuple):
    """How the work is cut: rows scanned together; segments of time, of ``lanes`` chunks with ``steps`` tokens each.

    ``floor`` is the least logarithm of a decay, ``None`` where none is too low.
    """

    rows: int
    lanes: int
    steps: int
    floor: float | None


def _plan(delta: Tensor, A: Tensor, saving: bool, chunk: int | None, lanes: int | None) -> _Plan:
    """Pieces that fit a CPU's cache or fill a GPU, in even segments."""
    length, rows, _ = delta.shape
    size, floor = A[0].numel(), None
    if delta.device.type == "cpu":  # a backward pass works on more tensors, and needs a state of each chunk to be kept
        rows = min(rows, max(1, (2**14 if saving else 2**15) * torch.get_num_threads() // size))
        size *= rows
        lanes = lanes or (16 if size <= 2**10 else 1)  # several where a step is mostly overhead
        chunk = chunk or (max(8, 2**16 // (lanes * size)) if saving else max(2, 2**17 // (lanes * size)))
        lowest = delta.detach().amax() * A.detach().amin()
        floor = DECAY_FLOOR[A.dtype] if lowest < DECAY_FLOOR[A.dtype] else None
    else:
        lanes = lanes or max(1, min(32, 2**20 // (rows * size)))
        chunk = chunk or 32
    segments = -(-length // (lanes * chunk))
    return _Plan(rows, lanes, -(-length // (segments * lanes)), floor)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, state, ctx.plan = args
        starts: list[Tensor] = []
        y, last = _forward(_Inputs(*tensors), state, ctx.plan, starts)
        ctx.save_for_backward(*tensors, *starts)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing gives them once
        return *_backward(_Inputs(*saved[:5]), saved[5:], dy.contiguous(), d_last, ctx.plan), None


def _forward(inputs: _Inputs, state: Tensor, plan: _Plan, starts: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Outputs and the last state; ``starts`` takes the states before the lanes of each segment, (lanes, m, n, p)."""
    u, delta, A, B, C = inputs
    (rows, n, width), tokens = A.shape, plan.lanes * plan.steps
    y = torch.empty_like(u)
    decays, states = A.new_empty(2, tokens, rows, n, width)
    pairs = _pairs(decays, states, plan.lanes)
    flat_states = states.view(tokens * rows, n, width)
    by_time = [v.split(tokens) for v in (delta[:, :, None], (delta * u)[:, :, None], B[..., None])]
    flat = [v.view(-1, 1, v.shape[-1]).split(tokens * rows) for v in (C, y)]
    for delta_k, x_k, B_k, C_k, y_k in zip(*by_time, *flat, strict=True):
        size = len(delta_k)
        _decay_(decays[:size], delta_k, A, plan.floor)
        torch.mul(x_k, B_k, out=states[:size])
        if size < tokens:  # the last segment has tokens to spare, which change nothing
            decays[size:], states[size:] = 1, 0
        before = _recur_(pairs, state)
        if starts is not None:
            starts.append(before)
        torch.bmm(C_k, flat_states[: size * rows], out=y_k)
        state = states[-1].clone()
    return y, state


def _backward(
    inputs: _Inputs, starts: tuple[Tensor, ...], dy: Tensor, d_state: Tensor, plan: _Plan
) -> tuple[Tensor, ...]:
    """Gradients of the inputs, and of the initial state; the states are computed again, segment by segment.

    With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}; that of Δ_t A is q_t = g_t a_t h_{t-1}.
    """
    u, delta, A, B, C = inputs
    (rows, n, width), tokens = A.shape, plan.lanes * plan.steps
    x = delta * u
    dx, d_delta, dB, dC, dA = (torch.empty_like(v) for v in (u, u, B, C, A))
    dA.zero_()
    decays, states = A.new_empty(2, tokens + 1, rows, n, width)
    grads = A.new_zeros(tokens, rows, n, width)
    decays.fill_(1)  # beyond the last token nothing decays and nothing is added
    after = decays[1:] if plan.lanes == 1 else torch.empty_like(grads)
    forwards = _pairs(decays[:-1], states[1:], plan.lanes)
    backwards = _pairs(after, grads, plan.lanes)[::-1]
    flat_states, flat_grads = (v.view(tokens * rows, n, width) for v in (states[1:], grads))
    ones = A.new_ones(1, tokens)
    by_time = [v[:, :, None].split(tokens) for v in (delta, x, dy)] + [v[..., None].split(tokens) for v in (B, C)]
    flat = [v.view(-1, 1, v.shape[-1]).split(tokens * rows) for v in (dy, x, dx, B, dB, dC)]
    pieces = list(zip(starts, d_delta.split(tokens), *by_time, *flat, strict=True))
    for start, d_delta_k, delta_k, x_k, dy_k, B_k, C_k, dy_row, x_row, dx_row, B_row, dB_row, dC_row in pieces[::-1]:
        size = len(delta_k)
        a, g = decays[:size], grads[:size]
        _decay_(a, delta_k, A, plan.floor)
        torch.mul(x_k, B_k, out=states[1 : size + 1])
        torch.mul(dy_k, C_k, out=g)
        states[0] = start[0]
        before = start
        for decay, state in forwards:
            before = state.addcmul_(decay, before)
        if plan.lanes > 1:
            after.copy_(decays[1:])
        _recur_(backwards, d_state, order=-1)
        torch.bmm(dy_row, flat_states[: size * rows].mT, out=dC_row)
        torch.bmm(x_row, flat_grads[: size * rows].mT, out=dB_row)
        torch.bmm(B_row, flat_grads[: size * rows], out=dx_row)
        d_state = g.mul_(a)[0].clone()
        q = g.mul_(states[:size])
        torch.sum(torch.mul(q, A, out=a), 2, out=d_delta_k)
        dA.view(1, -1).addmm_(ones[:, :size], torch.mul(q, delta_k, out=a).view(size, -1))
    return dx * delta, d_delta.addcmul_(dx, u), dA, dB, dC, d_state


def _decay_(out: Tensor, delta: Tensor, A: Tensor, floor: float | None) -> None:
    torch.mul(delta, A, out=out)
    if floor is not None:
        out.clamp_min_(floor)
    out.exp_()


def _pairs(decays: Tensor, states: Tensor, lanes: int) -> list[tuple[Tensor, Tensor]]:
    """The decay and the state of each step, (lanes, m, n, p), as views."""
    return list(zip(*(v.view(lanes, -1, *v.shape[1:]).unbind(1) for v in (decays, states)), strict=True))


def _recur_(pairs: list[tuple[Tensor, Tensor]], start: Tensor, order: int = 1) -> Tensor:
    """Turn what each step adds to the state (m, n, p) into the states; lanes follow each other in ``order``.

    Decays are destroyed where there are several lanes. Returns the states before the lanes, (lanes, m, n, p).
    """
    decay, state = pairs[0]
    lanes = len(state)
    if lanes == 1:
        before = start = start[None]
        for decay, state in pairs:
            before = state.addcmul_(decay, before)
        return start
    for a, h in pairs[1:]:
        state = h.addcmul_(a, state)  # as if the state before the lane were zero
        decay = a.mul_(decay)  # since the beginning of the lane
    starts = torch.empty_like(state)
    for lane in range(lanes)[::order]:
        starts[lane] = start
        start = torch.addcmul(state[lane], decay[lane], start)
    for a, h in pairs:
        h.addcmul_(a, starts)
    return starts
