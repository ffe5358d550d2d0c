"""Conversations: caches stay over the turns, the weights follow what the user says, and experts change when they must.

The model reads the whole conversation, its own words among it. What it learns about the weights it learns from the
user's tokens alone: they are pooled and counted for the dispatcher, and they filter the particles. What the model wrote
it drew from its own predictive; seeing that again tells it nothing (an action is an intervention, not an observation:
Ortega and others 2021, arXiv 2110.10819), and counting it would make the model ever surer of its own guesses. Within a
reply its tokens do filter the particles, because a reply is drawn from the mixture over whole replies only if later
ones continue what the likely particles began; when the reply has ended the weights go back to those that the user's
tokens left. ``own_evidence=True`` keeps them instead.

After each turn of the user the dispatcher gives a new posterior, of all the user's tokens in the transcript. If it
would predict otherwise than the particles that run (``divergence``), by more than ``threshold`` nats a token, the chat
re-adapts: it reads the transcript again under new particles. Only the caches above the first adapted block are made
anew; those below never go stale. Else everything goes on from the caches, and the particles are filtered by the turn.

A transcript has at most ``max_context`` tokens. When a turn and its reply might not fit, the oldest half is forgotten,
for the evidence too, and what is left is read again: by new particles, or by the same with the weights they had. So
memory is bounded for every model.
"""

import logging
from collections.abc import Generator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from bayes_dispatch.arguments import whole
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.inference.chat.caches import ChatCaches
from bayes_dispatch.inference.chat.divergence import expected_divergence
from bayes_dispatch.inference.chat.file import write_chat
from bayes_dispatch.inference.chat.form import Form
from bayes_dispatch.inference.chat.reply import Reply
from bayes_dispatch.inference.chat.state import ChatSettings, ChatState, Transcript, Turn
from bayes_dispatch.inference.two_pass.events import tell
from bayes_dispatch.inference.two_pass.filtering import ParticleFilter
from bayes_dispatch.inference.two_pass.generation import Cost, Streamed
from bayes_dispatch.inference.two_pass.particles import Token
from bayes_dispatch.inference.two_pass.prompts import Stop, Writing, Written, check_turn
from bayes_dispatch.inference.two_pass.system import POSTERIOR_DRAWS, cut_of
from bayes_dispatch.model.backbone import Tokens
from bayes_dispatch.model.generation.sampling import row_generators, row_seeds
from bayes_dispatch.model.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from bayes_dispatch.inference.two_pass.system import System

__all__ = ["Chat"]

logger = logging.getLogger(__name__)


