"""Texts that are mixed by nature, from small packages."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bayes_dispatch.experts.domains import TextDomain, held_out, natural_mixtures
from bayes_dispatch.experts.domains.natural import NOTEBOOKS, READMES
from bayes_dispatch.experts.domains.translations import SOURCES

Install = Callable[..., Path]


def texts(directory: Path, name: str) -> dict[str, list[str]]:
    domain = next(domain for domain in natural_mixtures(directory) if domain.name == name)
    assert isinstance(domain, TextDomain)
    return {split: list(domain.texts(split)) for split in ("train", "held_out")}


def test_readmes(install: Install) -> None:
    bodies = {source.name: f"# {source.name}\n\n```python\n{'pass; ' * 200}\n```" for source in READMES}
    for source in READMES:
        directory = install(source.name, source.version, {}, bodies[source.name])
    held = [bodies[name] for name in bodies if held_out(name)]
    assert len(held) >= 3
    train = [bodies[name] for name in bodies if not held_out(name)]
    assert texts(directory, "markdown with code") == {"train": train, "held_out": held}


def test_templates_with_scripts(install: Install) -> None:
    script = b"<p>{{ text }}</p>\n<script>\nlet a = 1;\n</script>\n" * 20
    for source in SOURCES:
        folder = source.name.lower()
        files = {f"{folder}/{n}.html": b"%d %b\n" % (n, script + folder.encode()) for n in range(20)}
        directory = install(source.name, source.version, files | {f"{folder}/plain.html": b"<p>plain</p>\n" * 100})
    found = texts(directory, "templates with scripts")
    names = [f"{source.name.lower()}/{n}.html" for source in SOURCES for n in range(20)]
    assert {split: len(own) for split, own in found.items()} == {
        "held_out": sum(map(held_out, names)),
        "train": sum(not held_out(name) for name in names),
    }
    assert all("<script>" in text for own in found.values() for text in own)


@pytest.mark.parametrize("source", ["import numpy\nnumpy.ones(3)\n" * 30, ["import numpy\n", "numpy.ones(3)\n"] * 30])
def test_notebooks(install: Install, source: str | list[str]) -> None:
    """Sources of the cells, whether a text or its lines; outputs are left out."""
    cells = [
        {"cell_type": "markdown", "source": ["# Ones\n", "of numpy"]},
        {"cell_type": "code", "source": source, "outputs": [{"data": {"image/png": "iVBORw0KGgo"}}]},
    ]
    book = json.dumps({"cells": cells}).encode()
    found = texts(install(NOTEBOOKS.name, NOTEBOOKS.version, {"holoviews/a.ipynb": book}), "notebooks")
    code = "import numpy\nnumpy.ones(3)\n" * 30
    assert found["train"] + found["held_out"] == [f"# %% [markdown]\n# Ones\nof numpy\n\n# %%\n{code}\n\n"]
