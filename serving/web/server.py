"""A server that ends gracefully: told to stop, it refuses what is new, lets what there is end, and ends itself."""

import asyncio
import logging
import socket
import time
from threading import Thread
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from bayes_dispatch.errors import BayesDispatchError, ConfigError
from bayes_dispatch.inference.two_pass.events import tell
from bayes_dispatch.serving.web.settings import WebSettings
from bayes_dispatch.serving.work import Engine

__all__ = ["LAST_WORDS", "Server", "listen"]

logger = logging.getLogger(__name__)

LAST_WORDS = 5  # seconds in which answers that have ended may still be sent
KEEP_ALIVE = 75  # seconds between requests of a connection: proxies that keep theirs for a minute must end it first


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        ConfigError: the address is not this machine's, or in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"expected a free address of this machine, got {host} port {port}: {why}") from None
    # Connections inherit it; asyncio sets it for its own sockets alone. Without it each answer waits 40 ms for an
    # acknowledgement of its head.
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def _guarded(seconds: float, most: int) -> type[H11Protocol]:
    """Connections that hold nothing for nobody: looked at every so many ``seconds``, and ``most`` of them at once.

    One that has had no request, or but a part of its head, is closed, and one whose client reads nothing is cut off.
    After an answer uvicorn's own timer runs, until something is heard.
    """

    class Guarded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._look_later((None,), 0)
            if len(self.connections) > most:
                tell(logger, logging.WARNING, "too many connections", lambda: {"most": most})
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._looking.cancel()  # it would keep the connection and its last request
            super().connection_lost(exc)

        def _look_later(self, owed: tuple[RequestResponseCycle | None] | None, unsent: int) -> None:
            self._looking = self.loop.call_later(seconds, self._look, owed, unsent)

        def _look(self, owed_before: tuple[RequestResponseCycle | None] | None, unsent_before: int) -> None:
            """End it if since the last look the same request is owed, or as many bytes are left to be read.

            Args:
                owed_before: after which request the client owed a whole one; ``None`` if none was owed.
            """
            cycle: RequestResponseCycle | None = self.cycle
            at_rest = self.timeout_keep_alive_task is not None and not self.conn.trailing_data[0]
            owed = (cycle,) if cycle is None or (cycle.response_complete and not at_rest) else None
            unsent = self.transport.get_write_buffer_size()
            if unsent and unsent == unsent_before:
                self.transport.abort()  # to close it would wait for the client
                return
            if owed is not None and owed == owed_before:
                self.transport.close()
            self._look_later(owed, unsent)

        def _unsupported_upgrade_warning(self) -> None:
            """Who asks for another protocol gets HTTP; uvicorn would advise to install one."""

    return Guarded


class Server(uvicorn.Server):
    """Serves an application until it is told to stop: once to drain, twice to end at once.

    Args:
        app: of ``make_app``. engine: it is closed with the server. settings: bounds.
    """

    def __init__(self, app: ASGIApp, engine: Engine, settings: WebSettings) -> None:
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            http=_guarded(settings.body_seconds, settings.connections),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=settings.header_bytes,
            timeout_keep_alive=KEEP_ALIVE,
        )
        super().__init__(config)
        self._app, self._engine, self._drain, self._told = app, engine, settings.drain, False
        self._dead = False  # whether the engine has ended by itself
        self._now = self._cutting = False  # whether it is to end at once, and whether requests are cut off
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_on(self, listening: socket.socket) -> None:
        """Serve connections of a socket, until told to stop.

        Raises:
            BayesDispatchError: the engine has ended by itself.
        """
        host, port = listening.getsockname()[:2]
        tell(logger, logging.INFO, "listening", lambda: {"host": host, "port": port})
        try:
            self.run(sockets=[listening])
        finally:
            self._engine.close(0.0)  # also where it still drains: an interpreter that ends amid a step is aborted
        if self._dead:
            raise BayesDispatchError("expected an engine that runs, got one that has ended: the log has more")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember whose loop it is."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: also where the engine has, which nobody told it."""
        self._dead = self._dead or (not self._told and self._engine.state.closing)
        return await super().on_tick(counter) or self._dead

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT or SIGTERM."""
        self.stop()

    def stop(self) -> None:
        """Drain; told again, end at once. May be called from any thread."""
        if self._told or self._loop is None:
            self.should_exit = self._now = True
            return
        self._told = True
        self._loop.call_soon_threadsafe(self._begin_to_close, self._loop)

    def _begin_to_close(self, loop: asyncio.AbstractEventLoop) -> None:
        tell(logger, logging.INFO, "draining", lambda: {"seconds": self._drain})
        loop.call_later(self._drain, self._tell_left, "drain over")
        Thread(target=self._close, name="closing", daemon=True).start()

    def _close(self) -> None:
        try:
            self._engine.close(self._drain)
        finally:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait until all answers are sent, and cut off those that are not in time."""
        cutting = asyncio.create_task(self._cut_off())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    async def _cut_off(self) -> None:
        """uvicorn itself would log each of them as an error with its places."""
        deadline = time.monotonic() + LAST_WORDS
        while not self._now and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        self._cutting = True
        self._tell_left("cut off")
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # until the connections know
        for task in list(self.server_state.tasks):
            task.cancel()
        await asyncio.sleep(1)
        self.force_exit = True  # whatever did not heed that

    def _tell_left(self, event: str) -> None:
        """Log how many requests have no answer yet, if any."""
        if left := len(self.server_state.tasks):
            tell(logger, logging.WARNING, event, lambda: {"requests": left})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._cutting:
                raise
