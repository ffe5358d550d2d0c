"""Rows that a MambaFormer reads on: see ``model.backbone.Session``."""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.arguments import whole
from bayes_dispatch.errors import StaleCacheError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.backbone import Read, Session, check_ended, check_hidden, check_rows, check_tokens, last_of
from bayes_dispatch.model.between import asking
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.token_model import check_ids

__all__ = ["MambaFormerSession", "said_after"]

LOGITS_AT_ONCE = 2**12 * 258  # numbers: 4 MiB, which stay in the processor's caches
ROWS_AT_ONCE = 64  # of logits, however many numbers they have: fewer would read a large head from memory too often


@runtime_checkable
class _Blocks(Protocol):
    """The parts of a MambaFormer that a session calls."""

    vocab_size: int

    def below(
        self, block: int, input_ids: Tensor, *, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor: ...

    def upper(
        self,
        block: int,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        adaptation: Adaptation | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor, adaptation: Adaptation | None = None) -> Tensor: ...

    def check_states(self, x: Tensor) -> None: ...

    @property
    def device(self) -> torch.device: ...


class MambaFormerSession:
    """See ``model.backbone.Session``.

    Args:
        model: the network. cache: empty, of the blocks that run. adaptation: of its rows, and of these blocks.
        blocks: the first ones or the last ones; with these the head runs, too. depth: blocks of the model.
    """

    def __init__(self, model: _Blocks, cache: Cache, adaptation: Adaptation, blocks: range, depth: int) -> None:
        self.evaluated = 0
        self._model, self._cache, self._adaptation, self._blocks = model, cache, adaptation, blocks
        self._whole = blocks.stop == depth
        self._before: Float[Tensor, "R V"] | None = None
        self._changing = False  # begun, and not ended: spoilt, unless that goes on

    @property
    def rows(self) -> int:
        return self._cache.batch_size

    @property
    def lengths(self) -> Int[Tensor, " R"]:
        return self._cache.lengths

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes + (0 if self._before is None else self._before.nbytes)

    def read(
        self,
        ids: Int[Tensor, "R T"],
        tokens: Int[Tensor, " R"] | None = None,
        x: Float[Tensor, "R T D"] | None = None,
        *,
        own: bool = False,
        tail: int = 1,
        depths: Sequence[int] = (),
    ) -> Read:
        self._check(ids, tokens, x)
        tail = whole("tail", tail, 1)
        width, device = ids.shape[1], self._model.device
        self._cache.check_room(len(ids), width if tokens is None else tokens)
        counts = None if tokens is None or bool((tokens == width).all()) else tokens.to(device)
        ids, x = ids.to(device, torch.long), None if x is None else x.to(device)
        with asking(self._model, self._blocks, depths) as between:
            self._changing = True
            hidden = self._run(ids, x, counts)
        states = between.joined()
        self.evaluated += (ids.numel() if counts is None else int(counts.sum())) * len(self._blocks)
        if not self._whole:
            self._changing = False
            return Read(None, None, hidden, states)
        said = self._own(ids, hidden) if own else None
        after = self.after(last_of(hidden, counts, min(tail, width)))
        self._before = after[:, -1]
        self._changing = False
        return Read(said, after, hidden, states)

    def after(self, hidden: Float[Tensor, "R t D"]) -> Float[Tensor, "R t V"]:
        return self._model.logits(hidden, self._adaptation).log_softmax(-1)

    def keep(self, rows: Sequence[int]) -> None:
        check_ended(self._changing)
        check_rows(rows, self.rows)
        self._changing = True
        self._cache.reorder(rows)
        self._select(rows)
        self._changing = False

    def select(self, rows: Sequence[int]) -> "MambaFormerSession":
        check_ended(self._changing)
        check_rows(rows, self.rows)
        twin = copy(self)
        twin._cache = self._cache.select(rows)
        twin._select(rows)
        return twin

    def join(self, other: Session) -> None:
        if not isinstance(other, MambaFormerSession) or (other._model, other._blocks) != (self._model, self._blocks):
            raise TensorError(f"expected a session of the same model and its blocks {self._blocks}, got another")
        check_ended(self._changing)
        check_ended(other._changing)
        adaptation = self._adaptation.followed_by(other._adaptation, self.rows, other.rows)
        both = [each._before for each in (self, other) if each._before is not None]
        before = torch.cat(both) if len(both) == 2 else None
        self._changing = True
        try:
            self._cache.join(other._cache)
        except (TensorError, StaleCacheError):  # refused, and nothing has changed
            self._changing = False
            raise
        self._adaptation, self._before = adaptation, before
        self._changing = False

    def reserve(self, capacity: int) -> None:
        self._cache.reserve(capacity)

    def _check(self, ids: Tensor, tokens: Tensor | None, x: Tensor | None) -> None:
        check_ended(self._changing)
        check_tokens(ids, tokens, self.rows)
        check_ids(ids, self._model.vocab_size)
        if self._blocks.start:
            self._model.check_states(check_hidden(x, ids))

    def _select(self, rows: Sequence[int]) -> None:
        self._adaptation = self._adaptation.select(rows)
        self._before = None if self._before is None else self._before[torch.as_tensor(rows)]

    def _run(self, ids: Tensor, x: Tensor | None, counts: Tensor | None) -> Float[Tensor, "R T D"]:
        mask = None if counts is None else (torch.arange(ids.shape[1], device=ids.device) < counts[:, None]).long()
        if not self._whole:
            return self._model.below(self._blocks.stop, ids, attention_mask=mask, cache=self._cache)
        given = x if self._blocks.start and x is not None else ids
        return self._model.upper(
            self._blocks.start, given, attention_mask=mask, cache=self._cache, adaptation=self._adaptation
        )

    def _own(self, ids: Tensor, hidden: Tensor) -> Float[Tensor, "R T"]:
        nan = hidden.new_full((len(ids), 1), torch.nan)
        first = nan if self._before is None else self._before.gather(1, ids[:, :1])
        return torch.cat([first, said_after(hidden, ids, self._model.vocab_size, self.after)], 1)


def said_after(
    hidden: Float[Tensor, "R T D"], ids: Int[Tensor, "R T"], vocab_size: int, after: Callable[[Tensor], Tensor]
) -> Float[Tensor, "R T-1"]:
    """Log-probabilities of all tokens but the first, piece by piece: of all at once they would be of much memory.

    Args:
        hidden: states at each token. after: gives log-probabilities (R, t, V) of what follows some of them.
    """
    rows, width = ids.shape
    step = max(1, max(LOGITS_AT_ONCE // vocab_size, ROWS_AT_ONCE) // rows)
    said = hidden.new_empty(rows, 0)
    for start in range(0, width - 1, step):
        stop = min(start + step, width - 1)
        piece = after(hidden[:, start:stop]).gather(2, ids[:, start + 1 : stop + 1, None])[..., 0]
        if not start:  # filled, not joined at the end: pieces that stay would lie amid memory that the next logits need
            said = piece.new_empty(rows, width - 1)
        said[:, start:stop] = piece
    return said
