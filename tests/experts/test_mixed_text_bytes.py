"""Lengths and shares of mixed texts are of bytes, whatever the alphabet."""

from string import ascii_lowercase

import numpy as np
import pytest

from bayes_dispatch.experts.domains import CONVENTIONS, mixed_text
from bayes_dispatch.experts.domains.own import OwnText

GREEK = OwnText("greek", "μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος\n" * 400)


@pytest.mark.parametrize("length", [1, 16, 127, 300])
def test_bytes_are_counted(length: int) -> None:
    """Each line is of one domain alone, those of the other begin with a letter; the end may cut a character."""
    text, shares = mixed_text([GREEK, CONVENTIONS[0]], [0.5, 0.5], np.random.default_rng(length), length, "train")
    size = len(text.encode())
    assert length - 3 < size <= length
    greek = [line for line in text.splitlines(keepends=True) if line[0] not in ascii_lowercase]
    of_greek = sum(len(line.encode()) for line in greek)
    assert of_greek <= length * shares[0] <= of_greek + length - size
    assert shares.sum() == pytest.approx(1)
