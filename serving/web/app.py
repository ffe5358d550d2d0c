"""The endpoints."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import anyio
from fastapi import FastAPI, Request
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.errors import BayesDispatchError
from bayes_dispatch.inference.two_pass.system import System
from bayes_dispatch.serving.web.answers import Answer, ChatShape, CompletionShape, dispatch_answer, usage_of
from bayes_dispatch.serving.web.arrivals import Arrivals
from bayes_dispatch.serving.web.choices import Choice, Piece
from bayes_dispatch.serving.web.feedback import Learner, feedback_answer
from bayes_dispatch.serving.web.fields import (
    ChatAsked,
    CompletionAsked,
    DispatchAsked,
    FeedbackAsked,
    Kind,
    read_fields,
)
from bayes_dispatch.serving.web.front import PAGE, Front, Record, tell_failure
from bayes_dispatch.serving.web.hearing import GoneError, Hearing, unless_gone
from bayes_dispatch.serving.web.jobs import Job, Jobs
from bayes_dispatch.serving.web.keys import Keys
from bayes_dispatch.serving.web.metrics import Metrics
from bayes_dispatch.serving.web.page import page_answer
from bayes_dispatch.serving.web.refusals import RefusedError, as_refused, closing
from bayes_dispatch.serving.web.server import LAST_WORDS
from bayes_dispatch.serving.web.settings import WebSettings
from bayes_dispatch.serving.work import Begun, Ended, Engine, Event, Wrote

__all__ = ["make_app"]


def make_app(
    system: System,
    engine: Engine,
    settings: WebSettings | None = None,
    keys: Keys | None = None,
    local: bool = True,
    learner: Learner | None = None,
) -> ASGIApp:
    """OpenAI's protocol over an engine, as an ASGI application.

    Args:
        system: that the engine runs. settings: bounds; ``WebSettings()`` by default.
        keys: who may ask; ``None`` for everybody. local: see ``Front``.
        learner: of the system's dispatcher; ``None`` for a prior that stays as it is.
    """
    settings = WebSettings() if settings is None else settings
    gate: Gate | None = getattr(system, "gate", None)  # not every system knows of gates
    arrivals = None if gate is None else Arrivals(system.dispatcher, gate)
    metrics = Metrics(engine, system.dispatcher, arrivals, learner)
    jobs = Jobs(system, settings)
    app, desk, made = (
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False),
        _Desk(engine, metrics, settings, learner),
        int(time.time()),
    )
    models = {
        each: {"id": each, "object": "model", "created": made, "owned_by": "bayes-dispatch"} for each in jobs.models
    }

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        request.state.record.error = error.code
        return error.response

    @app.exception_handler(HTTPException)
    async def no_endpoint(_: Request, error: HTTPException) -> Response:
        message = f"expected an endpoint of this server, got: {error.detail}"
        return RefusedError(error.status_code, message, headers=dict(error.headers or {})).response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # it is raised again, and logged by the front
        return as_refused(error, request.state.record.id).response

    @app.get(PAGE)
    async def page() -> Response:
        return page_answer()

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": list(models.values())})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name not in models:
            message = f"expected a model of {', '.join(models)}, got {name!r:.80}"
            raise RefusedError(404, message, param="model", code="model_not_found")
        return JSONResponse(models[name])

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await desk.read(request, CompletionAsked)
        job = jobs.of_completion(asked, request.state.record.key or "")
        return await desk.answer(request, job, Answer(job, CompletionShape()))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        job = jobs.of_chat(await desk.read(request, ChatAsked), request.state.record.key or "")
        return await desk.answer(request, job, Answer(job, ChatShape()))

    @app.post("/v1/dispatch")
    async def dispatch(request: Request) -> Response:
        job = jobs.of_dispatch(await desk.read(request, DispatchAsked), request.state.record.key or "")
        return await desk.answer(request, job, None)

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> Response:
        asked = await desk.read(request, FeedbackAsked)
        if learner is None:
            message = "expected a server that learns (serve --prior FILE), got one whose prior stays as it is"
            raise RefusedError(404, message, code="no_feedback")
        try:
            async with asyncio.timeout(settings.patience):  # another process may hold the prior's file
                prior = await learner.take(asked, request.state.record.key or "")
        except TimeoutError:
            raise as_refused(Ended("late"), request.state.record.id) from None
        return JSONResponse(feedback_answer(asked, prior))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        if engine.state.closing:
            raise closing()
        if not engine.state.serves:
            message = "expected an engine that can answer, got one whose server or replicas are gone"
            raise RefusedError(503, message, code="not_serving")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return Front(app, settings, metrics, keys, local)


class _Desk:
    """Takes requests to the engine, and brings back what it tells."""

    def __init__(self, engine: Engine, metrics: Metrics, settings: WebSettings, learner: Learner | None) -> None:
        self._engine, self._metrics, self._settings, self._learner = engine, metrics, settings, learner

    async def read(self, request: Request, kind: type[Kind]) -> Kind:
        """The fields of a request.

        Raises:
            RefusedError: 400 for fields that are wrong, 408 for a body that is late, 415 for one that is no JSON.
        """
        kind_given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind_given != "application/json":  # what a form of another site's page cannot send
            raise RefusedError(415, "expected a body of content-type application/json, got another")
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                body = await request.body()
        except ClientDisconnect:  # nobody reads the answer; it is for the log
            raise RefusedError(499, "expected a whole body, got a client that hung up", code="gone") from None
        except TimeoutError:
            raise RefusedError(408, "expected a body in time, got a part of it", code="timeout") from None
        return read_fields(kind, body)

    async def answer(self, request: Request, job: Job, answer: Answer | None) -> Response:
        """Of a job; ``None`` for one that is dispatched alone.

        Raises:
            RefusedError: see ``as_refused``. BayesDispatchError: none, all of them become that.
        """
        record: Record = request.state.record
        if self._settings.log_prompts:
            record.prompt = [w.prompt if isinstance(w.prompt, str) else [vars(m) for m in w.prompt] for w in job.works]
        if self._engine.state.closing:
            raise closing()
        each = len(job.works) // job.prompts
        choices = [
            Choice(n, n // each, () if work.writing is None else work.writing.stops) for n, work in enumerate(job.works)
        ]
        try:
            hearing = await Hearing.of(self._engine, job.works)
        except BayesDispatchError as error:
            refused = as_refused(error, record.id, job.prompt_param, job.blend_param)
            raise (closing() if self._engine.state.closing else refused) from None
        told = _Told(record, job, self._metrics, choices)
        try:
            if answer is not None and job.stream:
                first = await unless_gone(request, hearing.next())
                told.check(*first)
                over = partial(self._over, answer.name, record, choices)
                return _Stream(hearing, told, answer, first, over)
            pieces: list[list[Piece]] = await unless_gone(request, _all_pieces(hearing, told))
        except GoneError:
            hearing.close()
            return Response(status_code=499)  # nobody reads it; it is for the log
        except BaseException:
            hearing.close()
            raise
        document = dispatch_answer(choices[0], job) if answer is None else answer.whole(choices, pieces)
        self._over(document["id"], record, choices)
        return JSONResponse(document)

    def _over(self, name: str, record: Record, choices: list[Choice]) -> None:
        if self._learner is not None:
            self._learner.remember(name, record.key or "", choices)


class _Told:
    """Counts what an engine tells of a request, and makes pieces of it."""

    def __init__(self, record: Record, job: Job, metrics: Metrics, choices: list[Choice]) -> None:
        self.record, self.choices, self._job, self._metrics = record, choices, job, metrics
        self._last = [record.begun] * len(choices)

    def check(self, n: int, event: Event) -> None:
        """Raise what failed.

        Raises:
            RefusedError: it did.
        """
        if isinstance(event, Ended) and event.reason not in ("stop", "length", "dispatched", "abstained"):
            if event.error is not None and event.reason == "broken":
                tell_failure(self.record, event.error)
            raise as_refused(event, self.record.id, self._job.prompt_param, self._job.blend_param)

    def hear(self, n: int, event: Event) -> Piece | None:
        """What an event adds to its choice; ``None`` for its beginning.

        Raises:
            RefusedError: as :meth:`check`.
        """
        self.check(n, event)
        choice = self.choices[n]
        if isinstance(event, Begun):
            if all(each.begun is None for each in self.choices if each.prompt == choice.prompt):
                self._metrics.dispatched(event)  # copies of a prompt are one arrival
            choice.begun = event
        elif isinstance(event, Wrote):
            now = time.monotonic()
            if choice.count == 0 and self.record.first_token_seconds is None:
                self.record.first_token_seconds = round(now - self.record.begun, 6)
            self._metrics.wrote(choice.count == 0, now - self._last[n])
            self._last[n] = now
            piece = choice.write(event)
            self._count()
            return piece
        else:
            return choice.end(event)
        self._count()
        return None

    def _count(self) -> None:
        usage = usage_of(self.choices)
        self.record.prompt_tokens, self.record.new_tokens = usage["prompt_tokens"], usage["completion_tokens"]


async def _all_pieces(hearing: Hearing, told: _Told) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in told.choices]
    async for n, event in hearing:
        if (piece := told.hear(n, event)) is not None:
            pieces[n].append(piece)
    return pieces


class _Stream(EventSourceResponse):
    """An answer in chunks; when the client hangs up, what is not written is wanted no more."""

    def __init__(
        self,
        hearing: Hearing,
        told: _Told,
        answer: Answer,
        first: tuple[int, Event],
        over: Callable[[], None],
    ) -> None:
        self._hearing, self._told, self._answer, self._over = hearing, told, answer, over
        super().__init__(
            self._lines(first),
            sep="\n",
            shutdown_event=anyio.Event(),
            shutdown_grace_period=LAST_WORDS - 1,  # in which what has been told is still sent
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._hearing.close()
            self._over()  # who hangs up may say why

    async def _lines(self, first: tuple[int, Event]) -> AsyncIterator[dict[str, str]]:
        try:
            for chunk in self._chunks(*first):
                yield _line(chunk)
            async for n, event in self._hearing:
                for chunk in self._chunks(n, event):
                    yield _line(chunk)
            if self._answer.job.usage:
                yield _line(self._answer.usage(self._told.choices))
        except RefusedError as error:
            self._told.record.error = error.code
            yield _line(error.body)
            return
        except Exception as error:
            tell_failure(self._told.record, error)
            self._told.record.error = "internal_error"
            yield _line(as_refused(error, self._told.record.id).body)
            return
        self._over()
        yield {"data": "[DONE]"}

    def _chunks(self, n: int, event: Event) -> list[dict[str, Any]]:
        piece, choice = self._told.hear(n, event), self._told.choices[n]
        if piece is None:
            return [self._answer.first(choice)]
        return [self._answer.part(choice, piece)] if piece.text or piece.tokens or choice.reason else []


def _line(document: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(document, allow_nan=False)}
