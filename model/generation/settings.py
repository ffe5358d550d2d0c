"""What generation is asked for, checked once."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.generation.sampling import Sampling

__all__ = ["NO_TOKEN", "GenerationSettings"]

NO_TOKEN = -1  # what fills a row that has ended where there is no end token


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings of greedy and sampled generation and of beam search.

    Attributes:
        max_new_tokens: tokens to add at most. sampling: how each is chosen.
        repetition_penalty: see ``penalise_repetition``; 1 for none.
        num_beams: hypotheses that are kept at each step; 1 for none but the chosen.
        length_penalty: hypotheses are ranked by their total log-probability / length ** length_penalty: 0 for totals,
            1 for means; more prefers longer ones. Used by beam search.
        eos_token_id: a row ends with it.
        stop_sequences: a row ends when its new tokens end with one of them.

    Raises:
        ConfigError: a setting outside its range, or beams that are sampled.
    """

    max_new_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009 (it is frozen)
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    eos_token_id: int | None = None
    stop_sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"expected a whole number as {name} of at least 1, got {value!r}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"expected a finite repetition_penalty above 0, got {self.repetition_penalty}")
        if not 0 <= self.length_penalty < float("inf"):
            raise ConfigError(f"expected a finite length_penalty of at least 0, got {self.length_penalty}")
        if self.num_beams > 1 and self.sampling.do_sample:
            raise ConfigError(f"expected do_sample=False with beams, got do_sample=True and {self.num_beams} beams")

    @property
    def fill(self) -> int:
        """What follows the last token of a row that has ended."""
        return NO_TOKEN if self.eos_token_id is None else self.eos_token_id

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ``ConfigError`` for ids outside the vocabulary, or more beams than there are continuations."""
        ending = [token for stop in self.stop_sequences for token in stop]
        if self.eos_token_id is not None:
            ending.append(self.eos_token_id)
        for token in ending:
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"expected eos_token_id and stop_sequences of tokens in 0 … {vocab_size - 1}, got {token}"
                )
        steps = min(self.max_new_tokens, self.num_beams.bit_length())  # enough: 2 ** bit_length exceeds num_beams
        if self.num_beams > vocab_size**steps:
            raise ConfigError(
                f"expected at most {vocab_size**steps} beams, as {vocab_size} tokens make no more continuations of "
                f"{self.max_new_tokens}, got {self.num_beams}"
            )


def read_stop_sequences(stop_sequences: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    """Stop sequences as tuples.

    Raises:
        ConfigError: an empty one, or one that is no sequence of whole numbers.
    """
    try:
        stops = tuple(tuple(operator.index(token) for token in stop) for stop in stop_sequences or ())
    except TypeError:
        raise ConfigError(f"expected stop_sequences that are sequences of token ids, got {stop_sequences!r}") from None
    if () in stops:
        raise ConfigError("expected at least one token in each stop sequence, got an empty one")
    return stops
