"""Requests that wait for their turn: one of each owner, round and round, and no more than there is room for."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic

from bayes_dispatch.serving.reading import Heard
from bayes_dispatch.serving.work import BusyError, Event, Work

__all__ = ["Request", "WaitingLine"]


@dataclass(eq=False)
class Request:
    """Work that was taken on.

    Attributes:
        deadline: on the monotonic clock. wanted: whether somebody still waits for it.
    """

    work: Work
    heard: Heard
    tell: Callable[[Event], None]
    deadline: float
    wanted: bool = True

    def cancel(self) -> None:
        """See ``Ticket``."""
        self.wanted = False

    @property
    def tokens(self) -> int:
        """Of the prompt, and at most of the answer."""
        return len(self.heard) + (0 if self.work.writing is None else self.work.writing.max_new_tokens)

    def over(self) -> str | None:
        """Why nothing more is to be done for it: ``cancelled`` or ``late``."""
        if not self.wanted:
            return "cancelled"
        return "late" if monotonic() > self.deadline else None


class WaitingLine:
    """Bounded, and fair to owners.

    Args:
        requests, tokens: at most; a request alone may have more tokens than that.
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
        count, tokens = len(self), self.tokens
        if count >= self._most:
            raise BusyError(f"expected at most {self._most} waiting requests, got one more", retry_after)
        if count and tokens + request.tokens > self._most_tokens:
            raise BusyError(
                f"expected at most {self._most_tokens} waiting tokens, got {request.tokens} more", retry_after
            )
        self._of.setdefault(request.work.owner, deque()).append(request)

    def next(self) -> Request | None:
        """The one whose turn it is."""
        for owner in self._of:
            line = self._of.pop(owner)
            request = line.popleft()
            if line:
                self._of[owner] = line  # at the end
            return request
        return None

    def drop(self) -> list[tuple[Request, str]]:
        """Take out those that nobody waits for any more, and why."""
        gone = [(request, reason) for request in self if (reason := request.over())]
        if gone:
            out = {id(request) for request, _ in gone}
            left = {owner: deque(r for r in line if id(r) not in out) for owner, line in self._of.items()}
            self._of = {owner: line for owner, line in left.items() if line}
        return gone
