"""A choice while it is written: its text without the stop that ends it, and what is told of each token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bayes_dispatch.serving.work import Begun, Ended, Wrote

__all__ = ["Choice", "ChoiceToken", "Piece", "Stops"]

REASONS = {"abstained": "content_filter", "dispatched": "stop", "length": "length", "stop": "stop"}  # as OpenAI's
WEIGHT_DIGITS = 6  # decimals of a token's weights: a chunk has K + 1 of them


class ChoiceToken(NamedTuple):
    """What logprobs have of a token.

    Attributes:
        text: characters that it completes. offset: of these, in the choice's text.
        log_probability, mutual_information: in nats; the latter ``None`` where the engine does not know it.
        weights: of base and the experts before it, in the order of the posterior's experts.
    """

    text: str
    offset: int
    log_probability: float
    mutual_information: float | None
    weights: tuple[float, ...]


class Piece(NamedTuple):
    """More of a choice: text that is decided, and the tokens whose text has begun with it."""

    text: str
    tokens: tuple[ChoiceToken, ...]


class Stops:
    """Lets a text through, but for the stop at its end. What may become one waits until that is decided.

    Args:
        stops: the text ends with the first of them that it has, as ``Written`` ends it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""

    def add(self, text: str) -> str:
        """What is decided with more of the text."""
        known = self._held + text
        longest = max(map(len, self._stops), default=0)
        for start in range(max(0, len(known) - longest), len(known)):
            if any(stop.startswith(known[start:]) for stop in self._stops):
                self._held = known[start:]
                return known[:start]
        self._held = ""
        return known

    def end(self) -> tuple[str, bool]:
        """What is decided by the end, and whether a stop ended it."""
        ending = max((stop for stop in self._stops if self._held.endswith(stop)), key=len, default="")
        return self._held[: len(self._held) - len(ending)], bool(ending)


@dataclass
class Choice:
    """One choice of an answer, from its engine's events.

    Attributes:
        index: among the choices. begun: its dispatch. reason: OpenAI's ``finish_reason`` when it has ended well.
        count: tokens so far. prompt: the number of its prompt. shares: (K + 1,) the sum of the tokens' weights.
    """

    index: int
    prompt: int
    stops: Sequence[str] = ()
    begun: Begun | None = None
    reason: str | None = None
    count: int = 0
    shares: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._stops = Stops(self.stops)
        self._waiting: list[ChoiceToken] = []
        self._written = self._decided = 0

    def write(self, token: Wrote) -> Piece:
        """What is decided with one more token."""
        self.count += 1
        self.shares = token.weights if self.shares is None else self.shares + token.weights
        weights = tuple(round(float(weight), WEIGHT_DIGITS) for weight in token.weights)
        told = token.log_probability, token.mutual_information, weights
        self._waiting.append(ChoiceToken(token.text, self._written, *told))
        self._written += len(token.text)
        return self._piece(self._stops.add(token.text))

    def end(self, ended: Ended) -> Piece | None:
        """What is decided by the end; ``None`` where it is none of a text, but a failure."""
        if ended.error is not None or ended.reason not in REASONS:
            return None
        text, stopped = self._stops.end()
        self.reason = "stop" if stopped else REASONS[ended.reason]
        return self._piece(text)

    def _piece(self, text: str) -> Piece:
        """With the tokens whose first character is decided; those that only end the text have none, and stay out."""
        self._decided += len(text)
        told = tuple(token for token in self._waiting if token.offset < self._decided)
        self._waiting = self._waiting[len(told) :]
        return Piece(text, told)
