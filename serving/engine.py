"""An engine on one thread: every step reads one more token of all requests together, and one more piece of a prompt.

Rows of different blends share a step of the model (``Decoding.join``); what a request has filtered, chosen and
written is its own. So an answer does not depend on what runs beside it, up to the rounding of matrix products.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Condition, Thread
from time import monotonic
from typing import NamedTuple

import numpy as np
import torch

from bayes_dispatch.arguments import whole
from bayes_dispatch.errors import ConfigError, PromptError, TensorError
from bayes_dispatch.inference.chat.form import Form
from bayes_dispatch.inference.two_pass.particles import Decoding
from bayes_dispatch.inference.two_pass.system import System, check_system, cut_of, dispatch
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.serving.reading import Reading, Running
from bayes_dispatch.serving.waiting import Request, WaitingLine
from bayes_dispatch.serving.work import BusyError, Ended, EngineState, Event, Work, Wrote

__all__ = ["READ_AT_ONCE", "BatchedEngine", "Limits"]

logger = logging.getLogger(__name__)

READ_AT_ONCE = 4  # prompts that take turns, so that a long one holds up no short one; the last is for another owner
LONGEST_WAIT = 60  # seconds after which a client that was refused may try again, at most


@dataclass(frozen=True)
class Limits:
    """What an engine may hold.

    Attributes:
        running: requests that share a step. waiting: that wait for that. waiting_tokens: of these, with what they may
            write. cache_bytes: of all that is kept of what the model has read, and of what it says may follow.
        piece: tokens of a prompt that are read at a time, those of every row counted: more read it sooner, and hold up
            the others longer.

    Raises:
        ConfigError: one that is no whole number of at least 1.
    """

    running: int = 32
    waiting: int = 256
    waiting_tokens: int = 2**21
    cache_bytes: int = 4 * 2**30
    piece: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole(name, value, 1)


class BatchedEngine:
    """See ``work.Engine``.

    Args:
        system: model, tokenizer, experts, dispatcher, and a gate where one is asked.
        limits: what it may hold; ``Limits()`` by default.

    Raises:
        ForeignExpertError, ConfigError: see ``check_system``.
    """

    def __init__(self, system: System, limits: Limits | None = None) -> None:
        check_system(system)
        self._system, self._limits = system, Limits() if limits is None else limits
        self._form = Form.of(system.tokenizer)
        self._some = dispatch(system, ["a"], 0)[0]  # to see what blends make of a posterior
        self._kept = _kept_of(system.model, cut_of(system))
        self._waiting = WaitingLine(self._limits.waiting, self._limits.waiting_tokens)
        self._closing: float | None = None  # when all is to be over, once it is to close
        self._state = EngineState()
        self._changed = Condition()  # guards the three above, which other threads see
        self._running: list[tuple[Request, Running]] = []
        self._reading: deque[tuple[Request, Reading]] = deque()  # whose turn is next first
        self._batch: Decoding | None = None  # of what runs, in order
        self._longest = 0  # tokens that its rows have room for, which stays when the one that asked for it has gone
        self._stepped = self._busy = 0.0  # seconds that the last step took, and all work so far
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, work: Work, tell: Callable[[Event], None]) -> Request:
        """See ``work.Engine``."""
        request = Request.of(self._system, self._form, self._some, self._system.model.longest, work, tell)
        self._check_room(request)
        with self._changed:
            if self._closing is not None:
                raise BusyError("expected a request to a server that is not shutting down, got one that came late", 5)
            self._waiting.add(request, self._retry_after())
            self._changed.notify()
        return request

    @property
    def state(self) -> EngineState:
        with self._changed:
            waiting, closing = self._waiting, self._closing is not None
            return replace(self._state, waiting=len(waiting), waiting_tokens=waiting.tokens, closing=closing)

    def close(self, patience: float) -> None:
        """See ``work.Engine``."""
        with self._changed:
            self._closing = min(monotonic() + patience, math.inf if self._closing is None else self._closing)
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            with torch.no_grad():
                while not self._over():
                    begun = monotonic()
                    self._let_go()
                    self._read()
                    read = monotonic()
                    self._write()
                    self._stepped, self._busy = monotonic() - read, self._busy + monotonic() - begun
                    self._publish()
        except BaseException as error:  # nobody else would tell those who wait
            logger.exception("the engine has ended")
            with self._changed:
                left = [*self._waiting.clear(), *self._busy_with()]
                self._running, self._batch, self._closing = [], None, monotonic()
                self._reading.clear()
                self._state = replace(self._state, running=0, rows=0, cache_bytes=0)
            for request in left:
                request.hear(Ended("broken", error))

    def _over(self) -> bool:
        """Wait for work; tell everybody, if it is time to end."""
        with self._changed:
            while not (self._waiting or self._running or self._reading or self._closing is not None):
                self._changed.wait()
            gone = self._waiting.drop()
            idle = not (self._waiting or self._running or self._reading)
            over = self._closing is not None and (idle or monotonic() > self._closing)
            if over:
                gone += [(request, "closed") for request in self._waiting.clear()]
        for request, reason in gone:
            request.hear(Ended(reason))
        if over:
            for request, _ in list(self._reading):
                self._end_reading(request, Ended("closed"))
            self._fail(Ended("closed"))
        return over

    def _publish(self) -> None:
        """Let others see what there is."""
        held = [] if self._batch is None else [(self._batch.reader.rows, self._batch.nbytes)]
        held += [reading.held for _, reading in self._reading]
        rows, nbytes = (sum(each) for each in zip((0, 0), *held, strict=True))
        running = len(self._busy_with())
        with self._changed:
            self._state = replace(self._state, running=running, rows=rows, cache_bytes=nbytes)

    def _count(self, **done: int) -> None:
        """Let others see what was done."""
        with self._changed:
            self._state = self._state.counted(**done)

    def _let_go(self) -> None:
        """Of what nobody waits for any more."""
        for request, _ in list(self._reading):
            if reason := request.over():
                self._end_reading(request, Ended(reason))
        over = {n: Ended(reason) for n, (request, _) in enumerate(self._running) if (reason := request.over())}
        try:
            self._leave(over)
        except Exception as error:
            self._fail(Ended("broken", error))

    def _read(self) -> None:
        """Go on with prompts: by one piece, and by more for as long as the last step took."""
        begun = monotonic()
        while self._read_piece() and self._running and monotonic() - begun <= self._stepped:
            pass

    def _read_piece(self) -> bool:
        """Go on with the prompt whose turn it is; whether there was one."""
        self._take()
        if not self._reading:
            return False
        request, reading = self._reading[0]
        self._reading.rotate(-1)
        try:
            over = reading.step()
            if reading.rows > request.rows:  # there may be no room, and those that read may not wait for one another
                most = f"at most {request.rows} rows, as of another prompt"
                raise ConfigError(f"expected a blend of {most}, got {reading.rows} of {request.work.blend.name}")
            if over:
                self._join(request, reading)
        except (ConfigError, PromptError) as error:  # what it asks for cannot be
            self._end_reading(request, Ended("failed", error))
        except Exception as error:
            self._end_reading(request, Ended("broken", error))
        return True

    def _take(self) -> None:
        """Begin with the prompts of those whose turn it is."""
        places = self._limits.running
        while (free := READ_AT_ONCE - len(self._reading)) > 0 and len(busy := self._busy_with()) < places:
            owners = {request.work.owner for request, _ in self._reading} - {""}  # nobody is named so
            with self._changed:
                request = self._waiting.next(busy, places, self._fits, owners if free == 1 else set())
            if request is None:
                return
            reading = Reading(self._system, request.heard, request.work, self._limits.piece, request.hear)
            self._reading.append((request, reading))

    def _busy_with(self) -> list[Request]:
        """Those that run and those whose prompts are read."""
        return [request for request, _ in (*self._running, *self._reading)]

    def _fits(self, request: Request) -> bool:
        """Whether there is room for it beside what runs, and all that those will need whose prompts are read.

        So none that has begun ever waits for room that another one holds.
        """
        read, batch = [*(each for each, _ in self._reading), request], self._batch
        rows, longest, widest = (0, 0, 0) if batch is None else (batch.reader.rows, self._longest, batch.width)
        needed = self._bytes(
            rows + sum(each.rows for each in read),
            max(longest, *(each.tokens for each in read)),
            sum(each.tokens for each in read),
            (len(self._running) + len(read)) * max(widest, *(each.width for each in read)),
        )
        return needed <= self._limits.cache_bytes

    def _check_room(self, request: Request) -> None:
        """Whether there is room for it where nothing else runs.

        Raises:
            ConfigError: there is not.
        """
        rows, tokens, most = request.rows, request.tokens, self._limits.cache_bytes
        if self._bytes(rows, tokens, tokens, request.width) > most:
            raise ConfigError(
                f"expected a request whose caches fit in {most} bytes, got {rows} rows of {tokens} tokens: "
                "try fewer tokens or draws"
            )

    def _bytes(self, rows: int, tokens: int, read: int = 0, said: int = 0) -> int:
        """Of rows, of prompts of ``read`` tokens between the passes, and of what ``said`` particles say may follow."""
        kept = self._kept
        return rows * (kept.row + tokens * kept.token) + read * kept.between + said * kept.following

    def _join(self, request: Request, reading: Reading) -> None:
        """Take what has been read into the batch."""
        self._count(prompt_tokens=len(request.heard))
        if reading.running is None or reading.decoding is None:
            reason = "dispatched" if request.work.writing is None else "abstained"
            return self._end_reading(request, Ended(reason))
        self._reading.remove((request, reading))
        self._running.append((request, reading.running))
        if self._batch is None:
            self._batch, self._longest = reading.decoding, reading.tokens
            return
        self._longest = max(self._longest, reading.tokens)
        try:
            self._batch.join(reading.decoding)
        except Exception as error:
            self._fail(Ended("broken", error))

    def _end_reading(self, request: Request, ended: Ended) -> None:
        self._reading = deque(pair for pair in self._reading if pair[0] is not request)
        self._publish()
        request.hear(ended)

    def _write(self) -> None:
        """One more token of every request that runs."""
        try:
            if self._batch is not None:
                try:
                    ended = self._choose(self._batch)
                except TensorError:  # nothing has been chosen
                    ended = _unpredictable(self._batch)
                    if not ended:
                        raise
                    return self._leave(ended)
                self._leave(ended)
            if self._batch is not None:
                self._batch.append(np.array([running.written.ids[-1] for _, running in self._running]))
        except Exception as error:  # amid a step: what the rows have read is not to be trusted
            self._fail(Ended("broken", error))

    def _choose(self, batch: Decoding) -> dict[int, Ended]:
        """Choose and tell the next token of each request; those that end with it."""
        each = [running for _, running in self._running]
        token = batch.choose([running.writing.sampling for running in each], [running.generator for running in each])
        ended: dict[int, Ended] = {}
        for n, (request, running) in enumerate(self._running):
            id_, log_p = int(token.ids[n]), float(token.log_probabilities[n])
            if running.written.add(id_):
                ended[n] = Ended(running.reason)
            entropy, information = float(token.entropy[n]), float(token.mutual_information[n])
            request.hear(Wrote(running.written.piece, id_, log_p, entropy, information, token.weights[n]))
        self._count(new_tokens=len(each), steps=1)
        return ended

    def _leave(self, ended: Mapping[int, Ended]) -> None:
        """Let the requests at these places go, and free their rows."""
        if not ended:
            return
        gone = [(self._running[n][0], why) for n, why in ended.items()]
        left = [n for n in range(len(self._running)) if n not in ended]
        self._running = [self._running[n] for n in left]
        try:
            if self._batch is not None and left:
                self._batch.keep(left)
        finally:
            self._batch = self._batch if left else None
            self._publish()
            for request, why in gone:
                request.hear(why)

    def _fail(self, ended: Ended) -> None:
        """Let all go that run, and begin anew. What is being read has rows of its own."""
        gone = [request for request, _ in self._running]
        self._running, self._batch = [], None
        self._publish()
        for request in gone:
            request.hear(ended)

    def _retry_after(self) -> int:
        """Seconds in which what waits will have been written, at the pace so far."""
        pace = self._state.new_tokens / self._busy if self._busy else 0.0
        seconds = self._waiting.tokens / pace if pace else 1.0
        return min(max(1, math.ceil(seconds)), LONGEST_WAIT)


def _unpredictable(batch: Decoding) -> dict[int, Ended]:
    """The requests of which the model says nothing."""
    error = TensorError("expected finite log-probabilities from the model, got NaN or none")
    return {n: Ended("broken", error) for n, fine in enumerate(batch.predicts.tolist()) if not fine}


class _Kept(NamedTuple):
    """Bytes that are kept.

    Attributes:
        row: of a row of the model, however short it is. token: of each of its tokens. between: of a token between the
            passes. following: of what one particle says may follow.
    """

    row: int
    token: int
    between: int
    following: int


def _kept_of(model: Backbone, cut: int) -> _Kept:
    """By sessions of two lengths, which are opened for that.

    Raises:
        TensorError: a model whose sessions cannot be joined.
    """
    few, many = 16, 80
    sizes = []
    with torch.no_grad():
        for tokens in (few, many):
            session = model.open(1, tokens)
            read = session.read(torch.zeros(1, tokens, dtype=torch.long), tail=1)
            sizes.append(session.nbytes)
            session.join(session.select([0]))  # requests will have to
    assert read.after is not None
    by_token = (sizes[1] - sizes[0]) // (many - few)
    between = read.hidden.shape[2] * read.hidden.element_size() if cut else 0
    return _Kept(sizes[0] - few * by_token, by_token, between, read.after.nbytes)
