"""An engine that dispatches here, and lets a vLLM server write.

The first pass runs in this process, some prompts by turns; the server gets a prompt's tokens and the weights of
its blend, and runs all blends in one batch. It knows one set of weights for each request: a blend of many particles,
which every token filters, is refused.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock, Thread
from time import monotonic
from typing import Any, TypeVar

import numpy as np
import torch

from bayes_dispatch.errors import ConfigError, PromptError
from bayes_dispatch.inference.chat.form import Form
from bayes_dispatch.inference.two_pass.blends import Blend, Particles
from bayes_dispatch.inference.two_pass.events import tell as log
from bayes_dispatch.inference.two_pass.prompts import Written
from bayes_dispatch.inference.two_pass.second_pass import on_base
from bayes_dispatch.inference.two_pass.system import System, check_system, dispatch
from bayes_dispatch.serving.engine import READ_AT_ONCE, Limits
from bayes_dispatch.serving.reading import Reading, particles_of
from bayes_dispatch.serving.vllm.export import check_lora, probes_of
from bayes_dispatch.serving.vllm.format import told
from bayes_dispatch.serving.vllm.upstream import Upstream
from bayes_dispatch.serving.waiting import Request, WaitingLine
from bayes_dispatch.serving.work import Begun, BusyError, Ended, EngineState, Event, UpstreamError, Work, Wrote

__all__ = ["VllmEngine"]

logger = logging.getLogger(__name__)

RETRY_AFTER = 1  # seconds
CHECKED = 30.0  # seconds after which a server that nobody asks is checked again
FAILED = 2.0  # and one that has failed
POLL = 0.02  # seconds between looks at what is left when it closes
SERVED = "posterior_mean, top_k(2), best_expert, thompson_sample, an expert's name, base, or weights of your own"
Found = TypeVar("Found")


@dataclass(frozen=True)
class _Ticket:
    request: Request
    engine: "VllmEngine"

    def cancel(self) -> None:
        """See ``Ticket``: the request to the server is closed, and the server drops it."""
        self.request.cancel()
        self.engine.drop(self.request)


class VllmEngine:
    """See ``work.Engine``.

    Args:
        system: model, tokenizer, LoRA experts, dispatcher, and a gate where one is asked.
        url: of a server that has the bank of these experts (``export_bank``, ``plugin``).
        limits: ``running`` requests are at the server at once; of ``cache_bytes`` nothing is kept here.
        key: the server's, if it has one.

    Attributes:
        off: nats by which the server is off the probes (``format.gap``).

    Raises:
        ConfigError: experts that vLLM cannot be given, or a server of another model or other experts.
        UpstreamError: no server. ForeignExpertError: see ``check_system``.
    """

    def __init__(self, system: System, url: str, limits: Limits | None = None, key: str | None = None) -> None:
        check_system(system)
        check_lora(system.experts, system.model)
        self._system, self._limits = system, Limits() if limits is None else limits
        self._form = Form.of(system.tokenizer)
        self._never = (~system.tokenizer.continues).nonzero()[:, 0].tolist()
        self._some = dispatch(system, ["a"], 0)[0]  # to see what blends make of a posterior
        self._waiting = WaitingLine(self._limits.waiting, self._limits.waiting_tokens)
        self._deadline = math.inf  # when all is to be over
        self._state = EngineState()
        self._lock, self._closing = Lock(), Lock()  # the first guards the three above, which other threads see
        self._tasks: dict[Request, asyncio.Task[Ended]] = {}
        self._over = False  # whether tasks are cancelled because the engine is
        self._upstream = Upstream(url, key)
        self._worker, self._reading = ThreadPoolExecutor(1, "dispatch"), asyncio.Semaphore(READ_AT_ONCE)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self._longest: int | None
        self._heard = -math.inf  # when the server last gave a token, or was found to be what it was
        self._checking: asyncio.Task[None] | None = None  # the last one since the start
        self._later: asyncio.TimerHandle | None = None  # when the next one is due
        try:
            self._probes = probes_of(system)
            self._wait(self._check())
        except BaseException:
            self.close(0)
            raise
        log(logger, logging.INFO, "vllm", lambda: {"url": self._upstream.url, "nats_off": self.off})
        self._loop.call_soon_threadsafe(self._check_in, CHECKED)

    def submit(self, work: Work, tell: Callable[[Event], None]) -> _Ticket:
        """See ``work.Engine``."""
        request = Request.of(self._system, self._form, self._some, self._longest, work, tell)
        if request.particles is not None:
            _weights(work.blend, request.particles)
        with self._lock:
            if self._state.closing:
                raise BusyError("expected a request to a server that is not shutting down, got one that came late", 5)
            self._waiting.add(request, RETRY_AFTER)
            self._loop.call_soon_threadsafe(self._take)
            if work.patience is not None:
                self._loop.call_soon_threadsafe(self._loop.call_later, work.patience + POLL, self._take)
        return _Ticket(request, self)

    @property
    def state(self) -> EngineState:
        """See ``work.Engine``; of rows, steps and caches the server knows."""
        with self._lock:
            waiting, running = self._waiting, len(self._tasks)
            return replace(self._state, waiting=len(waiting), waiting_tokens=waiting.tokens, running=running)

    def drop(self, request: Request) -> None:
        """Stop what nobody waits for any more."""
        with suppress(RuntimeError):  # the loop has ended, and all with it
            self._loop.call_soon_threadsafe(self._drop, request)

    def close(self, patience: float) -> None:
        """See ``work.Engine``."""
        with self._lock:
            self._state = replace(self._state, closing=True)
            self._deadline = min(self._deadline, monotonic() + patience)
        with self._closing:
            if self._thread.is_alive():
                self._wait(self._drain())
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
                self._worker.shutdown(cancel_futures=True)

    def _wait(self, coroutine: Coroutine[Any, Any, Found]) -> Found:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _drain(self) -> None:
        while (self._tasks or self._waiting) and monotonic() < self._deadline:
            await asyncio.sleep(POLL)
        with self._lock:
            left = self._waiting.clear()
        for request in left:
            request.hear(Ended("closed"))
        self._over = True
        tasks: list[asyncio.Task[Any]] = [*self._tasks.values()]
        tasks += [] if self._checking is None else [self._checking]
        for task in tasks:
            task.cancel()
        if self._later is not None:
            self._later.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._upstream.close()

    async def _check(self) -> None:
        """See that it is a server of this bank.

        Raises:
            ConfigError, UpstreamError, BusyError: see ``Upstream``.
        """
        most = await self._upstream.longest()
        self.off = await self._upstream.check(*self._probes)
        self._longest = min((each for each in (most, self._system.model.longest) if each is not None), default=None)
        self._heard = monotonic()

    def _check_in(self, seconds: float) -> None:
        self._later = self._loop.call_later(seconds, self._check_again)

    def _check_again(self) -> None:
        """It may be another server by now, or a silent one."""
        if self.state.serves and self._tasks and monotonic() - self._heard < CHECKED:  # its line may be long
            return self._check_in(CHECKED)
        self._checking = self._loop.create_task(self._check())
        self._checking.add_done_callback(self._judge)

    def _judge(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task is not self._checking:
            return
        error = task.exception()
        if error is not None and self.state.serves:
            log(logger, logging.WARNING, "vllm failed", lambda: {"url": self._upstream.url, "message": str(error)})
        elif error is None and not self.state.serves:
            log(logger, logging.INFO, "vllm", lambda: {"url": self._upstream.url, "nats_off": self.off})
        if not isinstance(error, BusyError):
            self._serve(error is None)
        self._check_in(CHECKED if error is None else FAILED)

    def _serve(self, serves: bool) -> None:
        with self._lock:
            self._state = replace(self._state, serves=serves)

    def _doubt(self) -> None:
        """The server has failed: serve nobody until it has been checked."""
        if self.state.serves and not self._over:
            self._serve(False)
            for planned in (self._later, self._checking):  # for which nobody waits
                if planned is not None:
                    planned.cancel()
            self._check_again()

    async def _sure(self) -> None:
        """Wait for a server that has failed, or said nothing for long, to be checked.

        Raises:
            UpstreamError: it fails still, or is another one. BusyError: it has no room.
        """
        if monotonic() - self._heard > CHECKED and (self._checking is None or self._checking.done()):
            if self._later is not None:
                self._later.cancel()
            self._check_again()
        if self._checking is not None and not (self.state.serves and self._checking.done()):
            try:
                await asyncio.shield(self._checking)
            except ConfigError as error:  # which is not of the request
                raise UpstreamError(str(error)) from None

    def _take(self) -> None:
        """Begin with those whose turn it is, as far as there is room, and let those go that waited for too long."""
        with self._lock:
            gone = self._waiting.drop()
            turn: list[Request] = []
            places = self._limits.running
            while len(busy := [*self._tasks, *turn]) < places:
                if (request := self._waiting.next(busy, places, lambda _: True)) is None:
                    break
                turn.append(request)
            for request in turn:
                self._tasks[request] = task = self._loop.create_task(self._answer(request))
                task.add_done_callback(partial(self._end, request))
        for request, reason in gone:
            request.hear(Ended(reason))

    def _drop(self, request: Request) -> None:
        if request in self._tasks:
            self._tasks[request].cancel()
        else:
            self._take()

    def _end(self, request: Request, task: asyncio.Task[Ended]) -> None:
        """Tell how a request has ended, and let the next one begin."""
        if task.cancelled():
            ended = Ended("closed" if self._over else "cancelled")
        elif (error := task.exception()) is None:
            ended = task.result()
        elif isinstance(error, TimeoutError):
            ended = Ended("late")
        else:
            ended = Ended("failed" if isinstance(error, ConfigError | PromptError | BusyError) else "broken", error)
        with self._lock:
            del self._tasks[request]
        request.hear(ended)
        self._take()

    async def _answer(self, request: Request) -> Ended:
        left = request.deadline - monotonic()
        async with asyncio.timeout(left if math.isfinite(left) else None):
            begun = await self._dispatch(request)
            if begun is None:
                return Ended(request.over() or "cancelled")
            self._count(prompt_tokens=len(request.heard))
            request.hear(begun)
            if request.work.writing is None:
                return Ended("dispatched")
            if request.work.abstain and begun.foreign:
                return Ended("abstained")
            blend = request.work.blend
            particles = particles_of(blend, begun.posterior)
            await self._sure()
            try:
                return await self._write(request, _weights(blend, particles, begun.foreign))
            except UpstreamError:
                self._doubt()
                raise

    async def _dispatch(self, request: Request) -> Begun | None:
        """Of the prompt; nothing where it is not wanted any more.

        As the engine in this process reads it, but for what would be written: by turns with other prompts, piece by
        piece, on a thread where others are written meanwhile.
        """
        found: list[Begun] = []
        heard = replace(request.heard, writing=None)
        reading = Reading(self._system, heard, request.work, self._limits.piece, found.append)
        async with self._reading:
            while request.over() is None:
                if await self._loop.run_in_executor(self._worker, torch.no_grad()(reading.step)):
                    break
        return found[0] if found else None

    async def _write(self, request: Request, weights: np.ndarray) -> Ended:
        heard, system, writing = request.heard, self._system, request.heard.writing
        assert writing is not None
        ids = [*heard.begin, *heard.transcript.ids.tolist()]
        written = Written(system.tokenizer, ids, writing, heard.ends)
        never = [each for each in self._never if each not in heard.ends]
        blend = told(weights.tolist(), system.experts.components)
        tokens = self._upstream.write(ids, blend, writing, request.work.seed + 1, sorted(heard.ends), never)
        async with aclosing(tokens):
            async for said in tokens:
                last = written.add(said.token_id)
                self._count(new_tokens=1)
                self._heard = monotonic()
                request.hear(Wrote(written.piece, said.token_id, said.log_probability, None, None, weights))
                if last:
                    stopped = any(written.text.endswith(stop) for stop in writing.stops) or said.token_id in heard.ends
                    return Ended("stop" if stopped else "length")
                if (reason := request.over()) is not None:
                    return Ended(reason)
        raise UpstreamError(
            f"expected {writing.max_new_tokens} tokens or an end of vLLM, got {len(written.ids)} tokens"
        )

    def _count(self, **more: int) -> None:
        with self._lock:
            self._state = self._state.counted(**more)


def _weights(blend: Blend, particles: Particles, foreign: bool = False) -> np.ndarray:
    """The one set of weights (K + 1,) that a blend is.

    Raises:
        ConfigError: it is several, or one that the prompt refines.
    """
    if particles.mass.shape[1] != 1 or particles.refined:
        raise ConfigError(f"expected a blend that vLLM can run: {SERVED}; got {blend.name}, which needs this process")
    found: np.ndarray = on_base(particles, np.array([foreign])).weights[0, 0]
    return found
