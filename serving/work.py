"""What an engine is asked for, and what it tells while it works on it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import BayesDispatchError
from bayes_dispatch.inference.two_pass.blends import Blend
from bayes_dispatch.inference.two_pass.prompts import Writing

__all__ = [
    "Begun",
    "BusyError",
    "Ended",
    "Engine",
    "EngineState",
    "Event",
    "Message",
    "Ticket",
    "UpstreamError",
    "Work",
    "Wrote",
]


class BusyError(BayesDispatchError):
    """No room for more waiting requests.

    Attributes:
        retry_after: seconds after which there may be some.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """An engine may be in another process."""
        return type(self), (str(self), self.retry_after)


class UpstreamError(BayesDispatchError):
    """A server that an engine asks cannot be reached, fails, or answers what it should not."""


@dataclass(frozen=True)
class Message:
    """A turn of a conversation. role: ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class Work:
    """One text to go on with.

    Attributes:
        prompt: the text, or the turns of a conversation, of which the user has the last.
        blend: how its posterior becomes particles.
        writing: how it is continued; ``None`` to dispatch it alone. shorter: by fewer tokens, where the model has not
            room for as many.
        seed: of posterior draws and sampling: the same request with the same seed gives the same answer.
        false_alarm_rate, abstain: see ``TwoPassGenerator.generate``.
        owner: whose it is: owners take turns in the queue.
        patience: seconds after which it is given up, wherever it is; ``None`` for ever.
    """

    prompt: str | tuple[Message, ...]
    blend: Blend
    writing: Writing | None
    seed: int
    false_alarm_rate: float | None = None
    abstain: bool = False
    owner: str = ""
    patience: float | None = None
    shorter: bool = False


@dataclass(frozen=True, eq=False)
class Begun:
    """The prompt has been dispatched.

    Attributes:
        posterior: of the one prompt, without calibrated intervals. prompt_tokens: what was read.
        p_value: of the gate, ``None`` where it was not asked. foreign: whether the gate found it foreign.
        evidence: what the posterior is of. prior_events: labels and rewards that the prior had taken in.
    """

    posterior: DispatchPosterior
    prompt_tokens: int
    p_value: float | None
    foreign: bool
    evidence: Evidence
    prior_events: int


@dataclass(frozen=True, eq=False)
class Wrote:
    """One more token. Its fields are those of ``Streamed``; ``weights`` (K + 1,) are those before it.

    Entropy and mutual information are ``None`` where an engine cannot tell them.
    """

    text: str
    token_id: int
    log_probability: float
    predictive_entropy: float | None
    mutual_information: float | None
    weights: np.ndarray


@dataclass(frozen=True)
class Ended:
    """Nothing comes after this.

    Attributes:
        reason: ``stop`` where the text ended by itself or with a stop, ``length`` at its most tokens, ``dispatched``
            where nothing else was asked, ``abstained`` where the gate found the prompt foreign and nothing was to be
            written, ``late`` when patience was over, ``closed`` when the engine shut down, ``cancelled``; ``failed``
            where the request asked for what cannot be, and ``broken`` where something of ours failed.
        error: what failed.
    """

    reason: str
    error: BaseException | None = None


Event = Begun | Wrote | Ended


@runtime_checkable
class Ticket(Protocol):
    """Work that an engine has taken."""

    def cancel(self) -> None:
        """Want no more of it: its rows are free before the next token. Harmless when it has ended."""
        ...


@dataclass(frozen=True)
class EngineState:
    """What an engine is at.

    Attributes:
        waiting, running: requests. waiting_tokens: of the waiting ones' prompts, with those that they may write.
        rows: of the model, that are run together. cache_bytes: of what they keep.
        prompt_tokens, new_tokens, steps: so far. closing: whether new work is refused.
        replicas: engines that answer, where this one stands for several.
        serves: whether it can answer: there is an engine, and the server that it asks is there and is what it was.
    """

    waiting: int = 0
    running: int = 0
    waiting_tokens: int = 0
    rows: int = 0
    cache_bytes: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    closing: bool = False
    replicas: int = 1
    serves: bool = True

    def counted(self, **more: int) -> "EngineState":
        """The state after more of what is counted so far."""
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})


@runtime_checkable
class Engine(Protocol):
    """Runs work; may be called from any thread."""

    def submit(self, work: Work, tell: Callable[[Event], None]) -> Ticket:
        """Take work on.

        Args:
            tell: called on the engine's thread: with ``Begun``, each ``Wrote``, and once, last of all, ``Ended``. It
                must be quick, and not raise.

        Raises:
            PromptError: a prompt that is empty, no UTF-8 or too long. ConfigError: a setting that does not fit, or
                more than the caches can ever hold. BusyError: the queue is full.
        """
        ...

    @property
    def state(self) -> EngineState: ...

    def close(self, patience: float) -> None:
        """Refuse new work, give what there is so many seconds to end (of several calls the fewest), and stop."""
        ...
