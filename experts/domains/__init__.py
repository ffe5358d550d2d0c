"""The domains: conventions on shared surfaces, texts of the Python installation, translations of packages on PyPI."""

from pathlib import Path

from bayes_dispatch.experts.domains.conventions import CONVENTIONS, SURFACES, Convention, Surface
from bayes_dispatch.experts.domains.domain import Checked, Domain, Split, held_out
from bayes_dispatch.experts.domains.interleaved import Interleaved, Items
from bayes_dispatch.experts.domains.mixtures import mixed_text
from bayes_dispatch.experts.domains.natural import NATURAL_MIXTURES, natural_mixtures
from bayes_dispatch.experts.domains.package_texts import PACKAGE_TEXTS, package_texts
from bayes_dispatch.experts.domains.tasks import TASKS, ReasoningTask
from bayes_dispatch.experts.domains.text import BASE_TEXTS, EXPERT_TEXTS, FOREIGN_TEXTS, TextDomain
from bayes_dispatch.experts.domains.translations import (
    FOREIGN_TRANSLATIONS,
    TRANSLATIONS,
    Translations,
    translations,
)

__all__ = [
    "BASE_TEXTS",
    "CONVENTIONS",
    "EXPERT_DOMAINS",
    "EXPERT_TEXTS",
    "FOREIGN_TEXTS",
    "FOREIGN_TRANSLATIONS",
    "NATURAL_MIXTURES",
    "PACKAGE_TEXTS",
    "SURFACES",
    "TASKS",
    "TRANSLATIONS",
    "Checked",
    "Convention",
    "Domain",
    "Interleaved",
    "Items",
    "ReasoningTask",
    "Split",
    "Surface",
    "TextDomain",
    "Translations",
    "held_out",
    "mixed_text",
    "natural_mixtures",
    "package_texts",
    "real_domains",
    "translations",
]

EXPERT_DOMAINS: tuple[Domain, ...] = (*CONVENTIONS, *EXPERT_TEXTS)


def real_domains(directory: Path | None = None) -> dict[str, Domain]:
    """By name, the eighteen domains that the bundle ``smollm2`` has experts of: languages, package texts and tasks.

    Args:
        directory: where the packages are, if ``pip install --target`` put them there; reasoning-gym must be on Python's
            path.
    """
    domains: tuple[Domain, ...] = (*translations(directory), *package_texts(directory), *TASKS)
    return {domain.name: domain for domain in domains}
