"""The prior that a dispatcher serves prompts under: in memory, and in a file where it is to outlive the process."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bayes_dispatch.arguments import shown
from bayes_dispatch.dispatcher.prior.file import update_prior, write_prior
from bayes_dispatch.dispatcher.prior.online import PriorState, observe
from bayes_dispatch.errors import ConfigError

__all__ = ["ServingPrior"]


class ServingPrior:
    """A state that events replace by the next. Threads, and processes that keep theirs in one file, lose no event.

    A copy keeps a state of its own, as do those that it is sent to; :meth:`handed_on` goes on with the file.

    Args:
        state: before the events to come.
    """

    def __init__(self, state: PriorState) -> None:
        self._state = state
        self._file: Path | None = None
        self._lock = threading.Lock()  # held while the state is read, changed and put back

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": self._state}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        ServingPrior.__init__(self, kept["_state"])

    @property
    def state(self) -> PriorState:
        """The state of this moment."""
        return self._state

    @state.setter
    def state(self, state: PriorState) -> None:
        if not isinstance(state, PriorState):
            raise ConfigError(f"expected a PriorState, got {shown(state)}")
        if state.names != self._state.names:
            raise ConfigError(f"expected a prior over {list(self._state.names)}, got one over {list(state.names)}")
        with self._lock:
            if self._file is not None:
                write_prior(self._file, state)
            self._state = state

    def take_in(self, likelihoods: Float[np.ndarray, "event component"], forgetting: float) -> PriorState:
        """The state after events, as :func:`observe` has it; each is added to what the file has by then."""
        after = partial(observe, likelihoods=likelihoods, forgetting=forgetting)
        with self._lock:
            if self._file is None:
                self._state = after(self._state)
            else:
                self._state = update_prior(self._file, self._state, after)
            return self._state

    def keep(self, path: str | Path) -> PriorState:
        """Keep it in a file from now on: the state that is there, or else this one."""
        with self._lock:
            self._state = update_prior(path, self._state, lambda state: state)
            self._file = Path(path).absolute()
            return self._state

    def handed_on(self) -> ServingPrior:
        """One that keeps the same file, if any, for a dispatcher that takes the place of this one's."""
        with self._lock:
            new = ServingPrior(self._state)
            new._file = self._file
            return new
