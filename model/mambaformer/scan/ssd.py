"""The state-space duality (SSD) scan of Mamba-2, beside its sequential reference (arXiv 2405.21060, section 6).

Both compute, for each head, the recurrence

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_tᵀ        y_t = C_t h_t + D x_t

Shapes: batch b, length l, heads h, head width p, groups g (g divides h), state n.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.mambaformer.eager import eager
from bayes_dispatch.model.mambaformer.scan.fused import fused_ssd_scan
from bayes_dispatch.model.mambaformer.scan.ssd_chunks import scan_in_pieces
from bayes_dispatch.model.mambaformer.scan.ssd_gradient import ChunkedScan

__all__ = ["ssd_scan", "ssd_scan_ref", "ssd_step", "ssd_step_"]


def ssd_scan(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    chunk_size: int,
    D: Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    return_final_state: bool = False,
    gate: Float[Tensor, "b l h p"] | None = None,
) -> Float[Tensor, "b l h p"] | tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """The scan in chunks: matrix products within a chunk, a recurrence over the chunks' states.

    Args:
        x: inputs. dt: positive step sizes; 0 leaves the state as it is. A: negative decay rates.
        B, C: input and output projections of each group of heads.
        chunk_size: tokens in a chunk; any value gives the same result.
        D: skip connection. initial_state: state before the first token; zeros if ``None``.
        return_final_state: also return the state after the last token. gate: what to multiply the outputs by.

    Returns:
        y (b, l, h, p) in the dtype of ``x``, and, if asked for, the last state (b, h, p, n), in float32 at least.

    Raises:
        TensorError: the number of heads is no multiple of the number of groups.
    """
    _check_groups(x.shape[2], B)
    kernel = fused_ssd_scan(x.device)
    if kernel is not None and x.dtype != torch.float64:  # the one dtype that it does not know
        y, final = kernel(x, dt, A, B, C, 256, D=D, initial_states=initial_state, return_final_states=True)
        y = y if gate is None else y * gate
        return (y, final) if return_final_state else y
    y, final = _scan(x, dt, A, B, C, D, initial_state, gate, chunk_size)
    y = y.to(x.dtype)
    return (y, final) if return_final_state else y


def ssd_step(
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    D: Float[Tensor, " h"] | None,
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """One token of the recurrence: its output and the next state."""
    per_group = x.shape[1] // _check_groups(x.shape[1], B)
    B, C = (v.repeat_interleave(per_group, dim=1) for v in (B, C))  # (b, h, n)
    state = state * (dt * A).exp()[..., None, None] + (x * dt[..., None])[..., None] * B[:, :, None]
    y = (state @ C[..., None])[..., 0]
    return (y if D is None else y + x * D[:, None]), state


def ssd_step_(
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    D: Float[Tensor, " h"] | None,
    state: Float[Tensor, "b h p n"],
) -> Float[Tensor, "b h p"]:
    """``ssd_step`` that changes ``state`` itself, which may be stored in less precision, and returns the output.

    Without gradients, and in float32 at least, as ``ssd_scan`` computes.
    """
    if x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            D = None if D is None else D.to(dtype)
            wide, dt, A, B, C = (v.to(dtype) for v in (x, dt, A, B, C))
            return ssd_step_(wide, dt, A, B, C, D, state).to(x.dtype)
    batch, heads, _ = x.shape
    groups, n = B.shape[1:]
    B, C = B.reshape(batch * groups, 1, n), C.reshape(batch * groups, n, 1)
    new = state.to(x.dtype)
    new.mul_((dt * A).exp_().view(batch, heads, 1, 1))
    new = new.view(batch * groups, -1, n).baddbmm_((x * dt.unsqueeze(-1)).view(batch * groups, -1, 1), B)
    y = torch.bmm(new, C).view(x.shape)
    if state.dtype != x.dtype:
        state.copy_(new.view(state.shape))
    return y if D is None else y.addcmul_(x, D.unsqueeze(1))


def ssd_scan_ref(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    chunk_size: int,
    D: Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    return_final_state: bool = False,
) -> Float[Tensor, "b l h p"] | tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """``ssd_scan`` as the recurrence is written, one token at a time; ``chunk_size`` has no effect."""
    batch, length, heads, width = x.shape
    state = x.new_zeros(batch, heads, width, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    y = torch.stack(outputs, 1)
    return (y, state) if return_final_state else y


@eager  # its pieces depend on the length: a program for each, compiled
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    gate: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)  # states and decays lose too much in less
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C = (v.to(dtype) for v in (x, dt, A, B, C))
        D, initial = (None if v is None else v.to(dtype) for v in (D, initial))
        if torch.is_grad_enabled():
            y, final = ChunkedScan.apply(x, dt, A, B, C, D, initial, chunk_size)
            return (y if gate is None else y * gate), final
        return scan_in_pieces(x, dt, A, B, C, D, initial, gate, chunk_size)


def _check_groups(heads: int, B: Tensor) -> int:
    groups = B.shape[-2]
    if heads % groups:
        raise TensorError(f"expected the groups of B to divide {heads} heads, got {groups} groups")
    return groups
