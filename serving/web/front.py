"""What every request passes first and last: an id, its key, bounds of its body, and a line in the log when it is over.

It is plain ASGI around the whole application, so that nothing that fails inside goes unanswered.
"""

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bayes_dispatch.inference.two_pass.events import of_error, tell
from bayes_dispatch.serving.web.keys import Keys, is_loopback
from bayes_dispatch.serving.web.metrics import Metrics
from bayes_dispatch.serving.web.refusals import RefusedError, as_refused
from bayes_dispatch.serving.web.settings import WebSettings

__all__ = ["ENDPOINTS", "Front", "Record", "tell_failure"]

logger = logging.getLogger(__name__)

OPEN = ("/health", "/ready")  # that need no key, and may be asked by any name of this machine
METHOD = 16  # characters of it that the log has: who has no key writes no more there
PAGE = "/"  # needs no key either: it asks its reader for one
ENDPOINTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/dispatch",
    "/v1/feedback",
    "/v1/models",
    "/metrics",
    PAGE,
    *OPEN,
)


@dataclass
class Record:
    """What is known of a request, for its line in the log. ``key`` is the name of whose key it came with."""

    id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    begun: float = field(default_factory=time.monotonic)
    key: str | None = None
    status: int | None = None
    error: str | None = None
    first_token_seconds: float | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    prompt: Any = None

    def facts(self, method: str, endpoint: str) -> dict[str, Any]:
        """Of the line; the prompt only where it was to be kept."""
        told = {name: value for name, value in vars(self).items() if name not in ("id", "begun", "prompt")}
        seconds = round(time.monotonic() - self.begun, 6)
        told |= {"request": self.id, "method": method, "endpoint": endpoint, "seconds": seconds}
        return told if self.prompt is None else told | {"prompt": self.prompt}


class Front:
    """An application behind its door.

    Args:
        app: what answers. settings: bounds. metrics: count the answers.
        keys: who may ask; ``None`` for everybody.
        local: whether to answer only requests that name this machine as their host: where there are no keys, a web page
            whose name leads here (DNS rebinding) must not ask in the name of who reads it.
    """

    def __init__(self, app: ASGIApp, settings: WebSettings, metrics: Metrics, keys: Keys | None, local: bool) -> None:
        self._app, self._settings, self._metrics, self._keys, self._local = app, settings, metrics, keys, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = Record()
        scope.setdefault("state", {})["record"] = record

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            self._admit(scope, record)
            # whoever asks for the head alone, as health checks do, is sent no body by the HTTP server
            asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(asked, self._bounded(receive), marked)
        except asyncio.CancelledError:  # the server ends
            record.error = "cut_off"
            raise
        except Exception as error:
            refused = as_refused(error, record.id)
            if not isinstance(error, RefusedError):
                tell_failure(record, error)
            record.error = refused.code
            if record.status is None:
                await refused.response(scope, receive, marked)
        finally:
            path = scope["path"]
            path = "/v1/models" if path.startswith("/v1/models/") else path
            endpoint = path if path in ENDPOINTS else "other"
            self._metrics.answered(endpoint, record.status or 499)
            method = scope["method"][:METHOD]
            tell(logger, logging.INFO, "request", lambda: record.facts(method, endpoint))

    def _admit(self, scope: Scope, record: Record) -> None:
        """Check size, host and key.

        Raises:
            RefusedError: 400, 401, 403, 413 or 431.
        """
        path, headers, most = scope["path"], Headers(scope=scope), self._settings.header_bytes
        target = len(scope["raw_path"]) + len(scope["query_string"])
        if target + sum(len(name) + len(value) for name, value in headers.raw) > most:
            # h11 counts only those of which a part alone has come
            raise RefusedError(431, f"expected at most {most} bytes of headers, got more", code="too_large")
        told = headers.get("content-length", "0")
        if not (told.isascii() and told.isdecimal()):
            raise RefusedError(400, "expected a content-length that is a number, got another")
        if len(told) > 18 or int(told) > self._settings.body_bytes:
            raise self._too_large()
        if path in OPEN:
            return
        if self._keys is None:
            host = headers.get("host", "").rpartition("]")[0] + "]" if "]" in headers.get("host", "") else ""
            host = host or headers.get("host", "").partition(":")[0]
            if self._local and not is_loopback(host):
                raise RefusedError(
                    403, "expected this machine's own name as the host, got another", code="foreign_host"
                )
            return
        if path == PAGE:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            record.key = self._keys.owner(key.strip().encode())
        if record.key is None:
            message = "expected an API key as `Authorization: Bearer KEY`, got none that is known"
            raise RefusedError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _bounded(self, receive: Receive) -> Receive:
        """Counts the body while it comes, whatever its headers said."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._settings.body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413, f"expected a body of at most {self._settings.body_bytes} bytes, got more", code="too_large"
        )


def tell_failure(record: Record, error: BaseException) -> None:
    """Log where something of ours failed."""
    tell(logger, logging.ERROR, "failed", lambda: {"request": record.id} | of_error(error))
