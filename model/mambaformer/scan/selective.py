"""The selective scan of Mamba, beside its sequential reference (arXiv 2312.00752, section 3).

Both compute, for each channel and each entry of its state, the recurrence

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t h_t + D u_t

Decays are multiplied, never divided, and no logarithms are summed: decay that underflows costs no precision.
Signatures are those of ``mamba_ssm``. Shapes: batch b, channels d, length l, state n, groups g (g divides d).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.mambaformer.scan.fused import fused_selective_scan
from bayes_dispatch.model.mambaformer.scan.selective_chunks import DECAY_FLOOR, scan_chunks

__all__ = ["selective_scan", "selective_scan_ref", "selective_step", "selective_step_"]

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
    """The scan in chunks, in float32 at least; what it keeps for a backward pass is one state for each chunk.

    It reads transposed views fastest: of (b, l, d) memory for ``u``, ``delta``, ``z``, and of (b, n, d) for states.

    Args:
        u: inputs. delta: step sizes; 0 leaves the state as it is. A: negative decay rates.
        B, C: input and output projections, for all channels or for each group of them.
        D: skip connection. z: the output is multiplied by ``silu(z)``.
        delta_bias: added to ``delta``. delta_softplus: whether softplus is then applied to it.
        return_last_state: also return the state after the last token.
        initial_state: state before the first token; zeros if ``None``.
        chunk_size: most tokens in a chunk. lanes: chunks scanned side by side, in fewer steps with more products each.
            Any values give the same result; ``None`` chooses by sizes and device.

    Returns:
        y (b, d, l) in the dtype of ``u``, and the last state (b, d, n) if asked for.

    Raises:
        TensorError: tensors whose shapes do not fit together.
    """
    groups = _check_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, delta, A, B, C = (v.to(dtype) for v in (u, delta, A, B, C))
    D, z, delta_bias, initial_state = (v if v is None else v.to(dtype) for v in (D, z, delta_bias, initial_state))
    kernel = None
    if dtype == torch.float32 and initial_state is None and not (return_last_state and torch.is_grad_enabled()):
        kernel = fused_selective_scan(u.device)
    if kernel is not None:
        out = kernel(x, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
        y, last = out if return_last_state else (out, None)
    else:
        if delta_bias is not None:
            delta = delta + delta_bias[:, None]
        if delta_softplus:
            delta = F.softplus(delta)
        y, final = _scan_time_first(x, delta, A, B, C, initial_state, groups, chunk_size, lanes)
        last = final if return_last_state else None
        if D is not None:
            y = torch.addcmul(y, x, D[:, None])
        if z is not None:
            y = y * F.silu(z)
    y = y.to(u.dtype)
    return y if last is None else (y, last)


def selective_step_(
    u: Float[Tensor, "b 1 d"],
    delta: Float[Tensor, "b 1 d"],
    A: Float[Tensor, "n d"],
    B: Float[Tensor, "b 1 n"],
    C: Float[Tensor, "b 1 n"],
    D: Float[Tensor, " d"],
    state: Float[Tensor, "b n d"],
) -> Float[Tensor, "b 1 d"]:
    """One token, for decoding: changes ``state`` itself, which may be stored in less precision; returns the output.

    Without gradients, in float32 at least, in few operations, and in the layout of a mixer, so that nothing is moved.
    """
    if u.dtype.itemsize < 4 or torch.is_autocast_enabled(u.device.type):
        with torch.autocast(u.device.type, enabled=False):
            dtype = torch.promote_types(u.dtype, torch.float32)
            x, delta, A, B, C, D = (v.to(dtype) for v in (u, delta, A, B, C, D))
            return selective_step_(x, delta, A, B, C, D, state).to(u.dtype)
    decay = delta * A
    decay = decay.clamp_min_(DECAY_FLOOR[decay.dtype]).exp_()
    new = state.mul_(decay) if state.dtype == decay.dtype else decay.mul_(state)
    new.baddbmm_(B.mT, delta * u)
    if new is not state:
        state.copy_(new)
    return torch.bmm(C, new).addcmul_(u, D)


def selective_step(
    u: Float[Tensor, "b d"],
    delta: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b d n"],
    C: Float[Tensor, "b d n"],
    state: Float[Tensor, "b d n"],
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d n"]]:
    """One token of the recurrence as it is written, B and C those of each channel: output without D, and next state."""
    state = torch.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B
    return (C * state).sum(-1), state


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
    """``selective_scan``, one token at a time, in the dtype of its inputs."""
    groups = _check_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (v[:, None] if v.ndim == 3 else v for v in (B, C))  # (b, g, n, l)
    B, C = (v.repeat_interleave(u.shape[1] // groups, dim=1) for v in (B, C))  # (b, d, n, l)
    state = u.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else initial_state
    outputs = []
    for u_t, delta_t, B_t, C_t in zip(*(v.unbind(-1) for v in (u, delta, B, C)), strict=True):
        y, state = selective_step(u_t, delta_t, A, B_t, C_t, state)
        outputs.append(y)
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_last_state else y


def _scan_time_first(
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
    """Output without D and z, and last state, from tensors with time first, channels last, and a row for each group."""
    (batch, channels, length), n = u.shape, A.shape[1]
    rows, width = batch * groups, channels // groups
    u, delta = (v.permute(2, 0, 1).reshape(length, rows, width) for v in (u, delta))
    A = A.t().reshape(n, groups, width).transpose(0, 1).contiguous()
    A = A.expand(batch, groups, n, width).reshape(rows, n, width)
    B, C = (v.movedim(-1, 0).reshape(length, rows, n) for v in (B, C))
    if initial is None:
        initial = u.new_zeros(rows, n, width)
    else:
        initial = initial.mT.reshape(batch, n, groups, width).transpose(1, 2).reshape(rows, n, width)
    scan = scan_chunks
    if torch.compiler.is_compiling():  # it would unroll the loops
        scan = torch.compiler.disable(scan_chunks)
    y, last = scan(u, delta, A, B, C, initial, chunk, lanes)
    last = last.reshape(batch, groups, n, width).transpose(1, 2).reshape(batch, n, channels).mT
    return y.reshape(length, batch, channels).permute(1, 2, 0), last


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
    if u.ndim != 3 or A.ndim != 2 or 0 in (*u.shape, *A.shape):
        raise TensorError(f"expected u (b, d, l) and A (d, n), none empty, got {tuple(u.shape)} and {tuple(A.shape)}")
    (batch, channels, length), n = u.shape, A.shape[1]
    groups = B.shape[1] if B.ndim == 4 else 1
    if groups < 1 or channels % groups:
        raise TensorError(f"expected the groups of B to divide {channels} channels, got {groups} groups")
    projection = (batch, groups, n, length) if B.ndim == 4 else (batch, n, length)
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
