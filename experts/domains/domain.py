"""What a domain is: a seeded source of documents, with a part held out from training."""

import hashlib
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from bayes_dispatch.experts.documents import Document

__all__ = ["Domain", "Split", "held_out"]

Split = Literal["train", "held_out"]


@runtime_checkable
class Domain(Protocol):
    """A seeded source of documents of one kind."""

    @property
    def name(self) -> str: ...

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """A document of at least ``total_bytes`` (where the domain has as many), prompt included, of a given split."""
        ...


def held_out(key: str) -> bool:
    """Whether an item or file is held out from all training: one in eight, by hash."""
    return hashlib.blake2b(key.encode(), digest_size=2).digest()[0] % 8 == 0
