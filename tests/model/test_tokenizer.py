"""Bytes in, the same text out, alone and in a padded batch. Any ids decode; what is no UTF-8 or no id is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import PromptError, TensorError
from bayes_dispatch.model.tokenizer import ByteTokenizer, utf8

TOKENIZER = ByteTokenizer()


@settings(deadline=None)
@given(st.text())
def test_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == [256, *text.encode()]
    assert TOKENIZER.encode(text.encode()) == ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(torch.tensor(ids)) == text


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=5))
def test_a_batch_is_its_rows_and_padding(texts: list[str]) -> None:
    ids, mask = TOKENIZER.encode_batch(texts)
    assert ids.shape == mask.shape == (len(texts), 1 + max(len(text.encode()) for text in texts))
    for text, row, real in zip(texts, ids, mask, strict=True):
        length = int(real.sum())
        assert real.tolist() == [1] * length + [0] * (len(real) - length)
        assert row[:length].tolist() == TOKENIZER.encode(text)
        assert (row[length:] == TOKENIZER.pad_token_id).all()
        assert TOKENIZER.decode(row) == text  # special tokens are left out


@settings(deadline=None)
@given(st.lists(st.integers(-2, 257)))
def test_any_ids_decode_to_text(ids: list[int]) -> None:
    assert TOKENIZER.decode(ids) == bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")


@pytest.mark.parametrize("ids", [[258], [65, 300]])
def test_ids_out_of_range(ids: list[int]) -> None:
    with pytest.raises(TensorError, match=r"expected ids in 0 … 257, got"):
        TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ab\xff", "byte 0xff at position 2"),
        (b"\xe2\x82", "byte 0xe2 at position 0"),
        ("a\ud800", "lone surrogate U\\+D800 at position 1"),
    ],
)
def test_what_is_no_utf8(text: str | bytes, message: str) -> None:
    for read in (utf8, TOKENIZER.encode, lambda t: TOKENIZER.encode_batch(["fine", t])):
        with pytest.raises(PromptError, match=message) as error:
            read(text)
        assert "\n" not in str(error.value)


def test_an_empty_batch() -> None:
    with pytest.raises(PromptError, match="expected at least one text, got none"):
        TOKENIZER.encode_batch([])
    with pytest.raises(PromptError, match="expected at least one text, got none"):
        TOKENIZER.pad([])
