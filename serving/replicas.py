"""Many engines as one: work goes to one of them, and to another one if that one is gone or has no room.

The same work with the same seed gives the same answer anywhere. So work that was broken off is begun anew, what it told
before is not told twice, and it goes on where it was; a replica that comes to another text ends it with an error.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import fields, replace
from threading import Lock, Thread
from time import monotonic
from typing import Protocol, runtime_checkable

import numpy as np

from bayes_dispatch.errors import BayesDispatchError
from bayes_dispatch.serving.work import Begun, BusyError, Ended, Engine, EngineState, Event, UpstreamError, Work, Wrote

__all__ = ["LostError", "Replicas", "ReplicatedEngine", "events_of"]

logger = logging.getLogger(__name__)

TRIES = 3  # replicas that may be lost with a request: one that breaks what it runs on must not break them all
PAUSE = 0.2  # seconds after a replica is lost, or none was reached
REPORTS = 1.0  # seconds between two questions for the replicas' states
SUMMED = ("prompt_tokens", "new_tokens", "steps")  # that never fall, though replicas go


class LostError(Exception):
    """A request's replicas were lost, or two of them wrote different texts."""


@runtime_checkable
class Replicas(Protocol):
    """Engines elsewhere."""

    def run(self, work: Work, tried: Sequence[str]) -> AsyncGenerator[tuple[str | None, Sequence[Event]], None]:
        """Run work on one of them; it is wanted no more when the generator is closed.

        Args:
            tried: names of those that should not have it, if there are others.

        Yields:
            The name of the one that has it, and what it tells: nothing, as soon as it has it. The last event is
            ``Ended``, ``failed`` with a ``BusyError`` where there is no room; where the replica is gone it is
            ``closed``, or there is none. No name where all is full.
        """
        ...

    async def states(self) -> Mapping[str, EngineState] | None:
        """Of those that answer, by name; ``None`` where that is not known now."""
        ...


