"""Held-out documents by name: of one domain, of a mixture, of a switch, foreign; or of all of a kind."""

from collections.abc import Sequence

from bayes_dispatch.errors import UnknownNameError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import EXPERT_DOMAINS, FOREIGN_TEXTS, Domain
from bayes_dispatch.inference.scoring.evaluation import MIXED_SETS, SWITCHING_SETS, held_out_documents

__all__ = ["KINDS", "domains_of", "held_out_sets"]

KINDS: dict[str, tuple[Domain, ...]] = {
    "pure": EXPERT_DOMAINS,
    "mixed": tuple(MIXED_SETS.values()),
    "switching": tuple(SWITCHING_SETS.values()),
    "foreign": FOREIGN_TEXTS,
}


def domains_of(name: str) -> tuple[Domain, ...]:
    """All domains of a kind, or the one domain of a name.

    Raises:
        UnknownNameError: there is neither.
    """
    named = {domain.name: (domain,) for domains in KINDS.values() for domain in domains}
    if name not in KINDS | named:
        raise UnknownNameError(f"expected a set of {', '.join([*KINDS, *named])}, got {name!r}")
    return (KINDS | named)[name]


def held_out_sets(names: Sequence[str], count: int, seed: int) -> dict[str, list[Document]]:
    """Name → ``count`` documents of each of its domains, of 128 prompt bytes and as many after them.

    Raises:
        UnknownNameError: a name of neither a kind nor a domain.
    """
    return {
        name: [document for domain in domains_of(name) for document in held_out_documents(domain, count, seed)]
        for name in names
    }
