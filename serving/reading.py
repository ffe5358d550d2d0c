"""From a request to a place in the batch: its prompt is read piece by piece, dispatched, and read by its particles."""

import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, PromptError, PromptTooLongError
from bayes_dispatch.inference.chat.conversation import Conversation
from bayes_dispatch.inference.chat.form import Form
from bayes_dispatch.inference.chat.state import Transcript
from bayes_dispatch.inference.two_pass.blends import Blend, Particles
from bayes_dispatch.inference.two_pass.particles import Decoding, settle
from bayes_dispatch.inference.two_pass.prompts import Writing, Written
from bayes_dispatch.inference.two_pass.readers import CachedReader
from bayes_dispatch.inference.two_pass.second_pass import on_base
from bayes_dispatch.inference.two_pass.system import POSTERIOR_DRAWS, System, cut_of, gate_of
from bayes_dispatch.model.backbone import Tokenizer
from bayes_dispatch.model.generation.sampling import row_generators, row_seeds
from bayes_dispatch.model.tokenizer import utf8
from bayes_dispatch.serving.work import Begun, Message, Work

__all__ = ["Heard", "Reading", "Running", "hear", "particles_of", "rows_of"]


@dataclass(frozen=True, eq=False)
class Heard:
    """A request in tokens.

    Attributes:
        begin: ids before all else. transcript: what was said, in which the user's words are evidence.
        ends: ids with which the answer ends. writing: how it is continued, ``None`` where it is not.
    """

    begin: tuple[int, ...]
    transcript: Transcript
    ends: frozenset[int]
    writing: Writing | None

    def __len__(self) -> int:
        """Tokens, those before all else among them."""
        return len(self.begin) + len(self.transcript)

    @property
    def tokens(self) -> int:
        """These, and at most those of the answer."""
        return len(self) + (0 if self.writing is None else self.writing.max_new_tokens)


def hear(tokenizer: Tokenizer, form: Form, longest: int | None, work: Work) -> Heard:
    """The tokens of a request; ``form`` is that of the tokenizer's conversations.

    A conversation has the form of the model's chat template, and without one nothing between its turns. What the system
    says comes before the user's first words, as templates without a place for it have it. The words of system and
    assistant are no evidence.

    Raises:
        PromptError: nothing is said, it is no UTF-8, or more than the model can read with the answer.
        ConfigError: turns of no conversation.
    """
    writing = work.writing
    if isinstance(work.prompt, str):
        data = utf8(work.prompt)
        words, nothing = tokenizer.tokenize(data, begin=False), tokenizer.tokenize(b"").ids
        text = Transcript.empty().followed_by(words.ids, words.spans, data, user=True)
        heard = Heard(nothing, text, tokenizer.ends, writing)
    else:
        heard = Heard(form.begin, _conversation(tokenizer, form, work.prompt), form.ends, writing)
    if not heard.transcript.user.any():
        raise PromptError("expected a prompt of at least one token, got none")
    if longest is not None and heard.tokens > longest:
        room = longest - len(heard)
        if not (work.shorter and writing is not None and room > 0):
            most = f"expected a prompt of at most {longest} tokens with the {heard.tokens - len(heard)} that follow"
            raise PromptTooLongError(f"{most}, got {len(heard)}")
        heard = replace(heard, writing=replace(writing, max_new_tokens=room))
    return heard


def _conversation(tokenizer: Tokenizer, form: Form, turns: tuple[Message, ...]) -> Transcript:
    before = turns[:1] if turns and turns[0].role == "system" else ()
    said = turns[len(before) :]
    roles = [turn.role for turn in said]
    if not roles or len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise ConfigError(f"expected turns of user and assistant, the user's first and last, got {roles}")
    text = Transcript.empty()
    system = "".join(f"{turn.content}\n\n" for turn in before)
    for turn in said:
        data = utf8(turn.content)
        words = tokenizer.tokenize(data, begin=False)
        if turn.role == "assistant":
            if form.stop is not None and not data.endswith(utf8(form.stop)):  # it is cut off where replies are sent
                data += utf8(form.stop)
                words = tokenizer.tokenize(data, begin=False)
            text = text.followed_by(words.ids, words.spans, data, own=True)
        elif system:
            own = utf8(system)
            told = tokenizer.tokenize(own, begin=False)
            text = text.followed_by(form.before).followed_by(told.ids, told.spans, own)
            text = text.followed_by(words.ids, words.spans, data, user=True).followed_by(form.after)
            system = ""
        else:
            text = form.heard(text, data, words)
    return text


def particles_of(blend: Blend, posterior: DispatchPosterior) -> Particles:
    """What a blend makes of a posterior.

    Raises:
        ConfigError: it cannot be made of that one, or has weights by layer, which engines do not run.
    """
    particles = blend.particles(posterior)
    if particles.layers is not None:
        raise ConfigError(f"expected a blend of one set of weights, got {blend.name} by layer")
    return particles


