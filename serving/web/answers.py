"""OpenAI's objects, of choices. Beside OpenAI's fields they have ``dispatch``, and with logprobs each token has its
mutual information and the weights before it.

``dispatch`` is one object where there is one choice, and a list in the order of the choices where there are several. In
a stream the first chunk of each choice has that of this choice. OpenAI's clients keep it as an extra field.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bayes_dispatch.serving.web.choices import Choice, ChoiceToken, Piece
from bayes_dispatch.serving.web.jobs import Job
from bayes_dispatch.serving.work import Begun, Work

__all__ = ["Answer", "ChatShape", "CompletionShape", "Shape", "dispatch_answer", "dispatch_of", "usage_of"]


@runtime_checkable
class Shape(Protocol):
    """One endpoint's way to say things."""

    prefix: str
    whole: str
    chunk: str

    def choice(self, choice: Choice, text: str, tokens: Sequence[ChoiceToken] | None) -> dict[str, Any]:
        """All of a choice; ``tokens`` is ``None`` where logprobs were not asked for."""
        ...

    def first(self, choice: Choice) -> dict[str, Any]:
        """What a choice's stream begins with."""
        ...

    def part(self, choice: Choice, piece: Piece, tokens: Sequence[ChoiceToken] | None) -> dict[str, Any]:
        """More of it; ``choice.reason`` is set in the last part."""
        ...


class CompletionShape:
    """Of ``/v1/completions``."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, choice: Choice, text: str, tokens: Sequence[ChoiceToken] | None) -> dict[str, Any]:
        told = None if tokens is None else self._logprobs(tokens)
        return {"index": choice.index, "text": text, "logprobs": told, "finish_reason": choice.reason}

    def first(self, choice: Choice) -> dict[str, Any]:
        return self.choice(choice, "", None)

    def part(self, choice: Choice, piece: Piece, tokens: Sequence[ChoiceToken] | None) -> dict[str, Any]:
        return self.choice(choice, piece.text, tokens)

    @staticmethod
    def _logprobs(tokens: Sequence[ChoiceToken]) -> dict[str, Any]:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": None,
            "text_offset": [token.offset for token in tokens],
            "mutual_information": [token.mutual_information for token in tokens],
            "weights": [token.weights for token in tokens],
        }


class ChatShape:
    """Of ``/v1/chat/completions``."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice, text: str, tokens: Sequence[ChoiceToken] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._with_reason(choice, "message", message, tokens)

    def first(self, choice: Choice) -> dict[str, Any]:
        return self._with_reason(choice, "delta", {"role": "assistant", "content": ""}, None)

    def part(self, choice: Choice, piece: Piece, tokens: Sequence[ChoiceToken] | None) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or choice.reason is None else {}
        return self._with_reason(choice, "delta", delta, tokens)

    @staticmethod
    def _with_reason(
        choice: Choice, name: str, said: dict[str, Any], tokens: Sequence[ChoiceToken] | None
    ) -> dict[str, Any]:
        told = None if tokens is None else {"content": [_entry(token) for token in tokens], "refusal": None}
        return {"index": choice.index, name: said, "logprobs": told, "finish_reason": choice.reason}


def _entry(token: ChoiceToken) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": token.log_probability,
        "bytes": list(token.text.encode()),
        "top_logprobs": [],
        "mutual_information": token.mutual_information,
        "weights": token.weights,
    }


@dataclass(frozen=True)
class Answer:
    """One request's answer, whole or in chunks."""

    job: Job
    shape: Shape
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """The id that the client gets."""
        return f"{self.shape.prefix}-{self.id}"

    def whole(self, choices: Sequence[Choice], parts: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """All choices at once."""
        told = []
        for choice, pieces in zip(choices, parts, strict=True):
            tokens = [token for piece in pieces for token in piece.tokens] if self.job.logprobs else None
            told.append(self.shape.choice(choice, "".join(piece.text for piece in pieces), tokens))
        dispatches = [self._dispatch(choice) for choice in choices]
        return self._object(self.shape.whole, told) | {
            "usage": usage_of(choices),
            "dispatch": dispatches[0] if len(dispatches) == 1 else dispatches,
        }

    def first(self, choice: Choice) -> dict[str, Any]:
        """The chunk that a choice begins with."""
        return self._chunk([self.shape.first(choice)]) | {"dispatch": self._dispatch(choice)}

    def part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """The chunk of more of a choice."""
        tokens = piece.tokens if self.job.logprobs and piece.tokens else None
        return self._chunk([self.shape.part(choice, piece, tokens)])

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return self._chunk([]) | {"usage": usage_of(choices)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._object(self.shape.chunk, choices) | ({"usage": None} if self.job.usage else {})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.job.model,
            "choices": choices,
        }

    def _dispatch(self, choice: Choice) -> dict[str, Any]:
        assert choice.begun is not None  # it comes before anything else
        return dispatch_of(choice.begun, self.job.works[choice.index])


def dispatch_of(begun: Begun, work: Work) -> dict[str, Any]:
    """What is known of a prompt: the posterior of its weights, and how it is continued, if it is."""
    posterior, p_value = begun.posterior, begun.p_value
    return {
        "experts": list(posterior.experts),
        "mean": posterior.mean[0].tolist(),
        "interval_90": posterior.interval(0.9)[:, 0].T.tolist(),
        "p_value": None if p_value is None or np.isnan(p_value) else float(p_value),
        "foreign": bool(begun.foreign),
        **({} if work.writing is None else {"blend": work.blend.name}),
        "seed": work.seed,  # of the posterior's draws, too
        "prior_events": begun.prior_events,
    }


def usage_of(choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens; a prompt of several choices counts once."""
    read = {choice.prompt: choice.begun.prompt_tokens for choice in choices if choice.begun is not None}
    prompt, written = sum(read.values()), sum(choice.count for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def dispatch_answer(choice: Choice, job: Job) -> dict[str, Any]:
    """Of ``/v1/dispatch``."""
    assert choice.begun is not None
    return {
        "id": f"dispatch-{uuid.uuid4().hex}",
        "object": "dispatch",
        "created": int(time.time()),
        "model": job.model,
        "dispatch": dispatch_of(choice.begun, job.works[0]),
        "usage": usage_of([choice]),
    }
