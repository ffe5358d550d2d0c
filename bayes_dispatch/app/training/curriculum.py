"""What a bundle is trained on and judged by: the conventions made here, or translations of interface texts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bayes_dispatch.experts.domains import (
    BASE_TEXTS,
    EXPERT_DOMAINS,
    FOREIGN_TEXTS,
    FOREIGN_TRANSLATIONS,
    Domain,
    Interleaved,
    Translations,
    translations,
)
from bayes_dispatch.experts.domains.base import BaseCorpus, DomainCorpus
from bayes_dispatch.inference.scoring.evaluation import MIXED_SETS, SWITCHING_SETS, interleaved
from bayes_dispatch.model.pretraining.run import RowSource
from bayes_dispatch.model.subwords import SubwordTokenizer, train_subwords

__all__ = ["CURRICULA", "Curriculum"]

ROWS, ROW_BYTES = 4000, 1024  # that subwords are learnt from
LONGEST = 32  # bytes of a text, and of its translation, that experts see: names of buttons and fields


@dataclass(frozen=True)
class Curriculum:
    """Domains and texts, all of them picklable.

    Attributes:
        corpus: of the base model. experts: a domain for each of them. base: what base itself serves best.
        foreign: without an expert.
        mixed, switching: of several experts in turn, or of one and then another, by name.
    """

    corpus: RowSource
    experts: tuple[Domain, ...]
    base: tuple[Domain, ...]
    foreign: tuple[Domain, ...]
    mixed: Mapping[str, Domain]
    switching: Mapping[str, Domain]

    def subwords(self, vocab_size: int, seed: int) -> SubwordTokenizer:
        """A tokenizer that is learnt from rows of the corpus."""
        generators = (np.random.default_rng([seed, number]) for number in range(ROWS))
        return train_subwords((self.corpus.row(rng, ROW_BYTES)[0].decode() for rng in generators), vocab_size)


def _conventions(packages: Path | None) -> Curriculum:
    return Curriculum(BaseCorpus(), EXPERT_DOMAINS, BASE_TEXTS, FOREIGN_TEXTS, MIXED_SETS, SWITCHING_SETS)


def _translations(packages: Path | None) -> Curriculum:
    """Of entry to entry the language changes in what the base model reads: it cannot know it, and has to hedge."""
    languages = translations(packages, LONGEST)
    code, prose = BASE_TEXTS
    return Curriculum(
        corpus=DomainCorpus(
            {Interleaved("translations", translations(packages), "random"): 0.85, code: 0.05, prose: 0.1}
        ),
        experts=languages,
        base=BASE_TEXTS,
        foreign=tuple(Translations(domain.language, packages, LONGEST) for domain in FOREIGN_TRANSLATIONS),
        mixed=interleaved(languages, "alternate", ("de", "fr"), ("es", "nb"), ("pt", "pt_BR"), ("da", "ru")),
        switching=interleaved(languages, "switch", ("de", "fr"), ("es", "de"), ("nb", "da")),
    )


CURRICULA: dict[str, Callable[[Path | None], Curriculum]] = {
    "conventions": _conventions,
    "translations": _translations,
}
