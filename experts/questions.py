"""Questions that documents ask: what is read before an answer, and what the answer should be."""

from typing import NamedTuple

import numpy as np

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document

__all__ = ["Question", "ask"]


class Question(NamedTuple):
    """A place in a document, where an answer begins.

    Attributes:
        context: all bytes before. text: those since the answer before this one, without its newline.
        expected: the document's own answer. is_line: whether a newline ends the answer.
        limit: most tokens to answer with, that newline included: as many as ``expected`` may have bytes.
    """

    context: bytes
    text: str
    expected: str
    is_line: bool
    limit: int


def ask(document: Document, rng: np.random.Generator, answer_bytes: int) -> Question:
    """One question of the later half of a document, where it has one there.

    A scored range that a newline follows is an answer. In a longer text any place may be asked about; the answer is
    then what follows it, up to ``answer_bytes``.

    Args:
        document: with scored ranges. rng: chooses. answer_bytes: most bytes of an answer, unless the true one has more.

    Raises:
        ConfigError: the document has no scored range.
    """
    data, ranges = document.data, document.ranges
    if not ranges:
        raise ConfigError(f"expected a document with an answer, got none in {document.text!r:.60}")
    lines = [i for i, (_, stop) in enumerate(ranges) if data[stop : stop + 1] == b"\n"]
    late = [i for i in lines if ranges[i][0] >= len(data) // 2]
    if not lines:
        start, stop = max(ranges, key=lambda place: place[1] - place[0])
        first = min(max(start, len(data) // 2), max(start, stop - answer_bytes))
        start = int(rng.integers(first, max(first, stop - answer_bytes) + 1))
        expected = data[start : min(stop, start + answer_bytes)]
        return Question(data[:start], _decode(data[:start]), _decode(expected), False, max(1, len(expected)))
    chosen = int(rng.choice(late or lines))
    start, stop = ranges[chosen]
    before = ranges[chosen - 1][1] + 1 if chosen else 0
    limit = max(answer_bytes, stop - start) + 1
    return Question(data[:start], _decode(data[before:start]), _decode(data[start:stop]), True, limit)


def _decode(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
