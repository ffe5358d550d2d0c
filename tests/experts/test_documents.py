"""Documents count in bytes, also where characters have several; weights are one where it is scored, and cuts keep
that."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document

Parts = tuple[str, int, tuple[tuple[int, int], ...] | None]


@st.composite
def documents(draw: st.DrawFn) -> Parts:
    """What a document is made of."""
    text = draw(st.text("abé€😀\n", max_size=12))
    length = len(text.encode())
    bounds = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    ranges = tuple(zip(bounds[::2], bounds[1::2], strict=False))
    return text, draw(st.integers(0, length)), draw(st.sampled_from([None, ranges]))


@settings(deadline=None)
@given(documents())
def test_the_prompt_is_the_whole_characters_of_its_bytes(parts: Parts) -> None:
    document = Document(*parts)
    prompt = document.prompt.encode()
    assert document.data.startswith(prompt)
    assert 0 <= document.prompt_bytes - len(prompt) < 4
    assert document.text.startswith(document.prompt)


@settings(deadline=None)
@given(documents(), st.floats(0, 0.9))
def test_weights_are_one_where_it_is_scored(parts: Parts, unscored: float) -> None:
    document = Document(*parts)
    scored = {i for start, stop in document.ranges for i in range(start, stop)}
    expected = [1.0 if i in scored else unscored for i in range(len(document.data))]
    assert document.byte_weights(unscored) == expected


@settings(deadline=None)
@given(documents())
def test_all_after_the_prompt_is_scored_by_default(parts: Parts) -> None:
    document = Document(*parts)
    assert replace(document, scored=None).ranges == ((document.prompt_bytes, len(document.data)),)


@settings(deadline=None)
@given(documents(), st.integers(0, 50))
def test_a_cut_keeps_a_beginning_and_what_is_scored_in_it(parts: Parts, length: int) -> None:
    document = Document(*parts)
    cut = document.cut(length)
    assert document.data.startswith(cut.data)
    assert 0 <= min(length, len(document.data)) - len(cut.data) < 4
    assert cut.prompt_bytes == min(document.prompt_bytes, len(cut.data))
    assert cut.byte_weights(0.5) == document.byte_weights(0.5)[: len(cut.data)]
    assert document.cut(len(document.data)).data == document.data


@pytest.mark.parametrize(
    ("text", "prompt_bytes", "scored", "message"),
    [
        (b"abc", 1, None, "expected the text of a document, got b'abc'"),
        (None, 1, None, "expected the text of a document, got None"),
        ("é.", 4, None, "prompt_bytes to be a whole number from 0 to 3, got 4"),
        ("é.", -1, None, "prompt_bytes to be a whole number from 0 to 3, got -1"),
        ("é.", 2.5, None, "prompt_bytes to be a whole number from 0 to 3, got 2.5"),
        ("é.", True, None, "prompt_bytes to be a whole number from 0 to 3, got True"),
        ("é.", 1, ((2, 4),), "the end of a scored range to be a whole number from 0 to 3, got 4"),
        ("é.", 1, ((-1, 2),), "the start of a scored range to be a whole number from 0 to 2, got -1"),
        ("é.", 1, ((2, 1),), "the start of a scored range to be a whole number from 0 to 1, got 2"),
        ("é.", 1, ((0.0, 1),), "the start of a scored range to be a whole number from 0 to 1, got 0.0"),
        ("é.", 1, (1, 2), "a scored range to be a list of 2, got 1"),
        ("é.", 1, 3, "scored to be a list, got 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_place_in_a_text(text: Any, prompt_bytes: Any, scored: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}$"):
        Document(text, prompt_bytes, scored)


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_places() -> None:
    document = Document("abc", np.int64(1), [np.array([1, 2])])  # type: ignore[arg-type]
    assert document == Document("abc", 1, ((1, 2),))
    assert hash(document) == hash(Document("abc", 1, ((1, 2),)))
