"""What is asked for: prompts, and how their continuations are written; checked where they enter."""

from collections.abc import Sequence
from dataclasses import dataclass

from bayes_dispatch.arguments import whole
from bayes_dispatch.errors import ConfigError, PromptError
from bayes_dispatch.model.generation.sampling import Sampling
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["MAX_PROMPT_BYTES", "Stop", "Writing", "check_prompts", "check_turn"]

Stop = str | bytes | Sequence[str | bytes] | None  # what a text ends with: a list for any of several

MAX_PROMPT_BYTES = 4096
MAX_NEW_TOKENS = 65_536  # memory is set aside for them


def check_prompts(prompts: Sequence[str | bytes]) -> list[bytes]:
    """The prompts' bytes.

    Raises:
        PromptError: no prompts, or one that is empty, longer than ``MAX_PROMPT_BYTES``, or no UTF-8.
    """
    if isinstance(prompts, str | bytes):
        raise PromptError(f"expected a list of prompts, got a single {type(prompts).__name__}")
    if not len(prompts):
        raise PromptError("expected at least one prompt, got none")
    checked = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str | bytes):
            raise PromptError(f"expected prompt {index} to be text, got {type(prompt).__name__}")
        try:
            data = utf8(prompt)
        except PromptError as error:
            raise PromptError(f"prompt {index}: {error}") from None
        if not 1 <= len(data) <= MAX_PROMPT_BYTES:
            raise PromptError(f"expected prompt {index} to have 1 to {MAX_PROMPT_BYTES} bytes, got {len(data)}")
        checked.append(data)
    return checked


def check_turn(text: str | bytes, most: int) -> bytes:
    """The bytes of a user's turn.

    Raises:
        PromptError: it is empty, longer than ``most``, or no UTF-8.
    """
    if not isinstance(text, str | bytes):
        raise PromptError(f"expected a turn to be text, got {type(text).__name__}")
    data = utf8(text)
    if not 1 <= len(data) <= most:
        raise PromptError(f"expected a turn of 1 to {most} bytes, which leaves room for the reply, got {len(data)}")
    return data


@dataclass(frozen=True)
class Writing:
    """How a text is written.

    Attributes:
        max_new_tokens: bytes, at most. sampling: how each is chosen. stops: the text ends with any of these.
    """

    max_new_tokens: int
    sampling: Sampling
    stops: tuple[bytes, ...]

    @classmethod
    def of(cls, max_new_tokens: int, do_sample: bool, temperature: float, stop: Stop) -> "Writing":
        """From the arguments of ``TwoPassGenerator.generate``.

        Raises:
            ConfigError: a setting out of range, or a stop that is no text, or has no bytes.
        """
        stops = [stop] if isinstance(stop, str | bytes) else [] if stop is None else stop
        if not isinstance(stops, Sequence) or not all(isinstance(each, str | bytes) and each for each in stops):
            raise ConfigError(f"expected stop to be a text of at least one byte, or a list of such, got {stop!r:.60}")
        most = whole("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS)
        return cls(most, Sampling(do_sample=do_sample, temperature=temperature), tuple(map(utf8, stops)))

    def ends(self, data: bytes | bytearray) -> bool:
        """Whether a text of these bytes is whole."""
        return len(data) >= self.max_new_tokens or data.endswith(self.stops)
