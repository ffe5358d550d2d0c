"""A reply of a chat while it is written."""

import numpy as np

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.inference.chat.state import Transcript, Turn
from bayes_dispatch.inference.two_pass.filtering import FilterState
from bayes_dispatch.inference.two_pass.generation import Cost, Streamed
from bayes_dispatch.inference.two_pass.particles import Token
from bayes_dispatch.inference.two_pass.prompts import Written

__all__ = ["Reply"]


class Reply:
    """What is written, to a turn of the user's that has been read.

    Args:
        transcript: up to the turn. written: nothing yet. bytewise: whether tokens are bytes.
        filtered: the filter when the turn had been read. The others: see ``Turn``.

    Attributes:
        transcript: with what is written so far. written: that alone. cost: so far.
    """

    def __init__(
        self,
        *,
        transcript: Transcript,
        written: Written,
        bytewise: bool,
        posterior: DispatchPosterior,
        weights: np.ndarray,
        filtered: FilterState,
        divergence: float,
        adapted: bool,
        forgotten: int,
        cost: Cost,
    ) -> None:
        self.transcript, self.written, self.filtered, self.cost = transcript, written, filtered, cost
        self._posterior, self._weights, self._bytewise = posterior, weights, bytewise
        self._divergence, self._adapted, self._forgotten = divergence, adapted, forgotten
        self._tokens: list[Token] = []

    def add(self, token: Token) -> bool:
        """Write one more token; whether it is the last."""
        ids = token.ids.tolist()
        ended = self.written.add(ids[0])
        data = bytes(ids) if self._bytewise else self.written.piece.encode()
        self.transcript = self.transcript.followed_by(ids, [(0, len(data))], data, own=True)
        self._tokens.append(token)
        return ended

    def streamed(self, last: bool) -> Streamed:
        """The token that was added last."""
        token = self._tokens[-1]
        return Streamed(
            prompt=0,
            text=self.written.piece,
            token_id=int(token.ids[0]),
            log_probability=float(token.log_probabilities[0]),
            predictive_entropy=float(token.entropy[0]),
            mutual_information=float(token.mutual_information[0]),
            weights=token.weights[0],
            posterior=self._posterior,
            last=last,
        )

    def turn(self) -> Turn:
        """The whole."""
        numbers = [(t.log_probabilities[0], t.entropy[0], t.mutual_information[0]) for t in self._tokens]
        log_probabilities, entropy, information = np.array(numbers).T
        return Turn(
            text=self.written.text,
            token_ids=np.array(self.written.ids),
            log_probabilities=log_probabilities,
            predictive_entropy=entropy,
            mutual_information=information,
            posterior=self._posterior,
            weights=self._weights,
            divergence=self._divergence,
            adapted=self._adapted,
            forgotten=self._forgotten,
            cost=self.cost,
        )
