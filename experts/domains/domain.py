"""What a domain is: a seeded source of documents, with a part held out from training."""

import hashlib
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from bayes_dispatch.experts.documents import Document

__all__ = ["Checked", "Domain", "Finite", "Split", "agreement", "exact", "held_out"]

Split = Literal["train", "held_out"]


@runtime_checkable
class Domain(Protocol):
    """A seeded source of documents of one kind."""

    @property
    def name(self) -> str: ...

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """A document of at least ``total_bytes`` (where the domain has as many), prompt included, of a given split."""
        ...


@runtime_checkable
class Finite(Domain, Protocol):
    """A domain whose documents are all of the same texts."""

    @property
    def content(self) -> Any:
        """All of these, by split where they are parted, as JSON takes it: two domains of one content give the same."""
        ...


@runtime_checkable
class Checked(Domain, Protocol):
    """A domain that can tell how good an answer is."""

    def reward(self, question: str, expected: str, answer: str) -> float:
        """A finite number, the higher the better; the domains of this package stay in 0 … 1.

        Args:
            question: what was asked. expected: the document's own answer. answer: what was generated.
        """
        ...


def exact(expected: str, answer: str) -> float:
    """1 for the expected answer, 0 for any other."""
    return float(answer == expected)


def agreement(expected: str, answer: str) -> float:
    """Share of the expected bytes that stand at their places in the answer."""
    wanted, got = (text.encode("utf-8", errors="surrogatepass") for text in (expected, answer))
    return sum(a == b for a, b in zip(wanted, got, strict=False)) / max(len(wanted), 1)


def held_out(key: str) -> bool:
    """Whether an item or file is held out from all training: one in eight, by hash."""
    return hashlib.blake2b(key.encode(), digest_size=2).digest()[0] % 8 == 0
