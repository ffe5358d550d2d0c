"""A bundle of a real model, and the domains that it is judged on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

import bayes_dispatch as bd
from bayes_dispatch.app.bundle import transformers_backbone
from bayes_dispatch.experts.domains import (
    FOREIGN_TRANSLATIONS,
    Domain,
    natural_mixtures,
    package_texts,
    real_domains,
)

__all__ = ["real_parts"]


def real_parts(
    directory: Path, model: str | None, dtype: str | None, texts: Path | None
) -> tuple[bd.Bundle, dict[str, Domain], dict[str, Sequence[Domain]]]:
    """The bundle, the domains of its experts, and others by kind; ``dtype`` is its own by default."""
    base = None if model is None else transformers_backbone(model, device="cpu", dtype="float32", cast=dtype)
    bundle = bd.load_bundle(directory, model=base, dtype=None if base else dtype)
    known = real_domains(texts)
    if missing := [name for name in bundle.experts if name not in known]:
        raise typer.BadParameter(f"expected experts of {', '.join(known)}, got {missing[0]}")
    foreign: list[Domain] = [replace(domain, directory=texts) for domain in FOREIGN_TRANSLATIONS]
    foreign += [domain for domain in package_texts(texts) if domain.name not in bundle.experts]
    others = {"natural": natural_mixtures(texts), "foreign": foreign}
    return bundle, {name: known[name] for name in bundle.experts}, others
