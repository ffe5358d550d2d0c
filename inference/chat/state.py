"""What a conversation is between its turns: what was said, what it was asked to be, and what each turn gives."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from bayes_dispatch.arguments import real, seed, whole
from bayes_dispatch.dispatcher.arrays import short_repr
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.two_pass.blends import Blend
from bayes_dispatch.inference.two_pass.filtering import FilterState
from bayes_dispatch.inference.two_pass.generation import Cost

__all__ = ["ChatSettings", "ChatState", "Transcript", "Turn"]


MAX_CONTEXT = 1_048_576  # memory is set aside for it


@dataclass(frozen=True)
class ChatSettings:
    """What holds for a whole conversation.

    Attributes:
        blend: how a posterior becomes particles. seed: of posterior draws and sampling.
        threshold: nats a token by which a new posterior must predict otherwise for the chat to re-adapt; 0 for
            whenever it does at all, infinity for never.
        max_context: bytes of the transcript, a turn and its reply among them.
        own_evidence: whether the model's bytes go on filtering the particles when the reply has ended.

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
        object.__setattr__(self, "max_context", whole("max_context", self.max_context, 2, MAX_CONTEXT))

    def check_reply(self, max_new_tokens: int) -> None:
        """Raise ``ConfigError`` unless a reply of so many bytes leaves room for what it replies to."""
        if max_new_tokens >= self.max_context:
            most = f"expected max_new_tokens of less than max_context, {self.max_context} bytes"
            raise ConfigError(f"{most}, got {max_new_tokens}")


@dataclass(frozen=True, eq=False)
class Transcript:
    """The bytes of a conversation in order, without anything between the turns.

    Attributes:
        data: T bytes. own: (T,), true for those that the model wrote, false for the user's.
    """

    data: bytes
    own: np.ndarray

    @classmethod
    def empty(cls) -> "Transcript":
        return cls(b"", np.zeros(0, dtype=bool))

    def __len__(self) -> int:
        return len(self.data)

    @property
    def user(self) -> bytes:
        """The user's bytes alone."""
        return np.frombuffer(self.data, dtype=np.uint8)[~self.own].tobytes()

    def followed_by(self, data: bytes, own: bool) -> "Transcript":
        """With more bytes of one of the two at its end."""
        return Transcript(self.data + data, np.concatenate([self.own, np.full(len(data), own)]))

    def last(self, most: int) -> "Transcript":
        """The last bytes, at most ``most``, from the beginning of a line where one begins in the first half of them.

        Else from the beginning of a character.
        """
        start = max(0, len(self) - most)
        if start > 0:
            newline = self.data.find(b"\n", start - 1, start + most // 2)
            if newline >= 0:
                start = newline + 1
            else:
                while start < len(self) and self.data[start] & 0xC0 == 0x80:  # amid a character of UTF-8
                    start += 1
        return Transcript(self.data[start:], self.own[start:])


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
            FilterState(nothing[:, None], nothing, torch.zeros(1, dtype=torch.double), rows[None]),
        )


@dataclass(frozen=True, eq=False)
class Turn:
    """One reply, of n bytes, to one turn of the user.

    Attributes:
        text: the reply. token_ids, log_probabilities, predictive_entropy, mutual_information: (n,), as in
            ``Generation``.
        posterior: the dispatcher's, of all the user's bytes in the transcript.
        weights: (K + 1,), the filtered mean of the blend weights when the user's turn had been read.
        divergence: nats a token by which the posterior predicts otherwise than the particles that ran before
            (``expected_divergence``); NaN for the first turn.
        adapted: whether the particles were replaced. forgotten: bytes dropped from the transcript before this turn.
        cost: of the turn. ``prompt_tokens`` are what the user said (and the beginning token); what was read again
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
