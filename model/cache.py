"""The states that let a model continue a sequence: preallocated, explicit, and tied to what made them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_dispatch.errors import CacheFullError, StaleCacheError, TensorError

__all__ = ["AttentionState", "Cache", "MambaState"]


@dataclass(eq=False)
class MambaState:
    """``conv`` (B, C, d_conv − 1): the last inputs of the convolution; ``ssm`` (B, H, P, N): the scan's state."""

    conv: Tensor
    ssm: Tensor


@dataclass(eq=False)
class AttentionState:
    """``keys`` and ``values`` (B, kv_heads, capacity, head width); row b is filled up to the cache's ``lengths[b]``."""

    keys: Tensor
    values: Tensor


class Cache:
    """Per-block states of a batch, filled in place by ``model(..., cache=cache)``.

    Each row has a length of its own: padding never enters a state. The cache remembers the model and, block by block,
    the scales that made it; continuing a block under other scales raises ``StaleCacheError``.

    Attributes:
        states: one ``MambaState`` or ``AttentionState`` per block.
        lengths: tokens read so far by each row, (B,).
        capacity: most tokens that a row can hold.
    """

    def __init__(self, states: list[MambaState | AttentionState], batch_size: int, capacity: int, model: str) -> None:
        self.states = states
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        self.capacity = capacity
        self._model = model
        self._made_by: list[str | None] = [None] * len(states)

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        tensors = [tensor for state in self.states for tensor in vars(state).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def check_room(self, batch_size: int, tokens: Tensor) -> None:
        """Raise unless ``batch_size`` is the cache's and each row has room for its number of ``tokens`` (B,)."""
        if batch_size != self.batch_size:
            raise TensorError(f"expected a batch of {self.batch_size} rows for this cache, got {batch_size}")
        need = int((self.lengths + tokens).max())
        if need > self.capacity:
            raise CacheFullError(f"expected at most {self.capacity} tokens in this cache, got {need}")

    def check_model(self, model: str) -> None:
        """Raise ``StaleCacheError`` unless the cache was made by this model: its weights' fingerprint and dtype."""
        if model != self._model:
            raise StaleCacheError(f"expected a cache of model {model}, got one of model {self._model}")

    def check_block(self, block: int, digest: str) -> None:
        """Raise ``StaleCacheError`` if block ``block`` was filled under other scales; else remember these."""
        made_by = self._made_by[block]
        if made_by is not None and made_by != digest:
            expected, got = made_by or "none", digest or "none"
            raise StaleCacheError(f"expected the scales that filled block {block} ({expected}), got others ({got})")
        self._made_by[block] = digest

    def advance(self, tokens: Tensor) -> None:
        """Count ``tokens`` (B,) more for each row, after all blocks have read them."""
        self.lengths = self.lengths + tokens.to(self.lengths)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        for state in self.states:
            for tensor in vars(state).values():
                tensor.zero_()
        self.lengths = torch.zeros_like(self.lengths)
        self._made_by = [None] * len(self.states)