async def events_of(engine: Engine, work: Work) -> AsyncGenerator[list[Event], None]:
    """What an engine tells of work, in as many lists as it is asked for; it is cancelled when the generator is closed.

    What the engine refuses is ``Ended("failed")``. What it does not end because it ends itself, or because a server
    that it asks fails, is ``closed``: another replica may.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def tell(event: Event) -> None:
        with suppress(RuntimeError):  # the loop is over, and nobody hears
            loop.call_soon_threadsafe(queue.put_nowait, event)

    try:
        ticket = engine.submit(work, tell)
    except BayesDispatchError as error:
        gone = isinstance(error, BusyError) and engine.state.closing
        yield [Ended("closed") if gone else Ended("failed", error)]
        return
    try:
        while True:
            events = [await queue.get()]
            while not queue.empty():
                events.append(queue.get_nowait())
            last = events[-1]
            if isinstance(last, Ended) and last.reason == "broken" and _elsewhere(engine, last):
                events[-1] = Ended("closed", last.error)
            yield events
            if isinstance(last, Ended):
                return
    finally:
        ticket.cancel()


def _elsewhere(engine: Engine, broken: Ended) -> bool:
    """Whether another replica may do what this one has not."""
    return engine.state.closing or isinstance(broken.error, UpstreamError)


class ReplicatedEngine:
    """See ``work.Engine``. What a replica refuses is told as ``Ended("failed")``; only a closing engine refuses itself.

    Args:
        replicas: have been started, and are ended by whoever did.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._alive: Mapping[str, EngineState] = {}  # what each told last
        self._counts: dict[str, EngineState] = {}  # the last of each that ever was
        self._closing = self._cut = False
        self._lock = Lock()  # guards the three above
        self._tasks: set[asyncio.Task[Ended]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._work, name="replicas", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._look(), self._loop).result()

    def submit(self, work: Work, tell: Callable[[Event], None]) -> "_Ticket":
        """See ``work.Engine``.

        Raises:
            BusyError: the engine closes.
        """
        ticket = _Ticket(self._loop)
        with self._lock:
            if self._closing:
                raise BusyError("expected a request to a server that is not shutting down, got one that came late", 5)
            self._loop.call_soon_threadsafe(self._start, work, tell, ticket)
        return ticket

    @property
    def state(self) -> EngineState:
        """The sums over replicas, as they were a second ago at most; counts of those that are gone stay in."""
        with self._lock:
            alive, counts, closing = self._alive.values(), self._counts.values(), self._closing
        serves = any(state.serves for state in alive)
        sums = {
            each.name: sum(getattr(state, each.name) for state in (counts if each.name in SUMMED else alive))
            for each in fields(EngineState)
        }
        return EngineState(**sums | {"closing": closing, "serves": serves})

    def close(self, patience: float) -> None:
        """See ``work.Engine``."""
        with self._lock:
            self._closing = True
            with suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._close_within, patience)
        self._thread.join()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        watching = self._loop.create_task(self._watch())
        try:
            self._loop.run_forever()
        finally:
            watching.cancel()
            self._loop.run_until_complete(asyncio.gather(watching, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REPORTS)
            try:
                await self._look()
            except Exception:
                logger.exception("asking the replicas for their states failed")

    async def _look(self) -> None:
        alive = await self._replicas.states()
        if alive is None:
            return
        with self._lock:
            self._alive = alive
            self._counts = {**self._counts, **alive}

    def _close_within(self, patience: float) -> None:
        self._loop.call_later(patience, self._cut_off)
        self._stop_if_over()

    def _cut_off(self) -> None:
        self._cut = True
        for task in self._tasks:
            task.cancel()

    def _stop_if_over(self) -> None:
        if self._closing and not self._tasks:
            self._loop.stop()

    def _start(self, work: Work, tell: Callable[[Event], None], ticket: "_Ticket") -> None:
        task = self._loop.create_task(self._run(work, tell))
        ticket.task = task
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._end(task, tell))

    def _end(self, task: "asyncio.Task[Ended]", tell: Callable[[Event], None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            tell(Ended("closed" if self._cut else "cancelled"))
        else:
            error = task.exception()
            tell(task.result() if error is None else Ended("broken", error))
        self._stop_if_over()

    async def _run(self, work: Work, tell: Callable[[Event], None]) -> Ended:
        """Try until there is an end that another try would not change."""
        try:
            async with asyncio.timeout(work.patience):
                return await self._try(work, _Telling(tell))
        except TimeoutError:
            return Ended("late")

    async def _try(self, work: Work, telling: "_Telling") -> Ended:
        begun, lost = monotonic(), 0
        tried: list[str] = []
        while True:
            left = work.patience if work.patience is None else max(work.patience - (monotonic() - begun), 1e-3)
            reached: str | None = None
            ended = Ended("closed")
            telling.again()
            async with aclosing(self._replicas.run(replace(work, patience=left), tried)) as told:
                async for reached, events in told:  # noqa: B007
                    for event in events:
                        if isinstance(event, Ended):
                            ended = event
                        else:
                            telling(event)
            if isinstance(ended.error, BusyError):
                with self._lock:
                    others = self._alive.keys() - {reached, *tried}
                if reached is None or reached in tried or not others:
                    return ended
            elif ended.reason != "closed":
                return ended
            else:
                lost += reached is not None
                if lost == TRIES and isinstance(ended.error, UpstreamError):
                    return Ended("broken", ended.error)
                if lost == TRIES:
                    raise LostError(
                        f"expected a replica that ends its work, got none in {TRIES} tries"
                    ) from ended.error
                await asyncio.sleep(PAUSE)
            if reached is not None and reached not in tried:
                tried = [*tried, reached]


class _Ticket:
    """See ``work.Ticket``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.task: asyncio.Task[Ended] | None = None

    def cancel(self) -> None:
        """See ``work.Ticket``."""
        with suppress(RuntimeError):  # the loop is closed, so it has ended
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


class _Telling:
    """Tells what several tries tell, each event once."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell
        self._begun: Begun | None = None
        self._ids: list[int] = []
        self._place = 0  # tokens that this try has told

    def again(self) -> None:
        """A try begins."""
        self._place = 0

    def __call__(self, event: Begun | Wrote) -> None:
        """An event of this try.

        Raises:
            LostError: a try before told something else.
        """
        if isinstance(event, Begun):
            if self._begun is None:
                self._begun = event
                self._tell(event)
            elif not np.allclose(event.posterior.mean, self._begun.posterior.mean, atol=1e-3):
                raise LostError("expected the same posterior of the second replica, got another")
            return
        if self._place < len(self._ids):
            if self._ids[self._place] != event.token_id:
                raise LostError("expected the same text of the second replica, got another: their arithmetic differs")
        else:
            self._ids.append(event.token_id)
            self._tell(event)
        self._place += 1
