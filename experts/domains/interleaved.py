"""Documents of questions and answers, one item after the other, from one domain or several."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from bayes_dispatch.errors import UnknownNameError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Split, exact
from bayes_dispatch.experts.domains.mixtures import owners_of

__all__ = ["Interleaved", "Items"]

ORDERS = ("alternate", "random", "switch")


@runtime_checkable
class Items(Protocol):
    """What gives questions and answers of one kind."""

    @property
    def name(self) -> str: ...

    def items(self, rng: np.random.Generator, split: Split) -> Iterator[tuple[str, str]]:
        """Questions and their answers without end; a newline follows each answer."""
        ...


@dataclass(frozen=True)
class Interleaved:
    """Documents whose items are of several kinds.

    Attributes:
        name: the domain's name.
        kinds: what gives the items.
        order: ``"alternate"`` takes them in turn; ``"random"`` draws one for each item; ``"switch"`` goes from one to
            the next as the document goes on, in equal parts of its bytes.

    Raises:
        UnknownNameError: another order.
    """

    name: str
    kinds: tuple[Items, ...]
    order: str = "alternate"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UnknownNameError(f"expected an order of {', '.join(ORDERS)}, got {self.order!r:.60}")

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """Items until ``total_bytes`` are reached; the prompt ends with an item, and later answers are scored."""
        return self.with_owners(rng, prompt_bytes, total_bytes, split)[0]

    def reward(self, question: str, expected: str, answer: str) -> float:
        """1 for the right answer, 0 for any other."""
        return exact(expected, answer)

    def with_owners(
        self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split
    ) -> tuple[Document, Int[np.ndarray, " byte"]]:
        """The document, and which kind each byte of its prompt is of."""
        text, size, end_of_prompt, scored = "", 0, 0, []
        parts = list[tuple[int, bytes]]()
        items = [kind.items(rng, split) for kind in self.kinds]
        number = 0
        while size < total_bytes:
            which = self._which(rng, number, size / total_bytes)
            question, answer = next(items[which])
            start = size + len(question.encode())
            stop = start + len(answer.encode())
            if end_of_prompt == size < prompt_bytes:
                end_of_prompt = stop + 1
                parts.append((which, f"{question}{answer}\n".encode()))
            else:
                scored.append((start, stop))
            text += f"{question}{answer}\n"
            size = stop + 1
            number += 1
        return Document(text, end_of_prompt, tuple(scored)), owners_of(parts)

    def _which(self, rng: np.random.Generator, number: int, progress: float) -> int:
        count = len(self.kinds)
        if self.order == "random":
            return int(rng.integers(count))
        if self.order == "switch":
            return min(int(progress * count), count - 1)
        return number % count
