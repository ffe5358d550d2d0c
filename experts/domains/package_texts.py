"""Texts of packages on PyPI of which SmolLM2-135M-Instruct knows little.

Nats per byte under it, 600 bytes at a time (docs/domains.md): Polish 1.66, icons 1.57, C++ headers .77, Cython .70.
Left out: templates .59, JSON .60 and .47; style sheets .83, of which too few are unlike each other.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from bayes_dispatch.experts.domains.domain import Split, held_out
from bayes_dispatch.experts.domains.sources import Source
from bayes_dispatch.experts.domains.text import TextDomain
from bayes_dispatch.experts.domains.translations import messages

__all__ = ["PACKAGE_TEXTS", "by_split", "package_texts"]

MATERIAL, SKLEARN, TORCH = (
    Source("mkdocs-material", "9.8.2"),
    Source("scikit-learn", "1.9.1"),
    Source("torch", "2.13.0"),
)


def package_texts(directory: Path | None = None) -> tuple[TextDomain, ...]:
    """A domain for each of the four: lines of SVG, Polish sentences, Cython, C++ headers.

    Args:
        directory: looked at before Python's own path, as ``pip install --target`` filled it.
    """
    return (
        TextDomain("icons", lambda split: _icons(directory)[split]),
        TextDomain("polish", lambda split: _polish(directory)[split]),
        TextDomain("cython", lambda split: _cython(directory)[split]),
        TextDomain("headers", lambda split: _headers(directory)[split]),
    )


def by_split(texts: Mapping[str, str], shortest: int = 600) -> dict[Split, list[str]]:
    """Texts of at least ``shortest`` characters by split, by hash of their names; the same text twice counts once."""
    names = {text: name for name, text in texts.items() if len(text) >= shortest}
    found: dict[Split, list[str]] = {"train": [], "held_out": []}
    for text, name in names.items():
        found["held_out" if held_out(name) else "train"].append(text)
    return found


def _lines(texts: Mapping[str, str]) -> dict[Split, list[str]]:
    """Short texts, one a line, as one text of each split."""
    return {split: ["\n".join(lines)] for split, lines in by_split(texts, 1).items()}


@cache
def _icons(directory: Path | None) -> dict[Split, list[str]]:
    return _lines(MATERIAL.texts(".svg", directory, "material/templates/.icons/material/"))


@cache
def _polish(directory: Path | None) -> dict[Split, list[str]]:
    """Sentences that are translations; the English text decides the split, as elsewhere."""
    found = messages(("pl",), directory)
    return _lines({english: text for english, text in found if len(text) >= 40 and not re.search(r"[<\n]", text)})


@cache
def _cython(directory: Path | None) -> dict[Split, list[str]]:
    return by_split(SKLEARN.texts(".pyx", directory))


@cache
def _headers(directory: Path | None) -> dict[Split, list[str]]:
    """Those that people wrote; most others are made by programs."""
    folders = ("torch/include/ATen/native/", "torch/include/c10/")
    return by_split({name: text for each in folders for name, text in TORCH.texts(".h", directory, each).items()})


PACKAGE_TEXTS = package_texts()
