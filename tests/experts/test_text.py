"""Passages of text domains are of the right texts, from the right split, by the seed. The fast tests read a few files
only."""

import base64
import codecs
import json
from collections.abc import Iterator

import numpy as np
import pytest

from bayes_dispatch.experts.domains import BASE_TEXTS, EXPERT_TEXTS, FOREIGN_TEXTS, TextDomain, held_out, text

DOMAINS = {domain.name: domain for domain in (*BASE_TEXTS, *EXPERT_TEXTS, *FOREIGN_TEXTS)}
CACHED = (
    text._sources,
    text._definitions,
    text._passages,
    text._code,
    text._prose,
    text._json,
    text._capitals,
    text._rot13,
    text._base64,
)


def forget() -> None:
    for function in CACHED:
        function.cache_clear()


@pytest.fixture(scope="class")
def few_files() -> Iterator[dict[str, str]]:
    """The domains over a dozen files of the standard library, some of them held out."""
    forget()
    everything = text._sources()
    names = sorted(everything, key=lambda name: len(everything[name]))[60:200]
    chosen = [name for name in names if held_out(name)][:4] + [name for name in names if not held_out(name)][:10]
    few = {name: everything[name] for name in chosen}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_sources", lambda: few)
        forget()
        yield few
    forget()


class TestFewFiles:
    def test_passages(self, few_files: dict[str, str]) -> None:
        rng = np.random.default_rng(0)
        for domain in DOMAINS.values():
            texts = {split: domain.texts(split) for split in ("train", "held_out")}
            for split, sources in texts.items():
                document = domain.document(rng, 100, 300, split)  # type: ignore[arg-type]
                source = next(source for source in sources if document.text in source)
                at = source.index(document.text)
                assert at == 0 or source[at - 1] == "\n"
                assert len(document.data) == 300
                assert document.ranges == ((100, 300),)

    def test_seeds_decide(self, few_files: dict[str, str]) -> None:
        domain = DOMAINS["code"]
        one, same, other = (domain.document(np.random.default_rng(s), 10, 200, "train") for s in (0, 0, 1))
        assert one == same != other

    def test_splits_follow_the_files(self, few_files: dict[str, str]) -> None:
        for split in ("train", "held_out"):
            expected = [source for name, source in few_files.items() if held_out(name) == (split == "held_out")]
            assert DOMAINS["code"].texts(split) == expected
        assert len(DOMAINS["json"].texts("held_out")) <= len(expected)

    def test_what_the_texts_are_made_of(self, few_files: dict[str, str]) -> None:
        prose = DOMAINS["prose"].texts("held_out")
        assert DOMAINS["capitals"].texts("held_out") == [source.upper() for source in prose]
        assert [codecs.decode(source, "rot13") for source in DOMAINS["rot13"].texts("held_out")] == prose
        assert [base64.b64decode(source).decode() for source in DOMAINS["base64"].texts("held_out")] == prose
        for source in DOMAINS["json"].texts("train"):
            for line in source.splitlines():
                assert {"name", "line", "doc"} <= json.loads(line).keys()


def test_a_short_text_is_taken_whole() -> None:
    document = TextDomain("short", lambda _: ["ab\ncd\n"]).document(np.random.default_rng(0), 100, 300, "train")
    assert (document.text, document.prompt_bytes) == ("ab\ncd\n", 6)


def test_longer_texts_are_taken_more_often() -> None:
    """In proportion to their lengths; 4-sigma band, a false alarm in 16,000 seeds."""
    domain = TextDomain("two", lambda _: ["a" * 1000, "b" * 3000])
    rng = np.random.default_rng(0)
    count = sum(domain.document(rng, 0, 10, "train").text[0] == "b" for _ in range(1000))
    assert abs(count - 750) < 4 * np.sqrt(1000 * 3 / 16)


@pytest.mark.slow
def test_the_whole_installation() -> None:
    """Each split has enough text, and next to none of it is in both."""
    for domain in DOMAINS.values():
        train, kept = (domain.texts(split) for split in ("train", "held_out"))
        assert sum(map(len, train)) > 500_000
        assert sum(map(len, kept)) > 50_000
        shared = set(train) & set(kept)  # pydoc has one topic under two names
        assert sum(map(len, shared)) < 0.01 * sum(map(len, kept))
    assert all("config-" not in name and "test" not in name.split("/") for name in text._sources())