def rows_of(particles: Particles) -> int:
    """Rows of the model that one prompt may need: of the first pass, of particles, and of what refines them."""
    return 1 + particles.mass.shape[1] + particles.refined


@dataclass(eq=False)
class Running:
    """A request whose prompt has been read.

    Attributes:
        written: what it has written. writing, ends: how it ends. generator: that samples.
    """

    written: Written
    writing: Writing
    ends: frozenset[int]
    generator: np.random.Generator

    @property
    def reason(self) -> str:
        """Why it has ended: see ``work.Ended``."""
        stopped = any(self.written.text.endswith(stop) for stop in self.writing.stops)
        return "stop" if stopped or self.written.ids[-1] in self.ends else "length"


class Reading:
    """A request whose prompt is being read.

    Args:
        system: model, tokenizer, experts, dispatcher and gate. heard, work: what is asked.
        piece: tokens that are read at a time, those of every row counted.
        tell: called with ``Begun`` once the prompt is dispatched.

    Attributes:
        rows: of the model that it may need from now on, with that of the first pass. tokens: that each of them has
            room for.
        running, decoding: once the prompt has been read, if there is something to write.
    """

    def __init__(self, system: System, heard: Heard, work: Work, piece: int, tell: Callable[[Begun], None]) -> None:
        self.rows = 1
        self.tokens = heard.tokens
        self.running: Running | None = None
        self.decoding: Decoding | None = None
        self._system, self._heard, self._work, self._tell = system, heard, work, tell
        self._piece = piece if system.model.continues else None
        self._conversation: Conversation | None = None
        self._reader: CachedReader | None = None
        self._steps = self._read()

    @property
    def held(self) -> tuple[int, int]:
        """Rows that it has, and bytes of what they keep. A first pass that reads nothing off the model has none."""
        first = 0 if self._conversation is None else self._conversation.nbytes
        second = self._reader
        return (first > 0) + (0 if second is None else second.rows), first + (0 if second is None else second.nbytes)

    def step(self) -> bool:
        """Read some more; whether there is nothing left to read.

        Raises:
            BayesDispatchError: the request cannot be answered.
        """
        try:
            next(self._steps)
        except StopIteration:
            return True
        return False

    def _read(self) -> Generator[None, None, None]:
        system, heard, writing = self._system, self._heard, self._heard.writing
        conversation = self._conversation = Conversation(system, cut_of(system), heard.begin, self.tokens)
        while len(conversation.ids) < len(heard):
            conversation.read(heard.transcript, self._piece)
            conversation.pool(heard.transcript)
            yield
        particles = self._dispatch(conversation)
        if particles is None or writing is None:
            return
        self.rows = rows_of(particles)
        yield
        settled = yield from settle(partial(self._begin, conversation), particles, self._piece)
        self.decoding = settled.decoding
        self.running = Running(
            Written(system.tokenizer, conversation.ids, writing, heard.ends),
            writing,
            heard.ends,
            *row_generators(self._work.seed + 1, [heard.transcript.data]),
        )

    def _dispatch(self, conversation: Conversation) -> Particles | None:
        """The particles of the prompt; none where it is foreign and the request abstains."""
        system, work = self._system, self._work
        dispatcher = copy.copy(system.dispatcher)  # with the prior of this moment, whatever is learnt meanwhile
        evidence = conversation.evidence(self._heard.transcript)
        p_value, foreign = None, np.zeros(1, dtype=bool)
        if work.false_alarm_rate is not None:
            decision = gate_of(system).decide(dispatcher, evidence, work.false_alarm_rate)
            p_value, foreign = float(decision.p_values[0]), decision.foreign
        seeds = row_seeds(work.seed, [self._heard.transcript.data])
        posterior = dispatcher.posterior(evidence, draws=POSTERIOR_DRAWS, seed=seeds)
        events = dispatcher.prior.events
        told = replace(posterior, calibrated=None)  # which nobody asks for, and has all of the dispatcher
        self._tell(Begun(told, len(self._heard), p_value, bool(foreign[0]), evidence, events))
        if self._heard.writing is None or (work.abstain and foreign[0]):
            return None
        return on_base(particles_of(work.blend, posterior), foreign)

    def _begin(self, conversation: Conversation, particles: Particles) -> Decoding:
        """Of the prompt under particles."""
        system, prefix = self._system, conversation.whole
        reader = CachedReader(system.model, system.experts, particles, prefix, [0], self.tokens, joins=True)
        self._reader = reader
        continues = system.tokenizer.continues.clone()
        continues[list(self._heard.ends)] = True
        evidence = torch.from_numpy(conversation.user(self._heard.transcript)[None])
        return Decoding(reader, particles, continues, prefix.ids, prefix.tokens, evidence)
