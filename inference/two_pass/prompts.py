"""What is asked for: prompts, and how their continuations are written; checked where they enter."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass

from bayes_dispatch.arguments import shown, whole
from bayes_dispatch.errors import ConfigError, PromptError, PromptTooLongError
from bayes_dispatch.model.backbone import Tokenizer, Tokens, clipped
from bayes_dispatch.model.generation.sampling import Sampling
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["MAX_NEW_TOKENS", "Stop", "Writing", "Written", "check_prompts", "check_turn", "clipped", "tokenized"]

Stop = str | bytes | Sequence[str | bytes] | None  # what a text ends with: a list for any of several

MAX_NEW_TOKENS = 65_536  # memory is set aside for them


def check_prompts(prompts: Sequence[str | bytes]) -> list[bytes]:
    """The prompts' bytes.

    Raises:
        PromptError: no prompts, or one that is empty or no UTF-8.
    """
    if isinstance(prompts, str | bytes):
        raise PromptError(f"expected a list of prompts, got a single {type(prompts).__name__}")
    if not isinstance(prompts, Sized):
        raise PromptError(f"expected a list of prompts, got {shown(prompts)}")
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
        if not data:
            raise PromptError(f"expected prompt {index} to have at least 1 byte, got none")
        checked.append(data)
    return checked


def tokenized(tokenizer: Tokenizer, prompts: Sequence[bytes], longest: int | None, room: int = 0) -> list[Tokens]:
    """Prompts in tokens.

    Args:
        longest: that the model can read, if there is a bound. room: how many are to follow.

    Raises:
        PromptError: one has more of them than the model can read with those that follow.
    """
    found = [tokenizer.tokenize(prompt) for prompt in prompts]
    for index, text in enumerate(found):
        if not text.ids:
            raise PromptError(f"expected prompt {index} to have at least one token, got none")
        if longest is not None and len(text.ids) + room > longest:
            most = f"at most {longest} tokens" + (f" with the {room} that follow" if room else "")
            raise PromptTooLongError(f"expected prompt {index} to have {most}, got {len(text.ids)}")
    return found


def check_turn(tokenizer: Tokenizer, text: str | bytes, most: int) -> tuple[bytes, Tokens]:
    """A user's turn, and its tokens without what begins a text.

    Raises:
        PromptError: it is empty, longer than ``most`` tokens, or no UTF-8.
    """
    if not isinstance(text, str | bytes):
        raise PromptError(f"expected a turn to be text, got {type(text).__name__}")
    data = utf8(text)
    words = tokenizer.tokenize(data, begin=False)
    if not 1 <= len(words.ids) <= most:
        room = f"expected a turn of 1 to {most} tokens, which leaves room for the reply"
        raise PromptError(f"{room}, got {len(words.ids)}")
    return data, words


@dataclass(frozen=True)
class Writing:
    """How a text is written.

    Attributes:
        max_new_tokens: at most. sampling: how each is chosen. stops: the text ends with any of these.
    """

    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]

    @classmethod
    def of(
        cls, max_new_tokens: int, do_sample: bool, temperature: float, stop: Stop, top_p: float | None = None
    ) -> "Writing":
        """From the arguments of ``TwoPassGenerator.generate``, and ``top_p`` of ``Sampling``.

        Raises:
            ConfigError: a setting out of range, or a stop that is no text, or has no bytes.
        """
        stops = [stop] if isinstance(stop, str | bytes) else [] if stop is None else stop
        if not isinstance(stops, Sequence) or not all(isinstance(each, str | bytes) and each for each in stops):
            raise ConfigError(f"expected stop to be a text of at least one byte, or a list of such, got {stop!r:.60}")
        most = whole("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS)
        sampling = Sampling(do_sample=do_sample, temperature=temperature, top_p=top_p)
        return cls(most, sampling, tuple(utf8(each).decode() for each in stops))


class Written:
    """A text while it is written, token by token.

    Args:
        tokenizer: of the tokens. context: those before it. writing: how it ends.
        ends: ids with which it does, too; the tokenizer's by default.

    Attributes:
        text: so far, up to and with a stop. piece: what the last token added to it. ids: of its tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int],
        writing: Writing,
        ends: frozenset[int] | None = None,
    ) -> None:
        self.text = self.piece = ""
        self.ids: list[int] = []
        self._ends = tokenizer.ends if ends is None else ends
        self._stream, self._writing = tokenizer.stream(context), writing

    def add(self, token: int) -> bool:
        """Go on with one more token; whether the text is whole with it."""
        self.ids.append(token)
        ended = token in self._ends or len(self.ids) >= self._writing.max_new_tokens
        self.piece = "" if token in self._ends else self._stream.add(token)
        if ended:
            self.piece += self._stream.end()
        before = len(self.text)
        self.text += self.piece
        for stop in self._writing.stops:
            if (place := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0:
                self.text, ended = self.text[: place + len(stop)], True
        self.piece = self.text[before:]
        return ended

    def close(self) -> None:
        """End it amid what it would have been: what still waited is text."""
        self.text += self._stream.end()
