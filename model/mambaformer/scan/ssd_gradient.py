"""The gradient of the chunked SSD scan: all but the states before each chunk is computed again, piece by piece.

Shapes are those of ``ssd_chunks``.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_dispatch.model.mambaformer.scan.ssd_chunks import Piece, cut_in_pieces, scan_in_pieces

__all__ = ["ChunkedScan"]


class ChunkedScan(torch.autograd.Function):
    """``scan_in_pieces`` with a gradient; all arguments are of one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        y, final = scan_in_pieces(x, dt, A, B, C, D, initial, None, chunk, kept)
        ctx.save_for_backward(dt, A, B, C, D, *kept)
        ctx.chunk, ctx.continued = chunk, initial is not None
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(ctx, dy, d_final)


def _backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    dt, A, B, C, D, *kept = ctx.saved_tensors
    wholes = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in (dy, dt, B, C)]
    dA, dD = torch.zeros_like(A), None if D is None else torch.zeros_like(D)
    d_initial = torch.empty_like(d_final.mT).mT if ctx.continued else None
    pieces = list(cut_in_pieces(dt.shape[0], dt.shape[1], ctx.chunk, dt.device))
    d_state = d_final.mT
    for (rows, times), joined in zip(reversed(pieces), reversed(kept), strict=True):
        if times.stop == dt.shape[1]:
            d_state = d_final.mT[rows]
        piece = Piece(dt[rows, times], A, B[rows, times], C[rows, times], ctx.chunk)
        grads = _piece_backward(piece, A, D, joined, dy[rows, times], d_state)
        for whole, part in zip(wholes, grads[:4], strict=True):
            whole[rows, times] = part
        dA += grads.A
        if dD is not None:
            dD += grads.D
        d_state = grads.state
        if d_initial is not None and times.start == 0:
            d_initial[rows] = d_state.mT
    dx, d_dt, dB, dC = wholes
    return dx, d_dt, dA, dB, dC, dD, d_initial, None


class _Gradients(NamedTuple):
    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor
    state: Tensor


def _piece_backward(
    piece: Piece, A: Tensor, D: Tensor | None, joined: Tensor, dy: Tensor, d_state: Tensor
) -> _Gradients:
    """Gradients of one piece, given those of its outputs (b, l, h, p) and of the state after it (b, h, n, p)."""
    batch, chunks, groups, per_group, q, n = piece.sizes
    shape, width = piece.sizes[:5], joined.shape[-1]
    joined = joined.view(-1, n + q, width)
    states, tokens = joined.narrow(1, 0, n), joined.narrow(1, n, q)
    dy = piece.split(dy).reshape(-1, q, width)
    decays, scores = piece.decays(), piece.scores()
    d_joined = torch.bmm(piece.operator(decays, scores, D).mT, dy)
    d_operator = torch.bmm(dy, joined.mT).view(*shape, n + q)

    # the states, from the last chunk to the first
    d_states = joined.new_empty(batch, chunks, groups * per_group, n, width)
    d_before, d_after = d_joined.narrow(1, 0, n).view(d_states.shape).unbind(1), d_states.unbind(1)
    chunk_decays = piece.chunk_decay().view(batch, chunks, -1, 1, 1).unbind(1)
    d_after[-1].copy_(d_state)
    for c in range(chunks - 1, 0, -1):
        torch.addcmul(d_before[c], d_after[c], chunk_decays[c], out=d_after[c - 1])
    d_state = torch.addcmul(d_before[0], d_after[0], chunk_decays[0])
    d_states = d_states.view(-1, n, width)
    d_chunk = (states * d_states).sum((1, 2)).view(shape[:4]) * piece.chunk_decay()  # of its log

    # to the state and from it
    dx = torch.bmm(piece.into(), d_states).add_(d_joined.narrow(1, n, q)).view(*shape, width)
    d_into = torch.bmm(tokens, d_states.mT).view(*shape, n).mul_(piece.to_end.unsqueeze(-1))
    d_to_end = (d_into * piece.B.unsqueeze(3)).sum(-1)
    dB = d_into.mul_(piece.dt.unsqueeze(-1)).sum(3)
    d_out = d_operator.narrow(-1, 0, n).mul_(piece.from_start.unsqueeze(-1))
    dC = d_out.sum(3)
    d_from_start = d_out.mul_(piece.C.unsqueeze(3)).sum(-1)  # of its log

    # within the chunk
    d_within = d_operator.narrow(-1, n, q)
    dD = d_within.diagonal(dim1=-2, dim2=-1).sum((0, 1, 4)).view(-1)
    weights = piece.weights()
    per_score = decays.mul_(d_within)
    per_weight = per_score * scores
    d_scores = per_score.mul_(weights).sum(3).tril_()
    dB += d_scores.mT @ piece.C
    dC += d_scores @ piece.B
    d_dt = d_to_end + per_weight.sum(-2) * piece.low.neg().exp_()

    # the log of step k is in all decays from tokens j < k to tokens i ≥ k; sums of others would not cancel exactly
    after = torch.ones(q, q, dtype=dy.dtype, device=dy.device).triu_().expand(d_joined.shape[0], q, q)
    d_log = torch.bmm(after, per_weight.view(-1, q, q)).tril_(-1)
    d_log = torch.bmm(d_log, weights.reshape(-1, q, 1)).view(shape)
    d_log += d_from_start.flip(-1).cumsum(-1).flip(-1)
    d_log += F.pad((d_to_end * piece.dt).cumsum(-1).narrow(-1, 0, q - 1), (1, 0))
    d_log += d_chunk.unsqueeze(-1)
    d_dt += d_log * A.view(groups, -1, 1)
    dA = (d_log * piece.dt).sum((0, 1, 4)).view(-1)

    dx = dx.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * q, -1, width)
    d_dt = d_dt.permute(0, 1, 4, 2, 3).reshape(batch, chunks * q, -1)
    dB, dC = (v.transpose(2, 3).flatten(1, 2) for v in (dB, dC))
    dx, d_dt, dB, dC = (v.narrow(1, 0, piece.length) for v in (dx, d_dt, dB, dC))
    return _Gradients(dx, d_dt, dB, dC, dA, dD, d_state)
