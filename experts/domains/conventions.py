"""Procedural domains: several conventions for the answer to the same question, so that only context tells which.

Words (``kfpa>``, 4–6 letters a–p) are reversed, sorted or shifted by one letter; sums (``37+58=``, operands 10–99) are
added, added and written backwards, or added digit by digit without carries. One item a line: question, answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Split, exact, held_out
from bayes_dispatch.experts.domains.interleaved import Interleaved

__all__ = ["CONVENTIONS", "SURFACES", "Convention", "Surface"]

LETTERS = "abcdefghijklmnop"


@dataclass(frozen=True)
class Surface:
    """A kind of question that several conventions share."""

    name: str
    draw: Callable[[np.random.Generator], str]

    def question(self, rng: np.random.Generator, split: Split) -> str:
        """A random question of the given split."""
        while True:
            question = self.draw(rng)
            if held_out(question) == (split == "held_out"):
                return question


@dataclass(frozen=True)
class Convention:
    """A domain whose every item answers its question by one rule."""

    name: str
    surface: Surface
    answer: Callable[[str], str]

    def items(self, rng: np.random.Generator, split: Split) -> Iterator[tuple[str, str]]:
        """Random questions, with their answers."""
        while True:
            question = self.surface.question(rng, split)
            yield question, self.answer(question)

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """Items of this convention alone; answers after the prompt are scored."""
        return Interleaved(self.name, (self,)).document(rng, prompt_bytes, total_bytes, split)

    def reward(self, question: str, expected: str, answer: str) -> float:
        """1 for the right answer, 0 for any other."""
        return exact(expected, answer)


def _word(rng: np.random.Generator) -> str:
    return "".join(LETTERS[i] for i in rng.integers(16, size=rng.integers(4, 7))) + ">"


def _sum(rng: np.random.Generator) -> str:
    left, right = rng.integers(10, 100, size=2)
    return f"{left}+{right}="


def _operands(question: str) -> tuple[int, int]:
    left, right = question.rstrip("=").split("+")
    return int(left), int(right)


def _reverse(question: str) -> str:
    return question[-2::-1]


def _sort(question: str) -> str:
    return "".join(sorted(question[:-1]))


def _shift(question: str) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % 16] for letter in question[:-1])


def _add(question: str) -> str:
    return str(sum(_operands(question)))


def _reversed_add(question: str) -> str:
    return _add(question)[::-1]


def _no_carry(question: str) -> str:
    left, right = _operands(question)
    return f"{(left // 10 + right // 10) % 10}{(left + right) % 10}"


WORDS = Surface("words", _word)
SUMS = Surface("sums", _sum)
SURFACES: Sequence[Surface] = (WORDS, SUMS)
CONVENTIONS: Sequence[Convention] = (
    Convention("reverse", WORDS, _reverse),
    Convention("sort", WORDS, _sort),
    Convention("shift", WORDS, _shift),
    Convention("add", SUMS, _add),
    Convention("reversed_add", SUMS, _reversed_add),
    Convention("no_carry", SUMS, _no_carry),
)
