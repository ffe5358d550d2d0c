"""Documents of one domain, of several in turn, of one and then another; answers after the prompt are scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np

import bayes_dispatch as bd
from bayes_dispatch.experts.domains import Domain

__all__ = ["HALF", "NEAR", "PAIRS", "SHORT", "Case", "DocumentSet", "document_sets"]

HALF, SHORT = 400, 24  # bytes of a prompt, at least, and of what follows it; of a short prompt
PAIRS = (
    *(("de", "fr"), ("es", "nb"), ("pt", "ru"), ("da", "fr")),
    *(("spell_backward", "chain_sum"), ("number_filtering", "prime_factorization"), ("de", "word_sequence_reversal")),
)
NEAR = (("pt", "pt_BR"), ("nb", "da"))


class Case(NamedTuple):
    """A document, the answers (start, stop) within its prompt, the domain of each scored range, and all its domains."""

    document: bd.Document
    shown: tuple[tuple[int, int], ...]
    owners: tuple[str, ...]
    domains: tuple[str, ...]


@dataclass(frozen=True)
class DocumentSet:
    """Documents of one kind; each follows from seed and number alone, however many are asked for.

    Attributes:
        name: of the set. kind: of the table that it is in. domains: of the entries; those of several have
            ``items``.
        order: ``"turn"`` takes them in turn, ``"switch"`` goes from one to the other where the prompt ends, ``"late"``
            in the middle of what follows; ``"each"`` makes every document of one of them.
        prompt_bytes: at least, up to the end of an entry. scored_bytes: what follows, about as many.
    """

    name: str
    kind: str
    domains: tuple[Domain, ...]
    order: Literal["turn", "switch", "late", "each"] = "each"
    prompt_bytes: int = HALF
    scored_bytes: int = HALF

    def case(self, seed: int, number: int) -> Case:
        """A held-out document."""
        rng = np.random.default_rng([seed, number, crc32(self.name.encode())])
        total = self.prompt_bytes + self.scored_bytes
        domains = (self.domains[number % len(self.domains)],) if self.order == "each" else self.domains
        if len(domains) == 1 and not hasattr(domains[0], "items"):
            text = domains[0].document(rng, self.prompt_bytes, total, "held_out")
            return Case(text, ((0, text.prompt_bytes),), (domains[0].name,) * len(text.ranges), (domains[0].name,))
        text, size, prompt = "", 0, 0
        answers: list[tuple[int, int, str]] = []
        items = [domain.items(rng, "held_out") for domain in domains]
        while size < total or size == prompt:  # one answer, at least, follows the prompt
            turn, late = (len(answers) + number) % len(items), size >= total - self.scored_bytes // 2
            which = {"switch": int(prompt > 0), "late": int(late)}.get(self.order, turn)
            question, answer = next(items[which])
            start, stop = size + len(question.encode()), size + len(f"{question}{answer}".encode())
            answers.append((start, stop, domains[which].name))
            text, size = f"{text}{question}{answer}\n", stop + 1
            prompt = prompt or size * (size >= self.prompt_bytes)
        scored = [answer for answer in answers if answer[0] >= prompt]
        ranges = tuple((start, stop) for start, stop, _ in scored)
        shown = tuple((start, stop) for start, stop, _ in answers if stop <= prompt)
        owners, names = (owner for _, _, owner in scored), (domain.name for domain in domains)
        return Case(bd.Document(text, prompt, ranges), shown, tuple(owners), tuple(names))


def document_sets(
    experts: Mapping[str, Domain],
    others: Mapping[str, Sequence[Domain]],
    half: int = HALF,
    several: Sequence[tuple[str, str]] = PAIRS,
) -> list[DocumentSet]:
    """All sets of these domains.

    Args:
        experts: the domain of each expert. others: kind, such as ``"natural"``, to domains that have none.
        half: bytes of a prompt that is not short, and of what follows any.
        several: pairs of domains in turn and switching, where both are there; near pairs are ``NEAR``.
    """
    made = partial(DocumentSet, prompt_bytes=half, scored_bytes=half)
    sets = [made(name, "pure", (domain,)) for name, domain in experts.items()]
    kinds = (
        ("in turn", " & ", "turn", several),
        ("near pairs in turn", " & ", "turn", NEAR),
        ("switching", ", then ", "switch", (*several, *NEAR[:1])),
        ("switching later", ", later ", "late", several),
    )
    for kind, joint, order, pairs in kinds:
        for pair in pairs:
            if set(pair) <= experts.keys():
                sets.append(made(joint.join(pair), kind, tuple(experts[name] for name in pair), order))
    sets.append(made("short prompts", "short", tuple(experts.values()), prompt_bytes=SHORT))
    return sets + [made(domain.name, kind, (domain,)) for kind, own in others.items() for domain in own]
