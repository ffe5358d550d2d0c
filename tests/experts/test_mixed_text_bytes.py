"""Lengths and shares of mixed texts are of bytes, whatever the alphabet."""

import numpy as np
import pytest

from bayes_dispatch.experts.domains import CONVENTIONS, mixed_text
from bayes_dispatch.experts.domains.own import OwnText

GREEK = OwnText("greek", "μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος\n" * 400)


@pytest.mark.parametrize("length", [1, 16, 127, 300])
def test_bytes_are_counted(length: int) -> None:
    text, shares = mixed_text([GREEK, CONVENTIONS[0]], [0.5, 0.5], np.random.default_rng(length), length, "train")
    size = len(text.encode())
    assert length - 3 <= size <= length  # the end may cut a character
    of_greek = sum(len(character.encode()) for character in text if ord(character) > 127)
    assert of_greek / length <= shares[0] + 0.05
    assert shares.sum() == pytest.approx(1)
