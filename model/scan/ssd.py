"""The state-space duality (SSD) scan of Mamba-2, beside its sequential reference (arXiv 2405.21060, section 6).

Both compute, for each head, the recurrence

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_tᵀ        y_t = C_t h_t + D x_t

Shapes: batch b, length l, heads h, head width p, groups g (g divides h), state n.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.errors import TensorError

__all__ = ["ssd_scan", "ssd_scan_ref", "ssd_step"]


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
) -> Float[Tensor, "b l h p"] | tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """The scan in chunks: matrix products within a chunk, a recurrence over the chunks' states.

    Args:
        x: inputs. dt: positive step sizes; 0 leaves the state as it is. A: negative decay rates.
        B, C: input and output projections of each group of heads.
        chunk_size: tokens in a chunk; any value gives the same result.
        D: skip connection. initial_state: state before the first token; zeros if ``None``.
        return_final_state: also return the state after the last token.

    Raises:
        TensorError: the number of heads is no multiple of the number of groups.
    """
    batch, length, heads, width = x.shape
    groups = _check_groups(heads, B)
    chunk = min(chunk_size, length)
    pad = -length % chunk
    u = x * dt[..., None]
    decay = dt * A
    if pad:  # padded steps have dt = 0: they change no state, and their outputs are cut off
        u, B, C = (F.pad(v, (0, 0, 0, 0, 0, pad)) for v in (u, B, C))
        decay = F.pad(decay, (0, 0, 0, pad))
    n_chunks = (length + pad) // chunk
    per_group = heads // groups

    u = u.view(batch, n_chunks, chunk, groups, per_group, width)
    B = B.reshape(batch, n_chunks, chunk, groups, -1)
    C = C.reshape(batch, n_chunks, chunk, groups, -1)
    # cumulative log decay within each chunk                                    (b, c, g, r, q)
    log_decay = decay.view(batch, n_chunks, chunk, groups, per_group).permute(0, 1, 3, 4, 2).cumsum(-1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    between = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()

    scores = torch.einsum("bcign,bcjgn->bcgij", C, B)  # (b, c, g, q, q)
    attention = scores[:, :, :, None] * between  # (b, c, g, r, q, q)
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", attention, u)

    to_end = (log_decay[..., -1:] - log_decay).exp()  # (b, c, g, r, q)
    added = torch.einsum("bcjgn,bcgrj,bcjgrp->bcgrpn", B, to_end, u)
    chunk_decay = log_decay[..., -1].exp()  # (b, c, g, r)
    if initial_state is None:
        state = x.new_zeros(batch, groups, per_group, width, B.shape[-1])
    else:
        state = initial_state.reshape(batch, groups, per_group, width, -1)
    before = []
    for c in range(n_chunks):
        before.append(state)
        state = state * chunk_decay[:, c, ..., None, None] + added[:, c]
    from_start = log_decay.exp()
    y = y + torch.einsum("bcign,bcgri,bcgrpn->bcigrp", C, from_start, torch.stack(before, 1))

    y = y.reshape(batch, n_chunks * chunk, heads, width)[:, :length]
    if D is not None:
        y = y + x * D[:, None]
    return (y, state.reshape(batch, heads, width, -1)) if return_final_state else y


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


def _check_groups(heads: int, B: Tensor) -> int:
    groups = B.shape[-2]
    if heads % groups:
        raise TensorError(f"expected the groups of B to divide {heads} heads, got {groups} groups")
    return groups
