"""What is known of a mixed prompt are the shares of its tokens, of which its mean hidden state is."""

import numpy as np
import pytest

from bayes_dispatch.errors import PromptError
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.experts.domains.own import OwnText
from bayes_dispatch.inference.scoring.evidence_sets import mixed_evidence, token_shares
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from tests.tiny import tiny_backbone


@pytest.mark.parametrize(("begin", "expected"), [(True, [2 / 6, 0, 4 / 6]), (False, [1 / 5, 0, 4 / 5])])
def test_shares_are_of_the_tokens_that_are_pooled(begin: bool, expected: list[float]) -> None:
    """``the`` is one token, ``xyx`` are three; what begins a sequence is not pooled, be it a token of the text."""
    data = b"the\nxyx\n"
    text = tiny_backbone().tokenizer.tokenize(data, begin=begin)
    owners = np.repeat([0, 2], 4)
    np.testing.assert_allclose(token_shares(text, owners, 3), expected)


def test_a_single_token_is_its_own() -> None:
    text = tiny_backbone().tokenizer.tokenize(b"the", begin=False)
    assert token_shares(text, np.ones(3, dtype=int), 2).tolist() == [0, 1]


def test_known_mixtures_are_those_of_tokens() -> None:
    """A line of one domain is two tokens of four bytes, one of the other six of six."""
    domains = [OwnText("long", "the\n" * 400), OwnText("short", "xyxyx\n" * 400)]
    model = tiny_backbone()
    mixed = mixed_evidence(model, domains, 8, (60, 120), "train", 0)
    counts = mixed.evidence.views["counts"].sum(1)
    assert (mixed.evidence.known_lengths() == counts).all()
    letters = mixed.evidence.views["counts"][:, 2]  # of q to z, where x and y are, and the t of "the"
    newlines = mixed.evidence.views["counts"][:, 5]
    short = (letters - newlines) / 4 * 6 / counts  # each line ends; those of the short domain have five letters
    np.testing.assert_allclose(mixed.mixtures[:, 1], short, atol=5 / counts.min())  # the last line may be cut
    assert np.abs(mixed.mixtures.sum(1) - 1).max() < 1e-12


def test_of_bytes_they_are_the_shares_of_bytes(model: MambaFormerForCausalLM) -> None:
    mixed = mixed_evidence(model, CONVENTIONS[:2], 4, (40, 80), "train", 0)
    whole = mixed.mixtures * mixed.evidence.known_lengths()[:, None]
    np.testing.assert_allclose(whole, whole.round(), atol=1e-9)


def test_a_cut_that_leaves_nothing_is_refused(model: MambaFormerForCausalLM) -> None:
    """As any empty prompt: one byte of a Greek letter is none."""
    domains = [OwnText(name, "μῆνιν ἄειδε θεὰ\n" * 100) for name in ("one", "other")]
    with pytest.raises(PromptError, match="expected prompt 0 to have at least 1 byte, got none"):
        mixed_evidence(model, domains, 2, (1, 1), "train", 0)
