"""Rows that a transformers model reads on: its cache, padding on the left, and what experts add."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from bayes_dispatch.arguments import whole
from bayes_dispatch.errors import CacheFullError, TensorError
from bayes_dispatch.model.adaptation import Delta, rows_of_deltas
from bayes_dispatch.model.backbone import Read, Session, check_ended, check_hidden, check_rows, check_tokens
from bayes_dispatch.model.between import asking
from bayes_dispatch.model.mambaformer.token_model import check_ids
from bayes_dispatch.model.transformers.parts import ModelParts

__all__ = ["TransformersSession"]

TOKENS_AT_ONCE = 4096  # rows times tokens that run together
LOGITS_AT_ONCE = 2**24  # numbers: 64 MiB
ATTENTION = (  # layers whose keys and values are all that they keep of tokens in order
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


class TransformersSession:
    """See ``model.backbone.Session``.

    Rows end together: the first read puts the padding of shorter ones on the left, where no state remembers it.
    """

    def __init__(self, parts: ModelParts, rows: int, capacity: int, deltas: dict[str, Delta], blocks: range) -> None:
        self.capacity = capacity
        self.evaluated = 0
        self._parts, self._deltas, self._blocks = parts, deltas, blocks
        self._cache: Any = DynamicCache(config=parts.config)
        if blocks.start:  # masks are made for the first layer of a kind, which must be one that runs
            layers = self._cache.layers
            for place in range(blocks.start):
                same = (layer for layer in layers[blocks.start :] if type(layer) is type(layers[place]))
                layers[place] = next(same, layers[place])
        self._rows, self._read = rows, 0  # slots read, padding among them
        self._pads: Int[Tensor, " R"] = torch.zeros(rows, dtype=torch.long, device=parts.device)
        self._before: Float[Tensor, "R V"] | None = None
        self._changing = False

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def lengths(self) -> Int[Tensor, " R"]:
        return self._read - self._pads

    @property
    def nbytes(self) -> int:
        layers = sum(tensor.nbytes for layer in self._layers() for _, tensor in _tensors(layer))
        return layers + (0 if self._before is None else self._before.nbytes)

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
        width = ids.shape[1]
        ids = ids.to(self._parts.device, torch.long)
        shift = None  # (R,), to the right
        if tokens is not None and bool((tokens < width).any()):
            shift = (width - tokens).to(ids.device)
            ids = _rolled(ids, shift)
            x = None if x is None else _rolled(x, shift)
        with asking(self._parts, self._blocks, depths) as between:
            self._changing = True
            self._pads = self._pads if shift is None else shift
            hidden = self._run(ids, x)
        self._read += width
        self.evaluated += int(width * self._rows - (0 if shift is None else int(shift.sum()))) * len(self._blocks)
        found = Read(None, None, hidden)
        if self._blocks.stop == self._parts.depth:
            found = self._head(ids, hidden, own, min(tail, width))
        found = found._replace(states=between.joined())
        self._changing = False
        if shift is None:
            return found
        own_back = None if found.own is None else _rolled(found.own, -shift)
        if own_back is not None:
            own_back[:, 0] = torch.nan  # it was read after padding
        states = tuple(_rolled(each, -shift) for each in found.states)
        return Read(own_back, found.after, _rolled(found.hidden, -shift), states)

    def keep(self, rows: Sequence[int]) -> None:
        check_ended(self._changing)
        check_rows(rows, self._rows)
        self._changing = True
        index = torch.as_tensor(rows, dtype=torch.long, device=self._pads.device)
        for layer in self._layers():
            layer.reorder_cache(index)
        self._select(index)
        self._forget(int(self._pads.min()))
        self._changing = False

    def select(self, rows: Sequence[int]) -> "TransformersSession":
        check_ended(self._changing)
        check_rows(rows, self._rows)
        index = torch.as_tensor(rows, dtype=torch.long, device=self._pads.device)
        copies = {id(layer): _copied(layer, index) for layer in self._layers()}
        twin = copy(self)
        twin._cache = copy(self._cache)
        twin._cache.layers = [copies.get(id(layer), layer) for layer in self._cache.layers]
        twin._select(index)
        return twin

    def join(self, other: Session) -> None:
        check_ended(self._changing)
        if not isinstance(other, TransformersSession) or (other._parts, other._blocks) != (self._parts, self._blocks):
            raise TensorError(f"expected a session of the same model and its blocks {self._blocks}, got another")
        check_ended(other._changing)
        if not (self._read and other._read):
            raise TensorError("expected sessions that have read something, got an empty one")
        deltas = rows_of_deltas(self._deltas, other._deltas, self._rows, other._rows)
        room = max(self.capacity - self._read, other.capacity - other._read)
        slots = max(self._read, other._read)
        layers = {
            id(mine): _joined(mine, theirs, slots) for mine, theirs in zip(self._layers(), other._layers(), strict=True)
        }
        self._changing = True
        self._cache.layers = [layers.get(id(layer), layer) for layer in self._cache.layers]
        self._pads = torch.cat([each._pads + slots - each._read for each in (self, other)])
        before = [each._before for each in (self, other)]
        self._before = torch.cat(before) if all(each is not None for each in before) else None  # type: ignore[arg-type]
        self._rows, self._read, self._deltas, self.capacity = self._rows + other._rows, slots, deltas, slots + room
        self._changing = False

    def reserve(self, capacity: int) -> None:
        self.capacity = max(self.capacity, capacity)

    def _forget(self, slots: int) -> None:
        """Drop the first slots, which hold padding of every row: rows that were joined and are gone had been longer."""
        if not slots:
            return
        for layer in self._layers():
            keys = getattr(layer, "keys", None)
            if keys is None:
                continue
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length -= slots
                kept = min(layer.cumulative_length, keys.shape[2])
            else:
                kept = keys.shape[2] - slots
            layer.keys, layer.values = (each[:, :, each.shape[2] - kept :] for each in (keys, layer.values))
        self._read, self._pads, self.capacity = self._read - slots, self._pads - slots, self.capacity - slots

    def _select(self, index: Tensor) -> None:
        self._rows = len(index)
        self._pads = self._pads[index]
        self._before = None if self._before is None else self._before[index]
        self._deltas = {name: delta.select(index) for name, delta in self._deltas.items()}

    def _run(self, ids: Tensor, x: Tensor | None) -> Float[Tensor, "R T D"]:
        width = ids.shape[1]
        hidden: Tensor | None = None
        step = max(1, TOKENS_AT_ONCE // self._rows)
        start = 0
        padded = bool(self._pads.any())
        while start < width:
            read = self._read + start
            stop = min(width, start + (1 if read and not self._parts.continues else step))
            if not read and not self._parts.continues:
                stop = width
            places = torch.arange(read, self._read + stop, device=ids.device)
            seen = torch.arange(self._read + stop, device=ids.device)
            arguments: dict[str, Any] = {"cache": self._cache, "use_cache": True}
            if padded:
                arguments["attention_mask"] = (seen >= self._pads[:, None]).long()
            if self._parts.positions:
                arguments["position_ids"] = (places - self._pads[:, None]).clamp(min=0)
            part = slice(start, stop)
            with self._parts.adding(self._deltas):
                said = self._parts.run(self._blocks, ids[:, part], None if x is None else x[:, part], **arguments)
            if stop - start == width:
                return said
            if hidden is None:  # filled, not joined at the end, when there would be all of it twice
                hidden = said.new_empty(self._rows, width, said.shape[2])
            hidden[:, part] = said
            start = stop
        assert hidden is not None
        return hidden

    def _head(self, ids: Tensor, hidden: Tensor, own: bool, tail: int) -> Read:
        width = ids.shape[1]
        said: list[Tensor] = []
        if own:
            first = hidden.new_full((self._rows, 1), torch.nan, dtype=torch.promote_types(hidden.dtype, torch.float32))
            said.append(first if self._before is None else self._before.gather(1, ids[:, :1]))
            step = max(1, LOGITS_AT_ONCE // (self._rows * self._parts.vocab_size))
            for start in range(0, width - 1, step):
                part = slice(start, min(start + step, width - 1))
                following = ids[:, part.start + 1 : part.stop + 1, None]
                said.append(self.after(hidden[:, part]).gather(2, following)[..., 0])
        after = self.after(hidden[:, -tail:])
        self._before = after[:, -1]
        return Read(torch.cat(said, 1) if own else None, after, hidden)

    def after(self, hidden: Float[Tensor, "R t D"]) -> Float[Tensor, "R t V"]:
        with self._parts.adding(self._deltas):
            logits = self._parts.logits(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _check(self, ids: Tensor, tokens: Tensor | None, x: Tensor | None) -> None:
        check_ended(self._changing)
        check_tokens(ids, tokens, self._rows)
        check_ids(ids, self._parts.vocab_size)
        if tokens is not None and self._read and bool((tokens < ids.shape[1]).any()):
            raise TensorError(f"expected as many tokens of each row once some have been read, got {tokens.tolist()}")
        if self._blocks.start:
            check_hidden(x, ids)
        if self._read + ids.shape[1] > self.capacity:
            raise CacheFullError(f"expected at most {self.capacity} tokens, got {self._read + ids.shape[1]}")
        # slots may be more, after ``reserve``, and in rows that are padded so as to end with longer ones
        if self._parts.longest is not None and self._read + ids.shape[1] > self._parts.longest:
            new = ids.shape[1] if tokens is None else tokens.to(self._pads.device)
            self._parts.check_length(int((self.lengths + new).max()))

    def kept(self) -> list[Tensor]:
        """What the first layer of each kind keeps."""
        first = {type(layer): layer for layer in reversed(self._layers())}
        return [kept.float() for layer in first.values() for _, kept in _tensors(layer) if kept.is_floating_point()]

    def _layers(self) -> list[Any]:
        """Those that run, once each."""
        return list(self._cache.layers[self._blocks.start : self._blocks.stop])


def _rolled(values: Tensor, shift: Int[Tensor, " R"]) -> Tensor:
    """Each row moved to the right by its shift; what leaves on one side comes in on the other."""
    width = values.shape[1]
    index = (torch.arange(width, device=values.device) - shift[:, None]) % width
    return values.gather(1, index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand_as(values))


def _tensors(layer: Any) -> list[tuple[str, Tensor]]:
    found = []
    for name, value in vars(layer).items():
        each = value.items() if isinstance(value, dict) else [("", value)]
        found += [(f"{name}{key}", tensor) for key, tensor in each if isinstance(tensor, Tensor)]
    return found


def _joined(mine: Any, theirs: Any, slots: int) -> Any:
    """A layer with the rows of both, keys and values padded on the left to as many tokens."""
    twin = copy(mine)
    named = dict(_tensors(theirs))
    for name, value in vars(mine).items():
        if isinstance(value, dict):
            own = {
                key: torch.cat([each, named[f"{name}{key}"]]) if isinstance(each, Tensor) else each
                for key, each in value.items()
            }
            setattr(twin, name, own)
    if getattr(mine, "keys", None) is None:
        return twin
    if type(mine) not in ATTENTION:
        raise TensorError(f"expected layers that keep keys and values in order, got {type(mine).__name__}")
    if hasattr(mine, "cumulative_length"):
        twin.cumulative_length = slots
        slots = min(slots, mine.sliding_window - 1)
    for name in ("keys", "values"):
        both = [F.pad(each, (0, 0, slots - each.shape[2], 0)) for each in (getattr(mine, name), named[name])]
        setattr(twin, name, torch.cat(both))
    return twin


def _copied(layer: Any, index: Tensor) -> Any:
    twin = copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, dict(value))
    twin.reorder_cache(index)
    return twin
