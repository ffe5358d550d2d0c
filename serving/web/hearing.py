"""What an engine tells on its own thread, heard by the request's own coroutine."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from bayes_dispatch.serving.work import Ended, Engine, Event, Ticket, Work

__all__ = ["GoneError", "Hearing", "unless_gone"]

Found = TypeVar("Found")


class GoneError(Exception):
    """The client has hung up."""


class Hearing:
    """All of one request's work, from when an engine takes it until it ends or is wanted no more: see ``of``."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: dict[int, Ticket] = {}
        self._closed = threading.Event()

    @classmethod
    async def of(cls, engine: Engine, works: Sequence[Work]) -> "Hearing":
        """Ask an engine for all of the works, or for none; on a thread, as long prompts take a while to tokenize.

        Raises:
            BayesDispatchError: what ``Engine.submit`` raises; what was taken before is cancelled.
        """
        hearing = cls()
        try:
            await asyncio.to_thread(hearing._submit, engine, works)
        except BaseException:
            hearing.close()
            raise
        return hearing

    def _submit(self, engine: Engine, works: Sequence[Work]) -> None:
        for n, work in enumerate(works):
            if self._closed.is_set():
                return
            self._tickets[n] = ticket = engine.submit(work, partial(self._tell, n))
            if self._closed.is_set():  # before it knew of this one
                ticket.cancel()

    async def next(self) -> tuple[int, Event]:
        """The next event, and the number of the work that it is of."""
        n, event = await self._events.get()
        if isinstance(event, Ended):
            del self._tickets[n]
        return n, event

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """All events that are left."""
        while self._tickets:
            yield await self.next()

    def close(self) -> None:
        """Want no more of what has not ended."""
        self._closed.set()
        for ticket in list(self._tickets.values()):
            ticket.cancel()

    def _tell(self, n: int, event: Event) -> None:
        """On the engine's thread. When the loop has ended nobody is left to hear."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (n, event))


async def unless_gone(request: Request, wanted: Awaitable[Found]) -> Found:
    """What is waited for, as long as the client waits, too. The request's body must have been read.

    Raises:
        GoneError: it does not.
    """
    waiting, gone = asyncio.ensure_future(wanted), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        raise GoneError
    finally:
        waiting.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
