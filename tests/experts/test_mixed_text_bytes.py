"""Each byte of a mixed text has its domain, whatever the alphabet; answers stay with their questions."""

from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
import pytest

from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import CONVENTIONS, Interleaved, Split, mixed_text
from bayes_dispatch.experts.domains.own import OwnText

GREEK = OwnText("greek", "μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος\n" * 400)


@pytest.mark.parametrize("length", [1, 16, 127, 300])
def test_bytes_are_counted(length: int) -> None:
    """Each line is of one domain alone, those of the other begin with a letter; the end may cut a character."""
    text, owners = mixed_text([GREEK, CONVENTIONS[0]], [0.5, 0.5], np.random.default_rng(length), length, "train")
    size = len(text.encode())
    assert length - 3 < size <= length
    lines = [(line[0] in ascii_lowercase, len(line.encode())) for line in text.splitlines(keepends=True)]
    assert owners.tolist() == [int(convention) for convention, count in lines for _ in range(count)]


@dataclass(frozen=True)
class Asked:
    """A question of two lines, and its answer, all of which tell whose they are."""

    name: str

    def items(self, rng: np.random.Generator, split: Split) -> Iterator[tuple[str, str]]:
        for number in range(10**6):
            yield f"{self.name} {number} ?\n{self.name} {number}:", f" {self.name}"

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        return Interleaved(self.name, (self,)).document(rng, prompt_bytes, total_bytes, split)


def test_an_answer_stays_with_its_question() -> None:
    text, owners = mixed_text([Asked("a"), Asked("b"), GREEK], [0.4, 0.4, 0.2], np.random.default_rng(0), 600, "train")
    lines = [line for line in text.splitlines()[:-1] if line[0] in "ab"]
    starts = [place for place, line in enumerate(lines) if line.endswith("?")]
    assert {lines[place][0] for place in starts} == {"a", "b"}
    for place in starts[:-1]:
        question = lines[place].removesuffix(" ?")
        assert lines[place + 1] == f"{question}: {question[0]}"
    assert np.bincount(owners) / len(owners) == pytest.approx([0.4, 0.4, 0.2], abs=0.1)
