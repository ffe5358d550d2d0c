"""A reply of a chat while it is written."""

import codecs

import numpy as np

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.inference.chat.state import Transcript, Turn
from bayes_dispatch.inference.two_pass.filtering import FilterState
from bayes_dispatch.inference.two_pass.generation import Cost, Streamed
from bayes_dispatch.inference.two_pass.particles import Token
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["Reply"]


class Reply:
    """What is written, to a turn of the user's that has been read.

    Args:
        transcript: up to the turn. filtered: the filter when it had been read. The others: see ``Turn``.

    Attributes:
        transcript: with what is written so far. data: that alone. cost: so far.
    """

    def __init__(
        self,
        *,
        transcript: Transcript,
        posterior: DispatchPosterior,
        weights: np.ndarray,
        filtered: FilterState,
        divergence: float,
        adapted: bool,
        forgotten: int,
        cost: Cost,
    ) -> None:
        self.transcript, self.filtered, self.cost, self.data = transcript, filtered, cost, b""
        self._posterior, self._weights = posterior, weights
        self._divergence, self._adapted, self._forgotten = divergence, adapted, forgotten
        self._tokens: list[Token] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: Token) -> None:
        """Write one more token."""
        data = bytes(token.ids.tolist())
        self.data += data
        self.transcript = self.transcript.followed_by(data, own=True)
        self._tokens.append(token)

    def streamed(self, last: bool) -> Streamed:
        """The token that was added last, once."""
        token = self._tokens[-1]
        return Streamed(
            prompt=0,
            text=self._decoder.decode(self.data[-1:], final=last),
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
            text=ByteTokenizer().decode(list(self.data)),
            token_ids=np.array(list(self.data)),
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
