"""What generation is asked for, checked once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Required, TypedDict

from bayes_dispatch.arguments import real, several, whole
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.generation.sampling import Sampling

__all__ = ["NO_TOKEN", "GenerationOptions", "GenerationSettings"]

NO_TOKEN = -1  # what fills a row that has ended where there is no end token


class GenerationOptions(TypedDict, total=False):
    """The arguments of ``generate`` that ``GenerationSettings`` explains and checks."""

    max_new_tokens: Required[int]
    min_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    num_beams: int
    length_penalty: float
    eos_token_id: int | Sequence[int] | None
    stop_sequences: Sequence[Sequence[int]] | None


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Sampling):
    """Settings of greedy and sampled generation, which are those of ``Sampling`` and these, and of beam search.

    Attributes:
        max_new_tokens: tokens to add at most.
        min_new_tokens: no end token is chosen before a row has so many others, and no stop sequence ends it before.
        repetition_penalty: from 0.01 to 100; applied before all filters, to logits; by beam search, to
            log-probabilities, as transformers does; see ``penalise_repetition``.
        num_beams: hypotheses that are kept at each step; above 1, beam search, which is deterministic.
        length_penalty: hypotheses are ranked by their total log-probability / length ** length_penalty: 0 for totals,
            1 for means; more prefers longer ones, less than 0 shorter ones. Used by beam search.
        eos_token_id: a row that yields it, or one of them, has ended, and is filled with the first from there on. Where
            it is ``None``, a model takes those of its tokenizer, which one of bytes has not; ``()`` is none.
        stop_sequences: a row has ended when its new tokens end with one of these, which stays in the output; the
            prompt's last tokens do not count. Without ``eos_token_id``, −1 follows, which is no token and has no text.
        ends, stops: the last two, as tuples.

    Raises:
        ConfigError: a setting outside its range, or beams that are sampled.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    repetition_penalty: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    stop_sequences: Sequence[Sequence[int]] | None = None
    ends: tuple[int, ...] = field(init=False)
    stops: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("max_new_tokens", self.max_new_tokens, 1)
        whole("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        whole("num_beams", self.num_beams, 1)
        real("length_penalty", self.length_penalty, -10, 10)  # powers of any length stay finite
        if self.repetition_penalty is not None:
            real("repetition_penalty", self.repetition_penalty, 0.01, 100)  # logits stay finite
        if self.num_beams > 1 and self.do_sample:
            raise ConfigError(f"expected do_sample=False with beams, got do_sample=True and {self.num_beams} beams")
        eos = self.eos_token_id
        listed = hasattr(eos, "__len__") and getattr(eos, "ndim", True)  # a tensor may be of one number
        ends = () if eos is None else _tokens("eos_token_id", eos if listed else [eos])
        if isinstance(self.stop_sequences, str | bytes):
            raise ConfigError(f"expected stop_sequences to be sequences of tokens, got {self.stop_sequences!r}")
        given = () if self.stop_sequences is None else several("stop_sequences", self.stop_sequences)
        stops = tuple(_tokens("stop_sequences", stop) for stop in given)
        if () in stops:
            raise ConfigError("expected at least one token in each stop sequence, got an empty one")
        object.__setattr__(self, "ends", ends)
        object.__setattr__(self, "stops", stops)

    @property
    def penalty(self) -> float:
        """Of repetition; 1 for none."""
        return self.repetition_penalty or 1.0

    @property
    def fill(self) -> int:
        """What follows the last token of a row that has ended."""
        return self.ends[0] if self.ends else NO_TOKEN

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ``ConfigError`` for ids outside the vocabulary, or more beams than there are continuations."""
        for token in [*self.ends, *(token for stop in self.stops for token in stop)]:
            if token >= vocab_size:
                raise ConfigError(
                    f"expected eos_token_id and stop_sequences of tokens in 0 … {vocab_size - 1}, got {token}"
                )
        if self.min_new_tokens and len(set(self.ends)) == vocab_size:
            raise ConfigError("expected a token that ends no row, as min_new_tokens asks for some, got none")
        steps = min(self.max_new_tokens, int(self.num_beams).bit_length())  # enough: 2 ** bit_length exceeds num_beams
        if self.num_beams > vocab_size**steps:
            raise ConfigError(
                f"expected at most {vocab_size**steps} beams, as {vocab_size} tokens make no more continuations of "
                f"{self.max_new_tokens}, got {self.num_beams}"
            )


def _tokens(name: str, given: object) -> tuple[int, ...]:
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise ConfigError(f"expected {name} to be token ids, got {given!r}")
    return tuple(whole(f"each token of {name}", token, 0) for token in given)
