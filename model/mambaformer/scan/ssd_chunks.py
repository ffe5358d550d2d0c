"""The chunked SSD scan as few matrix products (arXiv 2405.21060, section 6).

Within a chunk of q tokens, a head with the state H before it gives

    y = [from_start C | scores * decays * dt + diag(D)] [H; x]            scores = tril(C Bᵀ)
    H' = decay H + (to_end dt B)ᵀ x

so a chunk takes one product for its outputs and one for its state. Tokens are taken in pieces small enough that what
lies between the products stays in a processor's cache.

Precision: logs of decays are summed in float64 and kept as two numbers, so that a difference of large sums is as exact
as the steps between them. A decay below about 1e-28 in float32 (1e-230 in float64) counts as that: it is lost in
rounding, while numbers that underflow would slow every product that meets them.

Shapes: batch b, chunks c, groups g of r heads, tokens q of a chunk, head width p, state n; ``*`` is b, c, g, r.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["Piece", "cut_in_pieces", "scan_in_pieces"]

PIECE = 512  # tokens of all rows that are worked on at a time


def scan_in_pieces(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " h"] | None,
    initial: Float[Tensor, "b h p n"] | None,
    gate: Float[Tensor, "b l h p"] | None,
    chunk: int,
    kept: list[Tensor] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """The outputs, times ``gate``, and the final state; what the backward pass needs of each piece goes to ``kept``."""
    y = x.new_empty(x.shape)
    finals = []
    state = None if initial is None else initial.mT
    pieces = list(cut_in_pieces(x.shape[0], x.shape[1], chunk, x.device))
    for rows, times in pieces:
        if len(pieces) == 1:
            xs, dts, Bs, Cs, ys, gates = x, dt, B, C, y, gate
        else:
            xs, dts, Bs, Cs, ys = (v[rows, times] for v in (x, dt, B, C, y))
            gates = None if gate is None else gate[rows, times]
            if times.start == 0:
                state = None if initial is None else initial[rows].mT
        piece = Piece(dts, A, Bs, Cs, chunk)
        joined, state = piece.joined(xs, state)
        _write(ys, piece.outputs(joined, D), gates)
        if kept is not None:
            kept.append(joined)
        if times.stop == x.shape[1]:
            finals.append(state.mT)
    return y, finals[0] if len(finals) == 1 else torch.cat(finals)


class Piece:
    """What a piece's products are made of; a token that fills up the last chunk has dt = 0.

    Attributes:
        dt: (*, q).
        B, C: (b, c, g, q, n).
        high, low: (*, q), the log of the decay from the chunk's start, as a rounded number and the rest.
        from_start: (*, q), decay from the chunk's start, each token's own included.
        to_end: (*, q), decay to the chunk's end, each token's own left out.
    """

    def __init__(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> None:
        batch, self.length, heads = dt.shape
        groups, n = B.shape[2:]
        chunks = -(-self.length // chunk)
        q = -(-self.length // chunks)
        self.sizes = batch, chunks, groups, heads // groups, q, n
        dt, B, C = (self.filled(v) for v in (dt, B, C))
        self.dt = dt.view(batch, chunks, q, groups, -1).permute(0, 1, 3, 4, 2)
        self.B, self.C = (v.view(batch, chunks, q, groups, n).transpose(2, 3) for v in (B, C))
        log = (self.dt * A.view(groups, -1, 1)).clamp_(min=-1e3)  # e^-1000 is 0 in any dtype
        log = log.cumsum(-1, dtype=torch.float64)
        self.high = log.to(dt.dtype)
        self.low = (log - self.high).to(dt.dtype)
        self.floor = 0.75 * math.log(torch.finfo(dt.dtype).tiny)
        self.from_start = self.high.clamp(min=self.floor).exp_()
        self.to_end = (log.narrow(-1, -1, 1) - log).to(dt.dtype).clamp_(min=self.floor).exp_()

    def filled(self, v: Tensor) -> Tensor:
        """(b, l, …), with zeros after it where the last chunk is not full."""
        _, chunks, _, _, q, _ = self.sizes
        missing = chunks * q - self.length
        return F.pad(v, (0, 0) * (v.ndim - 2) + (0, missing)) if missing else v

    def split(self, v: Tensor) -> Tensor:
        """(b, l, h, p) as (*, q, p)."""
        batch, chunks, groups, per_group, q, _ = self.sizes
        return self.filled(v).view(batch, chunks, q, groups, per_group, -1).permute(0, 1, 3, 4, 2, 5)

    def joined(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """[H; x] of each chunk, (*, n + q, p), and the state after the last, (b, h, n, p)."""
        batch, chunks, groups, per_group, q, n = self.sizes
        width = x.shape[-1]
        joined = x.new_empty(batch, chunks, groups * per_group, n + q, width)
        tokens = joined.narrow(3, n, q)
        tokens.view(*self.sizes[:5], width).copy_(self.split(x))
        added = torch.bmm(self.into().mT, tokens.view(-1, q, width))
        before, adds = joined.narrow(3, 0, n).unbind(1), added.view(batch, chunks, -1, n, width).unbind(1)
        decays = self.chunk_decay().view(batch, chunks, -1, 1, 1).unbind(1)
        if state is None:
            before[0].zero_()
        else:
            before[0].copy_(state)
        for c in range(chunks - 1):
            torch.addcmul(adds[c], before[c], decays[c], out=before[c + 1])
        return joined, torch.addcmul(adds[-1], before[-1], decays[-1])

    def outputs(self, joined: Tensor, D: Tensor | None) -> Tensor:
        """(b, c, q, h, p)."""
        batch, chunks, heads, _, width = joined.shape
        y = torch.bmm(self.operator(self.decays(), self.scores(), D), joined.view(batch * chunks * heads, -1, width))
        return y.view(batch, chunks, heads, -1, width).transpose(2, 3)

    def into(self) -> Tensor:
        """to_end dt B, (* q, n): how much of each token the chunk adds to the state."""
        q, n = self.sizes[4:]
        into = self.dt.new_empty(*self.sizes)
        torch.mul(self.B.unsqueeze(3), (self.to_end * self.dt).unsqueeze(-1), out=into)
        return into.view(-1, q, n)

    def operator(self, decays: Tensor, scores: Tensor, D: Tensor | None) -> Tensor:
        """[from_start C | scores * decays * dt + diag(D)], (* q, n + q)."""
        q, n = self.sizes[4:]
        operator = self.dt.new_empty(*self.sizes[:5], n + q)
        torch.mul(self.C.unsqueeze(3), self.from_start.unsqueeze(-1), out=operator.narrow(-1, 0, n))
        torch.mul(decays, scores, out=operator.narrow(-1, n, q)).mul_(self.weights())
        if D is not None:
            operator.diagonal(n, -2, -1).add_(D.view(*self.sizes[2:4], 1))
        return operator.view(-1, q, n + q)

    def decays(self) -> Tensor:
        """(*, q, q): from each token j to each i ≥ j, short of e^low of j; a finite number elsewhere."""
        log = self.high.unsqueeze(-1) - self.high.unsqueeze(-2)
        return log.add_(self.low.unsqueeze(-1)).clamp_(self.floor, 1.0).exp_()

    def weights(self) -> Tensor:
        """(*, 1, q): dt, short of what ``decays`` has too much."""
        return self.low.neg().exp_().mul_(self.dt).unsqueeze(-2)

    def scores(self) -> Tensor:
        """(b, c, g, 1, q, q): tril(C Bᵀ)."""
        batch, chunks, groups, _, q, n = self.sizes
        scores = torch.bmm(self.C.reshape(-1, q, n), self.B.reshape(-1, q, n).mT).tril_()
        return scores.view(batch, chunks, groups, 1, q, q)

    def chunk_decay(self) -> Tensor:
        """(*): from the chunk's start to its end."""
        return self.from_start.select(-1, -1)


def cut_in_pieces(batch: int, length: int, chunk: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Rows and times of each piece, those of the same rows in order."""
    limit = PIECE if device.type == "cpu" else batch * length
    rows = max(1, limit // length)
    size = max(1, limit // chunk) * chunk
    for row in range(0, batch, rows):
        for start in range(0, length, size):
            yield slice(row, min(row + rows, batch)), slice(start, min(start + size, length))


def _write(y: Tensor, outputs: Tensor, gate: Tensor | None) -> None:
    """Fill ``y`` (b, l, h, p) with the outputs (b, c, q, h, p), times the gate."""
    chunks, q = outputs.shape[1:3]
    if chunks * q > y.shape[1]:
        y.copy_(outputs.flatten(1, 2).narrow(1, 0, y.shape[1]))
        if gate is not None:
            y.mul_(gate)
    elif gate is None:
        y.view(outputs.shape).copy_(outputs)
    else:
        torch.mul(outputs, gate.view(outputs.shape), out=y.view(outputs.shape))