class Chat:
    """A conversation with a two-pass system: see ``TwoPassGenerator.chat``.

    When a turn fails, or is interrupted, the chat is as it was before that turn.

    Args:
        system: model, tokenizer, experts and dispatcher. settings: of the conversation.
        file: written after every turn, if given. state: to go on from; the beginning by default.

    Raises:
        ConfigError: a context that is longer than the model can read.

    Attributes:
        turn: the last one of this process, ``None`` before it.
    """

    def __init__(
        self,
        system: "System",
        settings: ChatSettings,
        file: Path | None = None,
        state: ChatState | None = None,
    ) -> None:
        self.settings = settings
        self.turn: Turn | None = None
        self._system, self._file = system, file
        self._cut, self._form = cut_of(system), Form.of(system.tokenizer)
        whole("max_context", settings.max_context, 2, self._form.room(system.model.longest))
        self._state = ChatState.empty(len(system.experts.components)) if state is None else state
        self._caches: ChatCaches | None = None
        self._answering = Lock()

    @property
    def transcript(self) -> Transcript:
        """What was said and is not forgotten."""
        return self._state.transcript

    @property
    def turns(self) -> int:
        """How many there were, those before a resumption among them."""
        return self._state.turns

    @property
    def weights(self) -> Float[np.ndarray, " components"]:
        """(K + 1,), the mean blend weights that the next turn begins with; before the first turn 0."""
        return ParticleFilter.at(self._state.filtered).mean()[0]

    @property
    def nbytes(self) -> int:
        """Of all caches that are kept at present."""
        return 0 if self._caches is None else self._caches.nbytes

    def say(
        self,
        text: str | bytes,
        max_new_tokens: int = 256,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        stop: Stop | EllipsisType = ...,
    ) -> Turn:
        """Read a turn of the user's, and reply.

        Args:
            text: at least 1 byte of UTF-8. It comes directly after what was said before, unless the model has a chat
                template: only that adds something.
            max_new_tokens: most tokens of the reply. do_sample, temperature: see ``Sampling``; greedy by default.
            stop: text with which the reply ends; a list for any of several, ``None`` for none. By default it ends with
                a line, or where the model has a chat template as the model ends its turns.

        Raises:
            PromptError: text that is empty, no UTF-8, or too long for ``max_context`` with its reply.
            ConfigError: a setting out of range, a blend by layer, or a stream of this chat has not ended.
            TensorError, EvidenceError: the model gives NaN. OSError: the chat's file cannot be written.
            BundleError: another has gone on with that file.
        """
        reply = self.stream(text, max_new_tokens, do_sample=do_sample, temperature=temperature, stop=stop)
        try:
            for _ in reply:
                pass
        except BaseException as error:  # between two tokens, too
            reply.throw(error)
            raise
        assert self.turn is not None
        return self.turn

    def stream(
        self,
        text: str | bytes,
        max_new_tokens: int = 256,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        stop: Stop | EllipsisType = ...,
    ) -> Generator[Streamed, None, None]:
        """What ``say`` gives with the same arguments, token by token as they come; then ``turn`` has all of it.

        Nothing is read before the first token is asked for. A stream that is closed ends the reply there; an error that
        is thrown into it takes the turn back.

        Raises:
            PromptError, ConfigError, TensorError, EvidenceError, OSError, BundleError: see ``say``.
        """
        ending = self._form.stop if isinstance(stop, EllipsisType) else stop
        writing = Writing.of(max_new_tokens, do_sample, temperature, ending)
        self.settings.check_reply(writing.max_new_tokens)
        most = self.settings.max_context - writing.max_new_tokens - self._form.around
        return self._answer(*check_turn(self._system.tokenizer, text, most), writing)

    def save(self, path: str | Path) -> None:
        """Write what ``TwoPassGenerator.resume_chat`` goes on from, whole or not at all.

        Raises:
            ConfigError: a blend that is none of this package's. OSError: the disk is full, or refuses.
        """
        write_chat(Path(path), self._system, self.settings, self._state)

    def _answer(self, data: bytes, words: Tokens, writing: Writing) -> Generator[Streamed, None, None]:
        if not self._answering.acquire(blocking=False):
            raise ConfigError("expected one reply at a time, got a turn before the stream of the last one has ended")
        last = False
        try:
            with torch.inference_mode(False), torch.no_grad():  # caches of that mode would refuse a turn outside it
                reply, caches = self._hear(data, words, writing)
            seed = self.settings.seed + 2 * self.turns + 1
            generators = row_generators(seed, [reply.transcript.data])
            while not last:
                with torch.inference_mode(False), torch.no_grad():
                    token = caches.decoding.choose([writing.sampling], generators)
                    last = self._write(reply, caches, token)
                yield reply.streamed(last)
            self._end(reply, caches)
        except GeneratorExit:
            if not last:
                reply.written.close()
            self._end(reply, caches)
            raise
        finally:
            self._answering.release()

    def _hear(self, data: bytes, words: Tokens, writing: Writing) -> tuple[Reply, ChatCaches]:
        """Read the user's turn, under new particles if it must be."""
        settings, state, system = self.settings, self._state, self._system
        before, transcript = len(state.transcript), self._form.heard(state.transcript, data, words)
        most = settings.max_context - (len(transcript) - before) - writing.max_new_tokens
        caches, self._caches = self._caches, None  # until the turn has ended: they are ahead of the conversation
        if before > most:
            state = replace(state, transcript=state.transcript.last(min(settings.max_context // 2, most)))
            caches, transcript = None, self._form.heard(state.transcript, data, words)
        if caches is None:
            caches = ChatCaches(system, self._cut, self._form, settings.max_context)
        new = len(transcript) - len(state.transcript)
        first_pass, evaluated = caches.conversation.first_pass, caches.evaluated
        caches.conversation.read(transcript)
        evidence = caches.conversation.evidence(transcript)
        seeds = row_seeds(settings.seed + 2 * state.turns, [transcript.data])
        posterior = system.dispatcher.posterior(evidence, draws=POSTERIOR_DRAWS, seed=seeds)
        candidate = settings.blend.particles(posterior)
        if candidate.layers is not None:
            raise ConfigError(f"expected a blend of one set of weights for a chat, got {settings.blend.name} by layer")
        divergence, compared = float("nan"), 0
        if state.turns:
            divergence, compared = expected_divergence(
                system, self._cut, self._form.begin, transcript, state.rows, state.filtered, candidate
            )
        adapted = state.turns == 0 or divergence > settings.threshold
        if adapted:
            caches.adapt(candidate, transcript)
        else:
            caches.go_on(state, transcript)
        tell(logger, logging.DEBUG, "turn dispatched", lambda: self._dispatched(posterior, divergence))
        tell(logger, logging.DEBUG, "turn read", lambda: self._read(caches, adapted, before - len(state.transcript)))
        return Reply(
            transcript=transcript,
            written=Written(system.tokenizer, caches.conversation.ids, writing, self._form.ends),
            bytewise=isinstance(system.tokenizer, ByteTokenizer),
            posterior=posterior,
            weights=caches.decoding.weights[0],
            filtered=caches.decoding.filtered,
            divergence=divergence,
            adapted=adapted,
            forgotten=before - len(state.transcript),
            cost=Cost(
                system.model.depth,
                prompt_tokens=new + (0 if state.turns else len(self._form.begin)),
                first_pass=caches.conversation.first_pass - first_pass + compared,
                prefill=caches.evaluated - evaluated,
            ),
        ), caches

    def _write(self, reply: Reply, caches: ChatCaches, token: Token) -> bool:
        """Go on with a token of the reply; whether it is the last one, which is read along with the next turn."""
        if reply.add(token):
            caches.decoding.append(token.ids, last=True)
            return True
        evaluated = caches.evaluated
        caches.write(reply.transcript)
        reply.cost += Cost(self._system.model.depth, new_tokens=1, decode=caches.evaluated - evaluated)
        return False

    def _end(self, reply: Reply, caches: ChatCaches) -> None:
        """Take a reply into the conversation."""
        if not self.settings.own_evidence:
            caches.decoding.filtered = reply.filtered
        before, turn = self._state, reply.turn()
        state = ChatState(reply.transcript, self.turns + 1, caches.rows, caches.decoding.filtered)
        try:
            if self._file is not None:
                write_chat(self._file, self._system, self.settings, state, [before])
            self._state, self.turn, self._caches = state, turn, caches
        except BundleError:  # what is there is another's
            raise
        except BaseException:
            if self._file is not None and self._state is before:
                with suppress(OSError, BundleError):  # the file is not ahead, whether it had been written or not
                    write_chat(self._file, self._system, self.settings, before, [before, state])
            raise
        facts = {"turn": state.turns, "tokens": len(reply.written.ids), "saved": self._file is not None}
        tell(logger, logging.INFO, "replied", lambda: facts | asdict(reply.cost))

    def _dispatched(self, posterior: DispatchPosterior, divergence: float) -> dict[str, Any]:
        mean = dict(zip(posterior.experts, np.round(posterior.mean[0], 4).tolist(), strict=True))
        moved = None if np.isnan(divergence) else round(divergence, 6)
        threshold = self.settings.threshold if np.isfinite(self.settings.threshold) else None
        return {"turn": self.turns + 1, "mean": mean, "divergence": moved, "threshold": threshold}

    def _read(self, caches: ChatCaches, adapted: bool, forgotten: int) -> dict[str, Any]:
        sizes = {"rows": len(caches.rows), "cache_bytes": caches.nbytes, "forgotten": forgotten}
        return {"turn": self.turns + 1, "adapted": adapted, **sizes}
