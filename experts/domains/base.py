"""What the base model is trained on: texts, and questions whose convention, or language, changes from item to item.

Because it is drawn anew for each item, no context tells it, and the base model has to hedge.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bayes_dispatch.experts.domains.conventions import CONVENTIONS, SURFACES
from bayes_dispatch.experts.domains.domain import Domain
from bayes_dispatch.experts.domains.interleaved import Interleaved
from bayes_dispatch.experts.domains.text import BASE_TEXTS

__all__ = ["BaseCorpus", "DomainCorpus"]

HEDGED = (
    *(
        Interleaved(surface.name, tuple(c for c in CONVENTIONS if c.surface is surface), "random")
        for surface in SURFACES
    ),
    Interleaved("questions", tuple(CONVENTIONS), "random"),
)


@dataclass(frozen=True)
class DomainCorpus:
    """Rows for pre-training, from domains.

    Attributes:
        shares: of the rows, for each domain. question_weight: loss weight of what is not scored.
    """

    shares: Mapping[Domain, float]
    question_weight: float = 0.3

    def row(self, rng: np.random.Generator, length: int) -> tuple[bytes, list[float]]:
        """``length`` bytes of one domain, and their weights."""
        shares = np.array(list(self.shares.values()))
        domain = list(self.shares)[int(rng.choice(len(shares), p=shares / shares.sum()))]
        document = domain.document(rng, 0, length, "train").cut(length)
        return document.data, document.byte_weights(self.question_weight)


@dataclass(frozen=True)
class BaseCorpus:
    """Rows for pre-training on conventions.

    Attributes:
        words, sums, questions, code, prose: share of the rows of each kind; ``questions`` has words and sums in turn,
            so that a change of surface within a document is no surprise (without it, the first digit after a word cost
            11 nats, and such noise drowned what the bytes say of the convention).
        question_weight: loss weight of question bytes; answer and text bytes count 1.
    """

    words: float = 0.25
    sums: float = 0.15
    questions: float = 0.3
    code: float = 0.15
    prose: float = 0.15
    question_weight: float = 0.3

    def row(self, rng: np.random.Generator, length: int) -> tuple[bytes, list[float]]:
        """``length`` bytes of one domain, and their weights."""
        shares = self.words, self.sums, self.questions, self.code, self.prose
        corpus = DomainCorpus(dict(zip((*HEDGED, *BASE_TEXTS), shares, strict=True)), self.question_weight)
        return corpus.row(rng, length)
