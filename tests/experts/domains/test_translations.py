"""Catalogues become questions and answers: what is taken, what is scored, and what is held out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import FOREIGN_TRANSLATIONS, TRANSLATIONS, Checked, Translations, held_out
from bayes_dispatch.experts.domains.interleaved import Interleaved
from bayes_dispatch.experts.domains.natural import BackTranslations
from bayes_dispatch.experts.domains.translations import SOURCES
from tests.packages import mo

Install = Callable[..., Path]
ENGLISH = [f"Add page {number}" for number in range(60)]
LANGUAGES = {
    "de": "Seite {} hinzufügen",
    "pt": "Adicionar página {}",
    "pt_BR": "Acrescentar página {}",
    "ru": "Страница {}",
}


@pytest.fixture
def directory(install: Install) -> Path:
    """Four languages; the last package translates one text again, and has what must not be taken."""
    catalogues = {
        language: {english: form.format(english.split()[-1]) for english in ENGLISH}
        for language, form in LANGUAGES.items()
    }
    left_out = {
        "Save": "Save",
        "Two\nlines": "Zwei\nZeilen",
        "Empty": "",
        "<b>%(n)s</b>": "<i>%(n)s</i>",
        ("page", "pages"): ("Seite", "Seiten"),
        "Long": "ü" * 61,
        "Separated": "Ge\u2028trennt",
        ENGLISH[0]: "Neue Seite",
    }
    for source in SOURCES[:-1]:
        files = {
            f"one/locale/{language}/LC_MESSAGES/django.mo": mo(entries) for language, entries in catalogues.items()
        }
        install(source.name, source.version, files if source is SOURCES[0] else {})
    files = {"two/locale/de/LC_MESSAGES/django.mo": mo({**left_out, " Widest ": "ü" * 60 + "\n"})}
    return install(SOURCES[-1].name, SOURCES[-1].version, files)


def test_what_is_taken(directory: Path) -> None:
    domain = Translations("de", directory)
    entries = dict(domain.entries("train") + domain.entries("held_out"))
    assert entries == {english: f"Seite {english.split()[-1]} hinzufügen" for english in ENGLISH} | {"Widest": "ü" * 60}


def test_short_texts_alone(directory: Path) -> None:
    """Both sides count, in bytes."""
    entries = Translations("de", directory, 19).entries("train")
    short = {english for english in ENGLISH if len(english) == 10}
    assert {english for english, _ in entries} == {english for english in short if not held_out(english)}
    with pytest.raises(ConfigError, match="expected longest to be a whole number from 1 to 120, got 121"):
        Translations("de", directory, 121)


def test_an_english_text_is_in_one_split_for_all_languages(directory: Path) -> None:
    for language in LANGUAGES:
        domain = Translations(language, directory)
        for split in ("train", "held_out"):
            texts = [english for english, _ in domain.entries(split)]
            assert texts
            assert all(held_out(english) == (split == "held_out") for english in texts)


@pytest.mark.parametrize("order", ["alternate", "random", "switch"])
def test_translations_alone_are_scored(directory: Path, order: str) -> None:
    """The bytes of each are found in its catalogue, after the prompt and in order, whatever a letter's width."""
    kinds = tuple(Translations(language, directory) for language in ("de", "ru", "pt_BR"))
    domain = Interleaved("mix", kinds, order)
    document, owners = domain.with_owners(np.random.default_rng(3), 300, 900, "train")
    known = [dict(kind.entries("train")) for kind in kinds]
    assert 900 <= len(document.data) < 900 + 200
    assert 300 <= document.prompt_bytes < 300 + 200
    lines = document.text.splitlines()
    pairs = [(a.removeprefix("EN: "), b.removeprefix("TR: ")) for a, b in zip(lines[::2], lines[1::2], strict=True)]
    whose = [next(k for k, entries in enumerate(known) if entries[english] == text) for english, text in pairs]
    sizes = [len(f"EN: {english}\nTR: {text}\n".encode()) for english, text in pairs]
    ends = np.cumsum(sizes)
    in_prompt = int((ends <= document.prompt_bytes).sum())
    assert ends[in_prompt - 1] == document.prompt_bytes
    scored = [document.data[start:stop].decode() for start, stop in document.ranges]
    assert scored == [f" {text}" for _, text in pairs[in_prompt:]]
    assert owners.tolist() == np.repeat(whose[:in_prompt], sizes[:in_prompt]).tolist()
    starts = ends - sizes
    if order == "alternate":
        assert whose == [number % 3 for number in range(len(pairs))]
    if order == "switch":
        assert whose == [int(start / 900 * 3) for start in starts]
    assert document == domain.document(np.random.default_rng(3), 300, 900, "train")
    assert document != domain.document(np.random.default_rng(4), 300, 900, "train")


def test_no_entry_comes_twice_before_each_came_once(directory: Path) -> None:
    domain = Translations("pt", directory)
    count = len(domain.entries("held_out"))
    items = domain.items(np.random.default_rng(0), "held_out")
    for _ in range(2):
        asked = [next(items) for _ in range(count)]
        assert {(q.removeprefix("EN: ").removesuffix("\nTR:"), a[1:]) for q, a in asked} == set(
            domain.entries("held_out")
        )


def test_the_catalogues_translation_alone_is_rewarded(directory: Path) -> None:
    domain = Translations("ru", directory)
    assert isinstance(domain, Checked)
    assert domain.reward("EN: Add page 1\nTR:", " Страница 1", " Страница 1") == 1
    assert domain.reward("EN: Add page 1\nTR:", " Страница 1", " Страница 2") == 0


def test_entries_the_other_way(directory: Path) -> None:
    """Each in its own direction, its split and its order; what is scored is English, or German."""
    forward = Translations("de", directory)
    both = Interleaved("both", (forward, BackTranslations(forward)), "random")
    document = both.document(np.random.default_rng(0), 200, 2000, "train")
    known = dict(forward.entries("train"))
    lines = document.data[document.prompt_bytes :].decode().splitlines()
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    assert {first[:4] for first, _ in pairs} == {"EN: ", "TR: "}
    for first, second in pairs:
        english, german = sorted((first, second))
        assert known[english.removeprefix("EN: ")] == german.removeprefix("TR: ")
    scored = [document.data[start:stop].decode() for start, stop in document.ranges]
    assert scored == [second[3:] for _, second in pairs]


def test_a_language_without_catalogues(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"^expected translations into fr in the packages' catalogues, got none$"):
        Translations("fr", directory).entries("train")
    with pytest.raises(ConfigError, match=r"^expected a language of de, .*, got 'xx'$"):
        Translations("xx")


@pytest.mark.slow
def test_the_real_catalogues() -> None:
    """Every language has enough to learn from, and hundreds of texts whose answer near languages share or do not."""
    try:
        entries = {domain.name: dict(domain.entries("train")) for domain in (*TRANSLATIONS, *FOREIGN_TRANSLATIONS)}
    except ConfigError as error:
        pytest.skip(str(error))
    assert [domain.name for domain in TRANSLATIONS] == ["de", "fr", "es", "pt", "pt_BR", "nb", "da", "ru"]
    assert min(map(len, entries.values())) > 2000
    for one, other in (("pt", "pt_BR"), ("nb", "da")):
        both = entries[one].keys() & entries[other].keys()
        same = sum(entries[one][english] == entries[other][english] for english in both)
        assert len(both) > 800
        assert 0.1 < same / len(both) < 0.6
