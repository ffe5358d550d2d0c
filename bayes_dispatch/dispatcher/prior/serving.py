"""The prior that a dispatcher serves prompts under: in memory, and in a file where it is to outlive the process."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bayes_dispatch.dispatcher.prior.file import update_prior, write_prior
from bayes_dispatch.dispatcher.prior.online import PriorState, observe
from bayes_dispatch.errors import ConfigError

__all__ = ["ServingPrior"]


class ServingPrior:
    """A state that events replace by the next. Threads, and processes that keep theirs in one file, lose no event.

    A copy keeps a state of its own: that of the file counts the events of one dispatcher alone.

    Args:
        state: before the events to come. fingerprint: of the dispatcher that serves under it.
    """

    def __init__(self, state: PriorState, fingerprint: str) -> None:
        self._state, self._fingerprint = state, fingerprint
        self._file: Path | None = None
        self._lock = threading.Lock()  # held while the state is read, changed and put back

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": self._state, "_fingerprint": self._fingerprint}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        ServingPrior.__init__(self, kept["_state"], kept["_fingerprint"])

    @property
    def state(self) -> PriorState:
        """The state of this moment."""
        return self._state

    @state.setter
    def state(self, state: PriorState) -> None:
        if state.names != self._state.names:
            raise ConfigError(f"expected a prior over {list(self._state.names)}, got one over {list(state.names)}")
        with self._lock:
            if self._file is not None:
                write_prior(self._file, state, self._fingerprint)
            self._state = state

    def take_in(self, likelihoods: Float[np.ndarray, "event component"], forgetting: float) -> PriorState:
        """The state after events, as :func:`observe` has it; each is added to what the file has by then."""
        after = partial(observe, likelihoods=likelihoods, forgetting=forgetting)
        with self._lock:
            if self._file is None:
                self._state = after(self._state)
            else:
                self._state = update_prior(self._file, self._state, self._fingerprint, after)
            return self._state

    def keep(self, path: str | Path) -> PriorState:
        """Keep it in a file from now on: the state that is there, or else this one."""
        with self._lock:
            self._state = update_prior(path, self._state, self._fingerprint, lambda state: state)
            self._file = Path(path).absolute()
            return self._state
