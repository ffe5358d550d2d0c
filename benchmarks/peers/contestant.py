"""What the benchmark asks of a model, whoever wrote it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Contestant", "Entry", "Group"]


class Contestant(Protocol):
    """A causal language model, with or without a cache that works."""

    @property
    def module(self) -> nn.Module:
        """Its weights."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T) without a cache, through which gradients flow."""
        ...

    def prefill(self, ids: Tensor) -> object:
        """Read a prompt (1, T) as this library does before it generates: logits of all tokens, and a cache if any."""
        ...

    def start(self, room: int) -> Any:
        """An empty cache for one row of ``room`` tokens."""
        ...

    def extend(self, ids: Tensor, state: Any) -> Tensor:
        """Logits (1, T, V) of the tokens after those in ``state``, which takes them in, in place."""
        ...

    def clone(self, state: Any) -> Any:
        """An independent copy of a cache."""
        ...


@dataclass(frozen=True)
class Entry:
    """A model to build: its name, what it consists of, and whether it is ours, in which case it may not fail."""

    name: str
    blocks: str
    build: Callable[[], Contestant]
    ours: bool = False


@dataclass(frozen=True)
class Group:
    """Models of one kind and size; the first is the one that the others are compared with."""

    name: str
    title: str
    entries: tuple[Entry, ...]
