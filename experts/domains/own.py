"""Domains of a user's own: a text, pairs of prompt and answer, prompts whose answers a function rewards, and examples.

The last tenth of a text, of pairs and of prompts is the split ``"held_out"``; of examples it is one in five.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bayes_dispatch.arguments import shown
from bayes_dispatch.errors import ConfigError, PromptError, RewardError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Checked, Split, agreement, exact
from bayes_dispatch.experts.domains.interleaved import Interleaved
from bayes_dispatch.experts.domains.mixtures import beginning_of
from bayes_dispatch.model.tokenizer import utf8

__all__ = [
    "Own",
    "OwnExamples",
    "OwnPairs",
    "OwnPrompts",
    "OwnText",
    "Reward",
    "Rewarded",
]

Reward = Callable[[str, str], float]
T = TypeVar("T", str, tuple[str, ...], tuple[tuple[str, str], ...])
FEWEST_BYTES, FEWEST_ITEMS = 1000, 10


@dataclass(frozen=True)
class OwnText:
    """Passages of one text.

    Attributes:
        name: the domain's name. text: at least 1,000 bytes.

    Raises:
        ConfigError: the text is shorter, or no UTF-8.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        _check_texts(self.name, [self.text])
        if (size := len(self.text.encode())) < FEWEST_BYTES:
            raise ConfigError(f"expected a text of at least {FEWEST_BYTES} bytes for {self.name}, got {size}")

    @property
    def content(self) -> str:
        """All of the text."""
        return self.text

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """A passage, from the start of a line where one is near; all after the prompt is scored."""
        rest, end = _tenth(self.text)
        text = end if split == "held_out" else rest
        start = int(rng.integers(max(len(text) - total_bytes, 0) + 1))
        newline = text.rfind("\n", max(start - total_bytes, 0), start)
        if newline >= 0 or start <= total_bytes:
            start = newline + 1
        passage = text[start:][:total_bytes]
        return Document(passage, min(prompt_bytes, len(passage)))

    def once(self, lengths: Iterable[int], split: Split) -> Iterator[str]:
        """Passages of these lengths in bytes, each from the start of a line, or of 1,000 characters of a longer one.

        No line is in two; the last passage may be shorter.
        """
        rest, end = _tenth(self.text)
        lines = re.findall(rf"[^\n]{{1,{FEWEST_BYTES}}}\n?|\n", end if split == "held_out" else rest)
        return _joined(lines, lengths)

    def reward(self, question: str, expected: str, answer: str) -> float:
        """Share of the bytes that agree with the true continuation."""
        return agreement(expected, answer)


