"""What a conversation is between its turns: what was said, what it was asked to be, and what each turn gives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bayes_dispatch.arguments import real, seed, truth, whole
from bayes_dispatch.dispatcher.arrays import short_repr
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.two_pass.blends import Blend
from bayes_dispatch.inference.two_pass.filtering import FilterState
from bayes_dispatch.inference.two_pass.generation import Cost
from bayes_dispatch.model.backbone import Tokens

__all__ = ["MAX_CONTEXT", "ChatSettings", "ChatState", "Transcript", "Turn"]


MAX_CONTEXT = 1_048_576  # memory is set aside for it


@dataclass(frozen=True)
class ChatSettings:
    """What holds for a whole conversation.

    Attributes:
        blend: how a posterior becomes particles. seed: of posterior draws and sampling.
        threshold: nats a token by which a new posterior must predict otherwise for the chat to re-adapt; 0 for
            whenever it does at all, infinity for never.
        max_context: tokens of the transcript, a turn and its reply among them.
        own_evidence: whether the model's tokens go on filtering the particles when the reply has ended.

    Raises:
        ConfigError: a setting out of range.
    """

    blend: Blend
    seed: int = 0
    threshold: float = 0.01
    max_context: int = 4096
    own_evidence: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", seed(self.seed))
        if self.threshold != math.inf:
            object.__setattr__(self, "threshold", real("threshold", self.threshold, 0))
        truth("own_evidence", self.own_evidence)
        object.__setattr__(self, "max_context", whole("max_context", self.max_context, 2, MAX_CONTEXT))

    def check_reply(self, max_new_tokens: int) -> None:
        """Raise ``ConfigError`` unless a reply of so many tokens leaves room for what it replies to."""
        if max_new_tokens >= self.max_context:
            most = f"expected max_new_tokens of less than max_context, {self.max_context} tokens"
            raise ConfigError(f"{most}, got {max_new_tokens}")


@dataclass(frozen=True, eq=False)
class Transcript:
    """The tokens of a conversation in order, as they were said: nothing is tokenised again.

    Attributes:
        ids: T tokens. own: (T,), true for those that the model wrote. user: (T,), true for those of the user's words; a
            chat template's are neither.
        spans: (T, 2), of each token its first byte in ``data`` and the one after its last. data: what was said.
    """

    ids: np.ndarray
    own: np.ndarray
    user: np.ndarray
    spans: np.ndarray
    data: bytes

    @classmethod
    def empty(cls) -> "Transcript":
        nobody = np.zeros(0, dtype=bool)
        return cls(np.zeros(0, dtype=np.int64), nobody, nobody, np.zeros((0, 2), dtype=np.int64), b"")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def said(self) -> tuple[bytes, Tokens]:
        """The user's words alone, and their tokens."""
        spans = self.spans[self.user]
        covered = np.zeros(len(self.data) + 1, dtype=np.int64)
        np.add.at(covered, spans[:, 0], 1)
        np.add.at(covered, spans[:, 1], -1)
        theirs = covered.cumsum()[:-1] > 0
        places = np.concatenate([[0], theirs.cumsum()])[spans]
        ids, data = self.ids[self.user].tolist(), np.frombuffer(self.data, dtype=np.uint8)
        return data[theirs].tobytes(), Tokens(tuple(ids), tuple((start, stop) for start, stop in places.tolist()))

    def followed_by(
        self,
        ids: Sequence[int],
        spans: Sequence[tuple[int, int]] | None = None,
        data: bytes = b"",
        *,
        own: bool = False,
        user: bool = False,
    ) -> "Transcript":
        """With more tokens at its end.

        Args:
            spans: of each token in ``data``; ``None`` where they have no text. own, user: whose they are.
        """
        new = (
            np.zeros((len(ids), 2), dtype=np.int64) if spans is None else np.array(spans, dtype=np.int64).reshape(-1, 2)
        )
        return Transcript(
            np.concatenate([self.ids, np.array(ids, dtype=np.int64)]),
            np.concatenate([self.own, np.full(len(ids), own)]),
            np.concatenate([self.user, np.full(len(ids), user)]),
            np.concatenate([self.spans, len(self.data) + new]),
            self.data + data,
        )

    def since(self, start: int) -> "Transcript":
        """Without the tokens before ``start``."""
        at = int(self.spans[start:, 0].min(initial=len(self.data)))
        return Transcript(
            self.ids[start:], self.own[start:], self.user[start:], self.spans[start:] - at, self.data[at:]
        )

    def last(self, most: int) -> "Transcript":
        """The last tokens, at most ``most``, from a good place.

        That is where a template begins a turn, or else where a line begins, if it is in the first half of them; else
        the next beginning of a character.
        """
        start = max(0, len(self) - most)
        if start > 0:
            places = range(start, min(start + most // 2 + 1, len(self)))
            found = [t for begins in (self._begins_turn, self._begins_line) for t in places if begins(t)]
            start = next(iter(found), start)
            while not found and start < len(self) and self._amid_character(start):
                start += 1
        return self.since(start)

    def _begins_turn(self, place: int) -> bool:
        return bool(self.own[place - 1] and not (self.own[place] or self.user[place]))

    def _begins_line(self, place: int) -> bool:
        start, stop = self.spans[place]
        return bool(self.spans[place - 1, 1] <= start < stop and self.data[start - 1 : start] == b"\n")

    def _amid_character(self, place: int) -> bool:
        start, stop = self.spans[place]
        return bool(start < self.spans[place - 1, 1] or (start < stop and self.data[start] & 0xC0 == 0x80))


@dataclass(frozen=True, eq=False)
class ChatState:
    """All of a conversation that its caches cannot be made from again without.

    Attributes:
        transcript: what is left of what was said. turns: how many there were.
        rows: (S, K + 1), blend weights of the particles that run. filtered: their filter, which has read all turns.
    """

    transcript: Transcript
    turns: int
    rows: np.ndarray
    filtered: FilterState

    @classmethod
    def empty(cls, components: int) -> "ChatState":
        """Before the first turn: no particles."""
        nothing = torch.zeros(1, 0, dtype=torch.double)
        rows = np.zeros((0, components))
        return cls(
            Transcript.empty(),
            0,
            rows,
            FilterState(nothing[:, None], nothing, torch.zeros(1, 1, dtype=torch.double), rows[None]),
        )


@dataclass(frozen=True, eq=False)
class Turn:
    """One reply, of n tokens, to one turn of the user.

    Attributes:
        text: the reply. token_ids, log_probabilities, predictive_entropy, mutual_information: (n,), as in
            ``Generation``.
        posterior: the dispatcher's, of all that the user said in the transcript.
        weights: (K + 1,), the filtered mean of the blend weights when the user's turn had been read.
        divergence: nats a token by which the posterior predicts otherwise than the particles that ran before
            (``expected_divergence``); NaN for the first turn.
        adapted: whether the particles were replaced. forgotten: tokens dropped from the transcript before this turn.
        cost: of the turn. ``prompt_tokens`` are those of the turn (and what begins a text); what was read again
            is in ``prefill``, and what the divergence took in ``first_pass``.
    """

    text: str
    token_ids: np.ndarray
    log_probabilities: np.ndarray
    predictive_entropy: np.ndarray
    mutual_information: np.ndarray
    posterior: DispatchPosterior
    weights: np.ndarray
    divergence: float
    adapted: bool
    forgotten: int
    cost: Cost

    __repr__ = short_repr
