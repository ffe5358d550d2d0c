"""The caches of a conversation: what is kept from turn to turn, and can be made again from a ``ChatState``."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float

from bayes_dispatch.inference.chat.conversation import Conversation
from bayes_dispatch.inference.chat.form import Form
from bayes_dispatch.inference.chat.state import ChatState, Transcript
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.particles import Decoding, settle
from bayes_dispatch.inference.two_pass.readers import CachedReader, straight

if TYPE_CHECKING:
    from bayes_dispatch.inference.two_pass.system import System

__all__ = ["ChatCaches"]


class ChatCaches:
    """One conversation read by the unadapted model, and by particles on top of it.

    Args:
        system: the model and what goes with it. cut: blocks that no expert adapts. form: of turns.
        max_context: tokens of a transcript that there is room for.

    Attributes:
        conversation: the unadapted model's part. decoding: the particles'. rows: (S, K + 1), their blend weights.
    """

    decoding: Decoding
    rows: Float[np.ndarray, "S components"]

    def __init__(self, system: "System", cut: int, form: Form, max_context: int) -> None:
        self._system, self._capacity = system, len(form.begin) + max_context
        self.conversation = Conversation(system, cut, form.begin, self._capacity)
        self._continues = system.tokenizer.continues.clone()
        self._continues[list(form.ends)] = True
        self._reader: CachedReader | None = None
        self._read = self._room = 0  # tokens that the particles have read, and that there is room for
        self._replaced = 0  # evaluations of readers that are no more

    @property
    def evaluated(self) -> int:
        """How often a block has run on a token for the particles, or below them."""
        return self.conversation.below + self._replaced + (0 if self._reader is None else self._reader.evaluated)

    @property
    def nbytes(self) -> int:
        """Of all states and caches."""
        return self.conversation.nbytes + (0 if self._reader is None else self._reader.nbytes)

    def adapt(self, particles: Particles, transcript: Transcript) -> None:
        """Read all that the conversation has read under new particles, the user's tokens filtering them."""
        evidence = self.conversation.user(transcript)
        settled = straight(settle(lambda own: self._begin(own, evidence), particles))
        self.decoding = settled.decoding
        self.rows = settled.weights if particles.refined else particles.weights[0]
        if settled.kept is not None:
            self.rows = self.rows[settled.kept[0]]

    def write(self, transcript: Transcript) -> None:
        """Read what the model has written since, which filters the particles of this reply."""
        self.conversation.read(transcript)
        self._read_on(np.ones(len(self.conversation.ids), dtype=bool))

    def go_on(self, state: ChatState, transcript: Transcript) -> None:
        """Read all that is new to the particles of ``state``, which are made again where there are none.

        Args:
            transcript: what the user has said since is at its end; it filters the particles.
        """
        evidence = self.conversation.user(transcript)
        evidence[: len(evidence) - len(transcript) + len(state.transcript)] = False
        if self._reader is None:
            particles = Particles(state.rows[None], np.full((1, len(state.rows)), 1 / len(state.rows)))
            self.decoding, self.rows = self._begin(particles, evidence), state.rows
            self.decoding.filtered = state.filtered
            straight(self.decoding.read_prompts())
            return
        self._read_on(evidence)

    def _read_on(self, evidence: Bool[np.ndarray, " T"]) -> None:
        """Read what is new to the particles; those of all tokens that are evidence filter them."""
        assert self._reader is not None
        count = len(self.conversation.ids)
        if count > self._room:
            self._room = min(max(count, 2 * self._room), self._capacity)
        self._reader.lengthen(self.conversation.prefix, self._room)
        new = slice(self._read, count)
        ids = torch.tensor([self.conversation.ids[new]])
        self.decoding.read_on(ids, torch.from_numpy(evidence[None, new]))
        self._read = count

    def _begin(self, particles: Particles, evidence: Bool[np.ndarray, " T"]) -> Decoding:
        if self._reader is not None:
            self._replaced += self._reader.evaluated
        text = self.conversation
        self._read = len(text.ids)
        self._room = min(2 * self._read, self._capacity)
        model, experts = self._system.model, self._system.experts
        self._reader = CachedReader(model, experts, particles, text.prefix, [0], self._room)
        ids, lengths = torch.tensor([text.ids]), torch.tensor([self._read])
        return Decoding(self._reader, particles, self._continues, ids, lengths, torch.from_numpy(evidence[None]))
