"""How anything is refused: OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``, and its status."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from bayes_dispatch.arguments import shown
from bayes_dispatch.errors import BayesDispatchError, PromptError, PromptTooLongError
from bayes_dispatch.serving.work import BusyError, Ended

__all__ = ["RefusedError", "as_refused", "closing", "naming", "of_fields"]

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "requests",
}  # of type; below 500, others are the request's
SHOULD = re.compile(r"^\w+ should ")  # as what pydantic says begins, of an input, a list, a text


class RefusedError(Exception):
    """A request that is not answered as it asked.

    Args:
        status: of HTTP. message: for the client, without anything of the server's inside.
        param: the field that is at fault. code: a word for programs. headers: that the answer has besides.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def as_refused(
    error: BaseException | Ended, request: str, prompt_param: str | None = None, blend_param: str | None = None
) -> RefusedError:
    """The refusal that an error becomes, or an end that is none of a text.

    Args:
        request: its id, which is all that a client hears of a failure of ours.
        prompt_param, blend_param: see ``Job``.
    """
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, Ended) and error.error is not None and error.reason != "broken":
        return as_refused(error.error, request, prompt_param, blend_param)
    if isinstance(error, BusyError):
        wait = {"retry-after": str(error.retry_after)}
        return RefusedError(429, str(error), code="rate_limit_exceeded", headers=wait)
    if isinstance(error, PromptError):
        code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
        return RefusedError(400, str(error), param=prompt_param, code=code)
    if isinstance(error, BayesDispatchError):
        return RefusedError(400, str(error), param=blend_param)
    reason = error.reason if isinstance(error, Ended) else "failed"
    if reason == "late":
        message = "expected time enough for an answer, got none: ask for less, or later"
        # OpenAI's clients would ask at once, twice more, for what takes too long.
        return RefusedError(504, message, code="timeout", headers={"x-should-retry": "false"})
    if reason == "closed":
        return closing()
    return RefusedError(500, f"internal error, request id {request}", code="internal_error")


def closing() -> RefusedError:
    """The server is about to stop."""
    return RefusedError(503, "expected a server that takes requests, got one that stops", code="closing")


@contextmanager
def naming(param: str) -> Iterator[None]:
    """Errors of the package are the request's, and ``param`` is at fault.

    Raises:
        RefusedError: 400.
    """
    try:
        yield
    except BayesDispatchError as error:
        raise RefusedError(400, str(error), param=param) from None


def of_fields(error: ValidationError) -> RefusedError:
    """The first of the fields that are wrong, as a refusal that names it."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = [each for each in first["loc"] if not str(each).startswith("(")]  # without the kinds of a union
    place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in path).lstrip(".")
    kind, told = first["type"], first["msg"]
    if kind == "json_invalid":
        return RefusedError(400, f"expected a body of JSON, got something else: {told}")
    if kind == "extra_forbidden":
        return RefusedError(
            400, f"expected no field {place!r:.80}: this endpoint has none", param=place, code="unknown_field"
        )
    if kind == "missing":
        return RefusedError(400, f"expected the field {place}, got none", param=place, code="missing_field")
    if kind == "value_error":
        return RefusedError(400, told.removeprefix("Value error, "), param=place)
    told = SHOULD.sub("to ", told).partition(" after validation")[0]
    return RefusedError(400, f"expected {place or 'the body'} {told}, got {shown(first['input'])}", param=place or None)
