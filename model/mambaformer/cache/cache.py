"""The cache of a model: one state per block, the number of tokens read by each row, and what made them."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from bayes_dispatch.arguments import whole
from bayes_dispatch.errors import BundleError, CacheFullError, StaleCacheError, TensorError
from bayes_dispatch.model.mambaformer.cache.states import AttentionState, CrossAttentionState, State
from bayes_dispatch.model.mambaformer.cache.storage import read_states, write_states

__all__ = ["Cache", "CacheInfo", "LayerInfo"]

Digest = str | tuple[str, ...]  # of the scales that made a block's state: one for all rows, or one per row


@dataclass(frozen=True)
class LayerInfo:
    """``kind`` of state of a block, the ``dtype`` of its first tensor, and its size in bytes."""

    kind: str
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds and what it costs.

    Attributes:
        batch_size: rows. lengths: tokens that each row has read. capacity: most tokens that a row can hold in order,
            ``None`` where there is no bound.
        layers: one entry per block. nbytes: bytes of all of them.
    """

    batch_size: int
    lengths: tuple[int, ...]
    capacity: int | None
    layers: tuple[LayerInfo, ...]
    nbytes: int


class Cache:
    """Per-block states of a batch, filled in place by ``model(..., cache=cache)``.

    Each row has a length of its own: padding never enters a state. The cache remembers the model and, block by block
    and row by row, the scales that made it; continuing under others raises ``StaleCacheError``.

    What changes it takes effect whole. Where it is interrupted half-way, by Ctrl-C, an error or for want of memory, the
    cache is spoilt: all but ``reset`` and ``info`` raise ``StaleCacheError`` from then on.

    Attributes:
        states: one ``State`` per block. first: index of the first of these blocks in the model.
        capacity: most tokens that attention keeps in order; ``None`` where every state is of bounded size.
        model: what made it: its weights' fingerprint, settings of its blocks, and its dtype.
        grow: make room when the capacity is reached, instead of raising ``CacheFullError``.
    """

    def __init__(
        self,
        states: Sequence[State],
        batch_size: int,
        capacity: int | None,
        model: str,
        grow: bool = False,
        first: int = 0,
    ) -> None:
        self.states = list(states)
        self.first = first
        self.capacity = capacity
        self.grow = grow
        self._batch_size = batch_size
        self.model = model
        self._read: int | Tensor = 0  # tokens read: one number while all rows agree
        self._dropped: int | Tensor = 0  # of those, the ones that attention has forgotten
        self._made_by: list[Digest | None] = [None] * len(self.states)
        self._changing = False  # begun, and not ended: spoilt, unless that goes on
        self._inference = torch.is_inference_mode_enabled()  # the mode of the latest change

    @property
    def blocks(self) -> range:
        """Those of the model that have a state here."""
        return range(self.first, self.first + len(self.states))

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens read so far by each row."""
        return self._per_row(self._read)

    @property
    def read(self) -> int | Tensor:
        """``lengths``, as one number where all rows agree."""
        return self._read

    @property
    def dropped(self) -> int | Tensor:
        """How many of those tokens attention has forgotten by ``prune``."""
        return self._dropped

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(layer.nbytes for layer in self.info().layers)

    def info(self) -> CacheInfo:
        """Lengths, capacity, and bytes per block and in total."""
        layers = tuple(_layer_info(state) for state in self.states)
        lengths = tuple(self.lengths.tolist())
        return CacheInfo(self.batch_size, lengths, self.capacity, layers, sum(layer.nbytes for layer in layers))

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._changing = False
        self.begin()
        for state in self.states:
            state.clear()
        self._read = self._dropped = 0
        self._made_by = [None] * len(self.states)
        self._changing = False

    def reorder(self, indices: Sequence[int] | Int[Tensor, " R"]) -> "Cache":
        """Make row ``indices[r]`` the new row r, in place: to permute, repeat or drop rows, as a beam search does.

        Raises:
            TensorError: no indices, or one outside the batch.
        """
        index = torch.as_tensor(indices)
        if index.ndim != 1 or index.numel() == 0 or index.dtype not in (torch.int64, torch.int32):
            raise TensorError(
                f"expected integer indices (R,) of at least one row, got {index.dtype}, {tuple(index.shape)}"
            )
        if int(index.min()) < 0 or int(index.max()) >= self.batch_size:
            got = f"{int(index.min())} … {int(index.max())}"
            raise TensorError(f"expected indices of rows 0 … {self.batch_size - 1} of this cache, got {got}")
        rows = index.tolist()
        self.begin()
        states = [copy(state) for state in self.states]  # that share tensors, until all the new ones are there
        for state, made_by in zip(states, self._made_by, strict=True):
            adapted = isinstance(made_by, tuple) and tuple(made_by[row] for row in rows) != made_by
            if adapted or not (isinstance(state, CrossAttentionState) and state.unchanged_by(index)):
                state.apply(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        index = index.cpu().long()
        self.states = states
        self._batch_size = index.numel()
        if isinstance(self._read, Tensor):
            self._read = _one_number(self._read[index])
        if isinstance(self._dropped, Tensor):
            self._dropped = _one_number(self._dropped[index])
        self._made_by = [tuple(d[row] for row in rows) if isinstance(d, tuple) else d for d in self._made_by]
        self._changing = False
        return self

    def expand(self, copies: int) -> "Cache":
        """Repeat each row ``copies`` times, in place: row b becomes the rows b * copies … (b + 1) * copies − 1.

        Raises:
            ConfigError: fewer than one copy.
        """
        copies = whole("copies", copies, 1)
        return self.reorder(torch.arange(self.batch_size).repeat_interleave(copies))

    def select(self, indices: Sequence[int] | Int[Tensor, " R"]) -> "Cache":
        """An independent copy of some rows, in that order: see ``reorder``."""
        return self.clone().reorder(indices)

    def join(self, other: "Cache") -> None:
        """Take in copies of the rows of another cache after one's own.

        Raises:
            TensorError: it is of other blocks or of inputs of another length, or one of the two has read nothing.
            StaleCacheError: of another model, or a change of one was interrupted.
        """
        other.check_model(self.model)
        other.check_whole()
        kinds, others = ([type(state) for state in each.states] for each in (self, other))
        if (other.blocks, others) != (self.blocks, kinds):
            raise TensorError(f"expected a cache of the blocks {self.blocks}, got one of {other.blocks}")
        if not (bool((self.lengths > 0).all()) and bool((other.lengths > 0).all())):
            raise TensorError("expected caches of rows that have read something, got an empty one")
        capacity = None if self.capacity is None or other.capacity is None else max(self.capacity, other.capacity)
        joined = [_joined(*pair, capacity) for pair in zip(self.states, other.states, strict=True)]
        lengths = torch.cat([self.lengths, other.lengths])
        dropped = torch.cat([self._per_row(self._dropped), other._per_row(other._dropped)])
        made_by: list[Digest | None] = [
            None if mine is None or theirs is None else self._rows(mine) + other._rows(theirs)
            for mine, theirs in zip(self._made_by, other._made_by, strict=True)
        ]
        self.begin()
        self.states, self._made_by, self.capacity = joined, made_by, capacity
        self._batch_size += other.batch_size
        self._read, self._dropped = _one_number(lengths), _one_number(dropped)
        self._changing = False

    def clone(self) -> "Cache":
        """An independent copy."""
        self.check_whole()
        states = [state.copy() for state in self.states]
        other = Cache(states, self.batch_size, self.capacity, self.model, self.grow, self.first)
        other._read, other._dropped, other._made_by = self._read, self._dropped, self._made_by
        return other

    def prune(self, keep: int, sinks: int = 0) -> None:
        """Let attention forget all but the first ``sinks`` and the last ``keep`` tokens of each row, to make room.

        State-space blocks have read them and remember what they do. This is an approximation (attention sinks: arXiv
        2309.17453): what follows is no longer what the whole sequence would give. Sliding windows are not touched.

        Raises:
            ConfigError: fewer than one token kept, or a negative number of sinks.
        """
        keep, sinks = whole("keep", keep, 1), whole("sinks", sinks, 0)
        ordered = [state for state in self.states if isinstance(state, AttentionState) and state.window is None]
        held = self.lengths - self._per_row(self._dropped)
        excess = (held - keep - sinks).clamp(min=0)
        if not ordered or not bool(excess.any()):
            return
        self.begin()
        place = torch.arange(int((held - excess).max()))
        index = place + torch.where(place[None] < sinks, 0, excess[:, None])
        for state in ordered:
            state.gather(index.clamp(max=state.slots - 1).to(state.keys.device))
        self._dropped = _one_number(self._per_row(self._dropped) + excess)
        self._changing = False

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        self.check_whole()
        lengths = {"read": self.lengths, "dropped": self._per_row(self._dropped)}
        about = {name: getattr(self, name) for name in ("batch_size", "capacity", "model", "grow", "first")}
        write_states(Path(path), self.states, lengths, about | {"made_by": self._made_by})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Cache":
        """Read what ``save`` wrote; nothing is unpickled or executed. The model is checked when the cache is used.

        Args:
            device: that of the model that goes on from it.

        Raises:
            BundleError: the file is missing, damaged, or no cache.
        """
        path = Path(path)
        states, lengths, about = read_states(path, ("read", "dropped"))
        try:
            cache = cls(states, about["batch_size"], about["capacity"], about["model"], about["grow"], about["first"])
            cache._made_by = [tuple(d) if isinstance(d, list) else d for d in about["made_by"]]
            cache._read, cache._dropped = _one_number(lengths["read"]), _one_number(lengths["dropped"])
        except (KeyError, TypeError) as error:
            raise BundleError(f"expected a cache in {path}, got one without {error}") from None
        if not cache._fits_together():
            got = {name: each for name, each in about.items() if name != "made_by"}
            raise BundleError(
                f"expected sizes and scales of {len(states)} states in the cache {path}, got {got!r:.120}"
            )
        for state in states:
            state.apply(lambda tensor: tensor.to(device))
        return cache

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens of each row, where there is less."""
        capacity = whole("capacity", capacity, 0)
        if self.capacity is None or capacity <= self.capacity:
            return
        self.begin()
        states = [copy(state) for state in self.states]
        for state in states:
            if isinstance(state, AttentionState):
                state.reserve(capacity)
        self.states, self.capacity = states, capacity
        self._changing = False

    def check_room(self, batch_size: int, tokens: int | Tensor) -> None:
        """Raise unless ``batch_size`` is the cache's and each row has room for its ``tokens`` (B,); or grow."""
        if batch_size != self.batch_size:
            raise TensorError(f"expected a batch of {self.batch_size} rows for this cache, got {batch_size}")
        if self.capacity is None:
            return
        held = self._read - self._dropped + (tokens.cpu() if isinstance(tokens, Tensor) else tokens)
        need = int(held.max()) if isinstance(held, Tensor) else held
        if need <= self.capacity:
            return
        if not self.grow:
            raise CacheFullError(f"expected at most {self.capacity} tokens in this cache, got {need}")
        self.reserve(max(need, 2 * self.capacity))

    def check_model(self, model: str) -> None:
        """Raise ``StaleCacheError`` unless the cache was made by this model: its weights, settings and dtype."""
        if model != self.model:
            raise StaleCacheError(f"expected a cache of model {model}, got one of model {self.model}")

    def check_whole(self) -> None:
        """Raise ``StaleCacheError`` if a change was interrupted."""
        if self._changing:
            raise StaleCacheError("expected a whole cache, got one that was interrupted as it changed: reset it")

    def begin(self, scales: Sequence[Digest] | None = None) -> None:
        """Before anything changes a state: until the change has ended, as by ``end``, the cache is spoilt.

        Args:
            scales: digests of those that each block is about to read with; they are remembered.

        Raises:
            StaleCacheError: it is spoilt already, or a block was filled under other scales.
        """
        self.check_whole()
        if scales is not None:
            for block, made_by, digest in zip(self.blocks, self._made_by, scales, strict=True):
                if made_by is not None and made_by is not digest:
                    self._check_block(block, self._rows(made_by), self._rows(digest))
            self._made_by = [made_by or digest for made_by, digest in zip(self._made_by, scales, strict=True)]
        self._changing = True
        here = torch.is_inference_mode_enabled()
        if self._inference and not here:
            for state in self.states:
                state.leave_inference_mode()
        self._inference = here

    def count(self, tokens: int | Tensor) -> None:
        """Count ``tokens`` (B,) more for each row, after all blocks have read them."""
        if isinstance(tokens, Tensor):
            tokens = _one_number(tokens.cpu())
        total = self._read + tokens
        self._read = _one_number(total) if isinstance(total, Tensor) else total

    def end(self) -> None:
        """End the change that began."""
        self._changing = False

    def _fits_together(self) -> bool:
        """Whether what a file says of the states can be true."""
        sizes = self.first, *(() if self.capacity is None else (self.capacity,))
        rows = [digest for digest in self._made_by if isinstance(digest, tuple)]
        others = [digest for digest in self._made_by if not isinstance(digest, tuple)]
        held = self.lengths - self._per_row(self._dropped)
        return (
            all(type(size) is int and size >= 0 for size in sizes)
            and all(state.has_room_for(self.capacity) for state in self.states if isinstance(state, AttentionState))
            and int(held.min()) >= 0
            and (self.capacity is None or int(held.max()) <= self.capacity)
            and type(self.grow) is bool
            and isinstance(self.model, str)
            and len(self._made_by) == len(self.states)
            and all(digest is None or isinstance(digest, str) for digest in others)
            and all(len(row) == self.batch_size and all(isinstance(own, str) for own in row) for row in rows)
        )

    def _check_block(self, block: int, made_by: tuple[str, ...], digests: tuple[str, ...]) -> None:
        for row, (expected, got) in enumerate(zip(made_by, digests, strict=True)):
            if expected != got:
                raise StaleCacheError(
                    f"expected the scales that filled block {block} ({expected or 'none'}) for row {row}, "
                    f"got others ({got or 'none'})"
                )

    def _rows(self, digest: Digest) -> tuple[str, ...]:
        return digest if isinstance(digest, tuple) else (digest,) * self.batch_size

    def _per_row(self, number: int | Tensor) -> Tensor:
        return number if isinstance(number, Tensor) else torch.full((self.batch_size,), number)


def _layer_info(state: State) -> LayerInfo:
    tensors = list(state.tensors().values())
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "none"
    return LayerInfo(type(state).__name__, dtype, nbytes)


def _joined(mine: State, theirs: State, capacity: int | None) -> State:
    """The rows of both states, those of attention with as much room."""
    both = [copy(each) for each in (mine, theirs)]
    for each in both:
        if isinstance(each, AttentionState):
            slots = capacity if capacity is not None else max(other.slots for other in both)  # type: ignore[attr-defined]
            each.reserve(slots)
    own, others = (each.tensors() for each in both)
    if own.keys() != others.keys():
        raise TensorError(f"expected states of {sorted(own)}, got {sorted(others)}")
    for name, tensor in own.items():
        if tensor.shape[1:] != (got := others[name].shape[1:]):  # as of what encoders read of other inputs
            raise TensorError(f"expected {name} of shape {tuple(tensor.shape[1:])} in each row, got {tuple(got)}")
        setattr(both[0], name, torch.cat([tensor, others[name]]))
    return both[0]


def _one_number(numbers: Tensor) -> int | Tensor:
    """The number, where all are the same."""
    first = numbers[0]
    return int(first) if bool((numbers == first).all()) else numbers
