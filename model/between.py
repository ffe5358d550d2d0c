"""Hidden states between a model's blocks, for whoever asks for them in the thread that runs these."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.errors import ConfigError

__all__ = ["States", "asked", "asking", "tell"]


class States:
    """What came out of the blocks that were asked for, piece by piece."""

    def __init__(self, depths: Sequence[int]) -> None:
        self._pieces: dict[int, list[Tensor]] = {depth: [] for depth in depths}

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(self._pieces)

    def add(self, depth: int, states: Float[Tensor, "R T D"]) -> None:
        """What came out of one block for further tokens; nothing unless it was asked for."""
        if depth in self._pieces:
            self._pieces[depth].append(states)

    def joined(self) -> tuple[Float[Tensor, "R T D"], ...]:
        """In the order in which they were asked for; once, so that there are not all of them twice.

        Raises:
            ConfigError: a block did not run.
        """
        if silent := [depth for depth, pieces in self._pieces.items() if not pieces]:
            raise ConfigError(f"expected a model that runs all its blocks, got one without number {silent[0]}")
        return tuple(_joined(self._pieces.pop(depth)) for depth in self.depths)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


_asked: ContextVar[tuple[object, States]] = ContextVar("asked", default=(None, States(())))


@contextmanager
def asking(model: object, blocks: range, depths: Sequence[int]) -> Iterator[States]:
    """Ask what comes out of a model after so many blocks each, while some of its blocks run in this thread.

    Raises:
        ConfigError: a depth that these blocks do not reach.
    """
    if wrong := [depth for depth in depths if not blocks.start < depth <= blocks.stop]:
        raise ConfigError(f"expected depths of {blocks.start + 1} … {blocks.stop}, got {wrong[0]}")
    states = States(depths)
    token = _asked.set((model, states))
    try:
        yield states
    finally:
        _asked.reset(token)


def asked(model: object) -> bool:
    """Whether anything between the blocks of a model is asked for in this thread."""
    by, states = _asked.get()
    return by is model and bool(states.depths)


def tell(model: object, depth: int, states: Float[Tensor, "R T D"]) -> None:
    """Tell what comes out of a model after so many blocks."""
    by, found = _asked.get()
    if by is model:
        found.add(depth, states)
