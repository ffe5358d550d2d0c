"""Questions of reasoning-gym (arXiv:2505.24760), whose answers have formats of their own and are checked by its code.

    Q: Spell this word backward (example: sun -> nus): lamp
    A: pmal

The package is imported where a question is first asked: it takes a second, and packages of its own (docs/domains.md).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Split, held_out
from bayes_dispatch.experts.domains.interleaved import Interleaved

__all__ = ["TASKS", "ReasoningTask"]

SETTINGS: Mapping[str, Mapping[str, int]] = MappingProxyType(  # small, so that questions and answers are short
    {
        "spell_backward": {"max_word_len": 5},
        "word_sequence_reversal": {"max_words": 4},
        "number_filtering": {"max_numbers": 4, "max_decimals": 1},
        "prime_factorization": {"max_value": 1000},
        "base_conversion": {"max_value": 100},
        "chain_sum": {"max_terms": 3, "max_digits": 2},
    }
)


@dataclass(frozen=True)
class ReasoningTask:
    """Questions of one kind.

    Attributes:
        name: of the task in reasoning-gym, and of the domain.

    Raises:
        ConfigError: it is none of those used here.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in SETTINGS:
            raise ConfigError(f"expected a task of {', '.join(SETTINGS)}, got {self.name!r:.40}")

    def items(self, rng: np.random.Generator, split: Split) -> Iterator[tuple[str, str]]:
        """Random questions of a split, each on one line, with their answers.

        Raises:
            ConfigError: reasoning-gym or a package that it needs is missing.
        """
        task = _task(self.name)
        while True:
            entry = task[int(rng.integers(2**31))]
            question = " ".join(entry["question"].split())
            if entry["answer"] and held_out(question) == (split == "held_out"):  # zero is written as no digit at all
                yield f"Q: {question}\nA:", f" {entry['answer']}"

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """Items of this task; answers after the prompt are scored."""
        return Interleaved(self.name, (self,)).document(rng, prompt_bytes, total_bytes, split)

    def reward(self, question: str, expected: str, answer: str) -> float:
        """What the task's own checker says, 0 … 1: full marks for the right answer, some for what comes near."""
        entry = {"answer": expected.strip(), "metadata": {}}
        try:
            return float(_task(self.name).score_answer(answer.strip(), entry))
        except Exception:  # its checkers raise what they like at an answer that they cannot read
            return 0.0


@cache
def _task(name: str) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f"expected reasoning-gym and what it needs (pip install reasoning-gym==0.1.25), got: {error}"
        ) from None
    return reasoning_gym.create_dataset(name, seed=0, size=1, **SETTINGS[name])


TASKS = tuple(map(ReasoningTask, SETTINGS))