@dataclass(frozen=True)
class OwnPairs:
    """Documents of several pairs, a prompt and its answer on each line; answers are scored.

    Attributes:
        name: the domain's name. pairs: of prompt and answer, at least 10; an answer is one line.

    Raises:
        ConfigError: there are fewer, or a text is empty or no UTF-8, or an answer has more lines.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        _check_count(self.name, "pairs", len(self.pairs))
        _check_texts(self.name, [text for pair in self.pairs for text in pair])
        if longer := [answer for _, answer in self.pairs if "\n" in answer]:
            raise ConfigError(f"expected answers of {self.name} of one line each, got {shown(longer[0])}")

    @property
    def content(self) -> tuple[tuple[str, str], ...]:
        """All pairs."""
        return self.pairs

    def items(self, rng: np.random.Generator, split: Split) -> Iterator[tuple[str, str]]:
        """Random pairs of the split."""
        rest, end = _tenth(self.pairs)
        pairs = end if split == "held_out" else rest
        while True:
            yield pairs[int(rng.integers(len(pairs)))]

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """Pairs until ``total_bytes`` are reached; the prompt ends with a pair, and later answers are scored."""
        return Interleaved(self.name, (self,)).document(rng, prompt_bytes, total_bytes, split)

    def once(self, lengths: Iterable[int], split: Split) -> Iterator[str]:
        """Texts of these lengths in bytes, of a pair on each line; no pair is in two. The last may be shorter."""
        rest, end = _tenth(self.pairs)
        return _joined([f"{prompt}{answer}\n" for prompt, answer in (end if split == "held_out" else rest)], lengths)

    def reward(self, question: str, expected: str, answer: str) -> float:
        """1 for the right answer, 0 for any other."""
        return exact(expected, answer)


@dataclass(frozen=True)
class OwnPrompts:
    """Documents of one prompt each, whose answers are not known: for a function that rewards them.

    Attributes:
        name: the domain's name. prompts: at least 10.

    Raises:
        ConfigError: there are fewer, or one is empty or no UTF-8.
    """

    name: str
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_count(self.name, "prompts", len(self.prompts))
        _check_texts(self.name, self.prompts)

    @property
    def content(self) -> tuple[str, ...]:
        """All prompts."""
        return self.prompts

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """A prompt and a newline; the scored range, before that newline, is empty."""
        rest, end = _tenth(self.prompts)
        prompts = end if split == "held_out" else rest
        text = prompts[int(rng.integers(len(prompts)))]
        size = len(text.encode())
        return Document(text + "\n", min(prompt_bytes, size), ((size, size),))

    def once(self, lengths: Iterable[int], split: Split) -> Iterator[str]:
        """The prompts of the split, none longer than its length in bytes."""
        rest, end = _tenth(self.prompts)
        return map(beginning_of, end if split == "held_out" else rest, lengths)

    def reward(self, question: str, expected: str, answer: str) -> float:
        """Refused: only a function of the user's knows.

        Raises:
            RewardError: always.
        """
        raise RewardError(f"expected a reward function for {self.name}, whose prompts have no answers, got none")


@dataclass(frozen=True)
class Rewarded:
    """A domain whose answers a function rewards, instead of the domain's own checker.

    Attributes:
        domain: where documents are from. function: of a prompt and an answer.
    """

    domain: Checked
    function: Reward

    @property
    def name(self) -> str:
        return self.domain.name

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """A document of the domain."""
        return self.domain.document(rng, prompt_bytes, total_bytes, split)

    def reward(self, question: str, expected: str, answer: str) -> float:
        """What the function says.

        Raises:
            RewardError: it says no finite number, or fails.
        """
        try:
            value = float(self.function(question, answer))
        except Exception as error:
            raise RewardError(
                f"expected a number from the reward function for {question!r:.60}, got {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value):
            raise RewardError(f"expected a finite number from the reward function for {question!r:.60}, got {value}")
        return value


@dataclass(frozen=True)
class OwnExamples:
    """Documents of example texts, a few dozen or more; one in five is held out, by its hash.

    Attributes:
        name: the domain's name. texts: at least two, none empty; a text that occurs twice counts once.

    Raises:
        ConfigError: there are fewer, or one is empty or no UTF-8.
    """

    name: str
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_texts(self.name, self.texts)
        texts = sorted(dict.fromkeys(self.texts), key=lambda text: hashlib.blake2b(text.encode()).digest())
        if len(texts) < 2:
            raise ConfigError(f"expected at least two different examples of {self.name}, got {len(texts)}")
        object.__setattr__(self, "texts", tuple(texts))

    @property
    def content(self) -> tuple[str, ...]:
        """All texts."""
        return self.texts

    def of(self, split: Split) -> tuple[str, ...]:
        """The texts of one split."""
        held = max(1, len(self.texts) // 5)
        return self.texts[:held] if split == "held_out" else self.texts[held:]

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """Texts of the split, each from the start of one of its lines, until there are ``total_bytes``."""
        texts, text = self.of(split), ""
        while len(text.encode()) < total_bytes:
            chosen = texts[int(rng.integers(len(texts)))]
            starts = [0, *(place + 1 for place, character in enumerate(chosen[:-1]) if character == "\n")]
            text += chosen[starts[int(rng.integers(len(starts)))] :].removesuffix("\n") + "\n"
        return Document(text, min(prompt_bytes, len(text.encode())))

    def once(self, lengths: Iterable[int], split: Split) -> Iterator[str]:
        """The texts of the split, none longer than its length in bytes."""
        return map(beginning_of, self.of(split), lengths)


Own = OwnText | OwnPairs | OwnPrompts | OwnExamples


def _tenth(items: T) -> tuple[T, T]:
    """Without the last tenth, and this."""
    cut = len(items) - max(1, len(items) // 10)
    return items[:cut], items[cut:]


def _joined(lines: Iterable[str], lengths: Iterable[int]) -> Iterator[str]:
    """Lines, one after another, as texts of these lengths, the last of what is left."""
    left = iter(lines)
    for length in lengths:
        text = ""
        while len(text.encode()) < length and (line := next(left, "")):
            text += line
        if not text:
            return
        yield beginning_of(text, length)


def _check_texts(name: str, texts: Iterable[str]) -> None:
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ConfigError(f"expected texts of {name} that are not empty, got {shown(text)}")
        try:
            utf8(text)
        except PromptError as error:
            raise ConfigError(f"{name}: {error}") from None


def _check_count(name: str, what: str, count: int) -> None:
    if count < FEWEST_ITEMS:
        raise ConfigError(f"expected at least {FEWEST_ITEMS} {what} for {name}, got {count}")
