"""Passages of packages' files: what is read, and that no text is in both splits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import NATURAL_MIXTURES, PACKAGE_TEXTS, TextDomain, held_out, package_texts
from bayes_dispatch.experts.domains.package_texts import by_split


def test_texts_by_split() -> None:
    """By hash of the name; short ones are left out, and the same text is in one split alone."""
    texts = {f"file {number}": f"{number:04}" * 2 for number in range(100)}
    twice = {f"copy {number}": text for number, text in enumerate(texts.values())}
    found = by_split({"short": "1234567", **texts, **twice}, 8)
    assert sorted(found["train"] + found["held_out"]) == sorted(texts.values())
    assert by_split(texts, 8)["held_out"] == [text for name, text in texts.items() if held_out(name)]


def test_icons_and_headers(install: Callable[..., Path]) -> None:
    folder = "material/templates/.icons"
    icons = {f"{folder}/material/{number}.svg": f"<svg>{number}</svg>".encode() for number in range(40)}
    install("mkdocs-material", "9.8.2", {**icons, f"{folder}/simple/other.svg": b"<svg>other</svg>"})
    headers = {f"torch/include/c10/{number}.h": b"// %d\n" % number * 200 for number in range(40)}
    made = {"torch/include/ATen/ops/add.h": b"// made\n" * 200}
    domains = {domain.name: domain for domain in package_texts(install("torch", "2.13.0+cpu", {**headers, **made}))}
    for split in ("train", "held_out"):
        (text,) = domains["icons"].texts(split)
        own = [data.decode() for name, data in icons.items() if held_out(name) == (split == "held_out")]
        assert sorted(text.splitlines()) == sorted(own)
        expected = [data.decode() for name, data in headers.items() if held_out(name) == (split == "held_out")]
        assert sorted(domains["headers"].texts(split)) == sorted(expected)
    document = domains["headers"].document(np.random.default_rng(0), 100, 400, "held_out")
    assert document.ranges == ((100, 400),)


@pytest.mark.parametrize("domain", [*PACKAGE_TEXTS, *NATURAL_MIXTURES[-3:]], ids=lambda domain: domain.name)
def test_the_real_texts(domain: TextDomain) -> None:
    """Enough to learn from and to be scored on, and most of it in one split alone."""
    try:
        train, held = domain.texts("train"), domain.texts("held_out")
    except ConfigError as error:
        pytest.skip(str(error))
    assert sum(map(len, train)) > 40_000
    assert sum(map(len, held)) > 5_000
    known = {line for text in train for line in text.splitlines()}
    shared = [line for text in held for line in text.splitlines() if len(line) > 40 and line in known]
    assert sum(map(len, shared)) < 0.3 * sum(map(len, held))  # such as licences and page heads
    documents = [domain.document(np.random.default_rng(seed), 200, 600, "held_out") for seed in (0, 0, 1)]
    assert documents[0] == documents[1] != documents[2]
    assert all(document.prompt_bytes == 200 for document in documents)
