"""Translations of interface texts, from the catalogues of web frameworks: the entries before tell the language.

    EN: Delete this image
    TR: Dieses Bild löschen

An English text is in one split for all languages. Only single lines of at most 120 bytes are taken, without plural
forms, and no text that its translation leaves as it is.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bayes_dispatch.arguments import whole
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Split, exact, held_out
from bayes_dispatch.experts.domains.interleaved import Interleaved
from bayes_dispatch.experts.domains.sources import Source

__all__ = ["FOREIGN_TRANSLATIONS", "SOURCES", "TRANSLATIONS", "Translations", "messages", "translations"]

SOURCES = (
    Source("Django", "5.2.19"),
    Source("wagtail", "8.0.1"),
    Source("django-oscar", "4.2.1"),
    Source("django-cms", "5.1.3"),
    Source("djangorestframework", "3.18.3"),
)
FOLDERS = {  # a catalogue lies in the folder of its language, LC_MESSAGES
    "de": ("de",),
    "fr": ("fr",),
    "es": ("es",),
    "pt": ("pt", "pt_PT"),
    "pt_BR": ("pt_BR",),
    "nb": ("nb", "nb_NO", "no"),
    "da": ("da",),
    "ru": ("ru",),
    "fi": ("fi",),
    "ro": ("ro",),
    "uk": ("uk",),
    "zh_Hans": ("zh_Hans", "zh_CN"),
}
LONGEST = 120
MARKUP = re.compile(r"<[^>]*>|%\(\w+\)[a-z]|%[a-z]|\{\w*\}")


@dataclass(frozen=True)
class Translations:
    """English texts, each with its translation into one language.

    Attributes:
        language: such as ``"pt_BR"``; also the domain's name.
        directory: where the packages are, if ``pip install --target`` put them there.
        longest: the most bytes of a text, at most 120.

    Raises:
        ConfigError: the language is none that is read here, or texts are to be longer.
    """

    language: str
    directory: Path | None = None
    longest: int = LONGEST

    def __post_init__(self) -> None:
        if self.language not in FOLDERS:
            raise ConfigError(f"expected a language of {', '.join(FOLDERS)}, got {self.language!r:.40}")
        whole("longest", self.longest, 1, LONGEST)

    @property
    def name(self) -> str:
        return self.language

    def entries(self, split: Split) -> tuple[tuple[str, str], ...]:
        """All English texts of a split, with their translations.

        Raises:
            ConfigError: a package is missing (the message tells how to install it), or none has any.
        """
        found = _entries(self.language, self.directory, self.longest, split)
        if not found:
            raise ConfigError(f"expected translations into {self.language} in the packages' catalogues, got none")
        return found

    @property
    def content(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """The entries of each split."""
        return {split: self.entries(split) for split in ("train", "held_out")}

    def items(self, rng: np.random.Generator, split: Split) -> Iterator[tuple[str, str]]:
        """Entries in random order; none comes twice before each came once. An answer begins with its space."""
        entries = self.entries(split)
        while True:
            for place in rng.permutation(len(entries)):
                english, translation = entries[place]
                yield f"EN: {english}\nTR:", f" {translation}"

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """Entries of this language; translations after the prompt are scored."""
        return Interleaved(self.name, (self,)).document(rng, prompt_bytes, total_bytes, split)

    def reward(self, question: str, expected: str, answer: str) -> float:
        """1 for the catalogue's translation, 0 for any other."""
        return exact(expected, answer)


@cache
def _entries(language: str, directory: Path | None, longest: int, split: Split) -> tuple[tuple[str, str], ...]:
    return tuple(
        (english, translation)
        for english, translation in _catalogue(language, directory).items()
        if held_out(english) == (split == "held_out")
        and max(len(english.encode()), len(translation.encode())) <= longest
    )


@cache
def _catalogue(language: str, directory: Path | None) -> dict[str, str]:
    """The translation of each text; of several that it has, the first."""
    found: dict[str, str] = {}
    for english, translation in messages(FOLDERS[language], directory):
        if _is_plain(english, translation):
            found.setdefault(english, translation)
    return found


def messages(folders: Sequence[str], directory: Path | None = None) -> Iterator[tuple[str, str]]:
    """All English texts without plural forms that differ from their translations, with these.

    Args:
        folders: names of the folders that hold a language's catalogues.
        directory: where the packages are, if ``pip install --target`` put them there.

    Raises:
        ConfigError: a package is missing, or babel.
    """
    try:
        from babel.messages.mofile import read_mo
    except ImportError:
        raise ConfigError("expected babel, which reads catalogues (pip install babel), got none") from None
    for path in (path for source in SOURCES for path in source.files(".mo", directory).values()):
        if path.parent.parent.name in folders:
            with path.open("rb") as file:
                found = list(read_mo(file))
            for message in found:
                english, translation = message.id, message.string
                if isinstance(english, str) and isinstance(translation, str) and english.strip() != translation.strip():
                    yield english.strip(), translation.strip()


def _is_plain(english: str, translation: str) -> bool:
    lines = all(0 < len(text.encode()) <= LONGEST and len(text.splitlines()) == 1 for text in (english, translation))
    return lines and re.search(r"[A-Za-z]{2}", MARKUP.sub("", english)) is not None


def translations(directory: Path | None = None, longest: int = LONGEST) -> tuple[Translations, ...]:
    """A domain for each of eight languages: two Romance pairs, a Scandinavian one, German and Russian.

    Args:
        directory: where the packages are, if ``pip install --target`` put them there.
        longest: the most bytes of a text.
    """
    return tuple(
        Translations(language, directory, longest) for language in ("de", "fr", "es", "pt", "pt_BR", "nb", "da", "ru")
    )


TRANSLATIONS = translations()
FOREIGN_TRANSLATIONS = tuple(Translations(language) for language in ("fi", "ro", "uk", "zh_Hans"))
