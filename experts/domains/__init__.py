"""The domains: conventions on shared surfaces, and texts made from the Python installation."""

from bayes_dispatch.experts.domains.conventions import CONVENTIONS, SURFACES, Convention, Interleaved, Surface
from bayes_dispatch.experts.domains.domain import Checked, Domain, Split, held_out
from bayes_dispatch.experts.domains.mixtures import mixed_text
from bayes_dispatch.experts.domains.text import BASE_TEXTS, EXPERT_TEXTS, FOREIGN_TEXTS, TextDomain

__all__ = [
    "BASE_TEXTS",
    "CONVENTIONS",
    "EXPERT_DOMAINS",
    "EXPERT_TEXTS",
    "FOREIGN_TEXTS",
    "SURFACES",
    "Checked",
    "Convention",
    "Domain",
    "Interleaved",
    "Split",
    "Surface",
    "TextDomain",
    "held_out",
    "mixed_text",
]

EXPERT_DOMAINS: tuple[Domain, ...] = (*CONVENTIONS, *EXPERT_TEXTS)
