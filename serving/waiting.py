"""Requests that wait for their turn: one of each owner, round and round, and no more than there is room for."""

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from time import monotonic

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.chat.form import Form
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.system import System, check_gate
from bayes_dispatch.serving.reading import Heard, hear, particles_of, rows_of
from bayes_dispatch.serving.work import BusyError, Event, Work

__all__ = ["Request", "WaitingLine"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """Work that was taken on.

    Attributes:
        deadline: on the monotonic clock. wanted: whether somebody still waits for it.
        particles: what its blend makes of some prompt's posterior; ``None`` where nothing is written.
    """

    work: Work
    heard: Heard
    tell: Callable[[Event], None]
    deadline: float
    wanted: bool = True
    particles: Particles | None = None

    @classmethod
    def of(
        cls,
        system: System,
        form: Form,
        some: DispatchPosterior,
        longest: int | None,
        work: Work,
        tell: Callable[[Event], None],
    ) -> "Request":
        """Work that comes now.

        Args:
            form: of conversations. some: posterior of some prompt: what a blend cannot make of that it can of none.
            longest: tokens that the model can read.

        Raises:
            PromptError, ConfigError: see ``Engine.submit``.
        """
        heard = hear(system.tokenizer, form, longest, work)
        if work.false_alarm_rate is not None:
            check_gate(system, work.false_alarm_rate)
        elif work.abstain:
            raise ConfigError("expected a false_alarm_rate to abstain at, got None")
        deadline = monotonic() + (math.inf if work.patience is None else work.patience)
        particles = None if work.writing is None else particles_of(work.blend, some)
        return cls(work, heard, tell, deadline, particles=particles)

    def cancel(self) -> None:
        """See ``Ticket``."""
        self.wanted = False

    @property
    def tokens(self) -> int:
        """Of the prompt, and at most of the answer."""
        return self.heard.tokens

    @property
    def rows(self) -> int:
        """Of the model that it may need."""
        return 1 if self.particles is None else rows_of(self.particles)

    @property
    def width(self) -> int:
        """Particles that say what may follow."""
        return 0 if self.particles is None else self.particles.mass.shape[1]

    def hear(self, event: Event) -> None:
        """``tell`` an event; who cannot bear it wants no more."""
        try:
            self.tell(event)
        except Exception:
            logger.exception("telling a client failed")
            self.cancel()

    def over(self) -> str | None:
        """Why nothing more is to be done for it: ``cancelled`` or ``late``."""
        if not self.wanted:
            return "cancelled"
        return "late" if monotonic() > self.deadline else None


class WaitingLine:
    """Bounded, and fair to owners.

    Args:
        requests, tokens: at most, and half of that for each owner who has a name, so that one cannot fill the line for
            all; where an owner has nothing in it, one request may have more tokens.
    """

    def __init__(self, requests: int, tokens: int) -> None:
        self._most, self._most_tokens = requests, tokens
        self._of: dict[str, deque[Request]] = {}  # by owner, whose turn is next first

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[Request]:
        return (request for line in self._of.values() for request in line)

    @property
    def tokens(self) -> int:
        """Of all that wait."""
        return sum(request.tokens for request in self)

    def add(self, request: Request, retry_after: int) -> None:
        """At the end of its owner's line.

        Raises:
            BusyError: there are too many.
        """
        owner = request.work.owner
        self._check(list(self), self._most, self._most_tokens, request, retry_after)
        if owner:
            own = list(self._of.get(owner, ()))
            self._check(own, -(-self._most // 2), -(-self._most_tokens // 2), request, retry_after)
        self._of.setdefault(owner, deque()).append(request)

    @staticmethod
    def _check(waiting: list[Request], most: int, most_tokens: int, request: Request, retry_after: int) -> None:
        if len(waiting) >= most:
            raise BusyError(f"expected at most {most} waiting requests, got one more", retry_after)
        if waiting and sum(each.tokens for each in waiting) + request.tokens > most_tokens:
            raise BusyError(f"expected at most {most_tokens} waiting tokens, got {request.tokens} more", retry_after)

    def next(
        self, busy: Sequence[Request], places: int, fits: Callable[[Request], bool], but: Set[str] = frozenset()
    ) -> Request | None:
        """Take out the one whose turn it is.

        Args:
            busy: those that have places, of which there are so many: an owner with half of these lets others go first.
            fits: whether there is room for it. While there is none nobody goes: small ones would overtake it for ever.
            but: owners who are passed over.
        """
        has = Counter(request.work.owner for request in busy)
        owners = [owner for owner in self._of if owner not in but]
        owner = min(owners, key=lambda owner: 2 * has[owner] >= places, default=None)  # the first of those with less
        if owner is None or not fits(self._of[owner][0]):
            return None
        line = self._of.pop(owner)
        request = line.popleft()
        if line:
            self._of[owner] = line  # at the end
        return request

    def clear(self) -> list[Request]:
        """Take out all."""
        gone, self._of = list(self), {}
        return gone

    def drop(self) -> list[tuple[Request, str]]:
        """Take out those that nobody waits for any more, and why."""
        gone = [(request, reason) for request in self if (reason := request.over())]
        if gone:
            out = {id(request) for request, _ in gone}
            left = {owner: deque(r for r in line if id(r) not in out) for owner, line in self._of.items()}
            self._of = {owner: line for owner, line in left.items() if line}
        return gone
