"""Documents that mix two kinds, as people made them: translations both ways, text and code, templates and scripts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np

from bayes_dispatch.experts.domains.domain import Domain, Split
from bayes_dispatch.experts.domains.interleaved import Interleaved
from bayes_dispatch.experts.domains.package_texts import by_split
from bayes_dispatch.experts.domains.sources import Source
from bayes_dispatch.experts.domains.text import TextDomain
from bayes_dispatch.experts.domains.translations import SOURCES, Translations, translations

__all__ = ["NATURAL_MIXTURES", "BackTranslations", "natural_mixtures"]

READMES = (
    Source("accelerate", "1.15.0"),
    Source("huggingface_hub", "2.4.0"),
    Source("jaxtyping", "0.3.11"),
    Source("lazy-loader", "0.6"),
    Source("nbmake", "1.5.5"),
    Source("numpyro", "0.22.0"),
    Source("peft", "0.21.2"),
    Source("pyro-ppl", "1.9.2"),
    Source("rich", "15.0.0"),
    Source("stack-data", "0.6.3"),
    Source("threadpoolctl", "3.8.0"),
    Source("tokenizers", "0.23.3"),
    Source("transformers", "5.24.0"),
    Source("typer", "0.29.2"),
)
NOTEBOOKS = Source("holoviews", "1.23.2")


@dataclass(frozen=True)
class BackTranslations:
    """Entries of a catalogue the other way: the translation first, and the English text as its answer.

    Attributes:
        forward: the same entries, from English.
    """

    forward: Translations

    @property
    def name(self) -> str:
        return f"{self.forward.name} to English"

    def items(self, rng: np.random.Generator, split: Split) -> Iterator[tuple[str, str]]:
        """Entries in random order, as ``Translations.items``."""
        for question, translation in self.forward.items(rng, split):
            english = question.removeprefix("EN:").removesuffix("\nTR:")
            yield f"TR:{translation}\nEN:", english


def natural_mixtures(directory: Path | None = None) -> tuple[Domain, ...]:
    """Translations of each language both ways in random order, then the three kinds of texts.

    Args:
        directory: looked at before Python's own path, as ``pip install --target`` filled it.
    """
    both = [
        Interleaved(f"{forward.name} both ways", (forward, BackTranslations(forward)), "random")
        for forward in translations(directory)
    ]
    return (
        *both,
        TextDomain("markdown with code", lambda split: _readmes(directory)[split]),
        TextDomain("templates with scripts", lambda split: _templates(directory)[split]),
        TextDomain("notebooks", lambda split: _notebooks(directory)[split]),
    )


@cache
def _readmes(directory: Path | None) -> dict[Split, list[str]]:
    return by_split({source.name: source.readme(directory) for source in READMES})


@cache
def _templates(directory: Path | None) -> dict[Split, list[str]]:
    texts = {name: text for source in SOURCES for name, text in source.texts(".html", directory).items()}
    return by_split({name: text for name, text in texts.items() if "<script" in text})


@cache
def _notebooks(directory: Path | None) -> dict[Split, list[str]]:
    """The cells' sources in the percent format of Jupytext; one of those of a name, and none with pictures inside."""
    marks = {"code": "# %%", "markdown": "# %% [markdown]", "raw": "# %% [raw]"}
    texts = {}
    for path, text in NOTEBOOKS.texts(".ipynb", directory).items():
        cells = json.loads(text)["cells"]
        texts[PurePosixPath(path).stem] = "".join(
            f"{marks[cell['cell_type']]}\n{''.join(cell['source'])}\n\n" for cell in cells
        )
    return by_split({name: text for name, text in texts.items() if ";base64," not in text})


NATURAL_MIXTURES = natural_mixtures()
