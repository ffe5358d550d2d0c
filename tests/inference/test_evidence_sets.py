"""What is known of a mixed prompt are the shares of its tokens, of which its mean hidden state is."""

import numpy as np
import pytest
import torch

from bayes_dispatch.errors import PromptError
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.experts.domains.own import OwnText
from bayes_dispatch.inference.scoring.evidence_sets import (
    evidence_of_texts,
    mixed_evidence,
    prompts_of_several,
    pure_evidence,
    token_shares,
)
from bayes_dispatch.inference.two_pass.first_pass import first_pass
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


def test_no_text_is_in_two_prompts_of_several(model: MambaFormerForCausalLM) -> None:
    """Each begins with a name of its own. Of bytes, shares are those of letters, but for the lines' ends."""
    texts = [
        [f"<{letter}{n}>" + letter * (20 + n) for n in range(count)]
        for letter, count in zip("xyz", (9, 6, 6), strict=True)
    ]
    prompts, shares = prompts_of_several(model, texts, 100, 0)
    assert 21 - 6 <= sum(prompt.count("<") for prompt in prompts) <= 21
    assert max("".join(prompts).count(text[:4]) for own in texts for text in own) == 1
    assert {prompt.count("<") for prompt in prompts} == {2, 3}
    assert max(map(len, prompts)) <= 28 + 4 + 3 + 2
    for prompt, row in zip(prompts, shares, strict=True):
        lines = {
            next(which for which, letter in enumerate("xyz") if letter in line): len(line)
            for line in prompt.split("\n")
        }
        expected = [lines.get(which, 0) / len(prompt) for which in range(3)] + [0]
        np.testing.assert_allclose(row, expected, atol=2 / len(prompt))
    assert prompts_of_several(model, texts, 3, 0)[0] == prompts[:3]
    assert len(prompts_of_several(model, texts[:1], 3, 0)[0]) == 0


def test_each_text_is_one_prompt(model: MambaFormerForCausalLM) -> None:
    texts = [["abcdefgh", "é" * 8], ["1+2=3"]]
    known = evidence_of_texts(model, texts, 9, 0, (100, 100), 0)
    assert known.labels.tolist() == [0, 0, 1]
    whole = first_pass(model, model.tokenizer, [*texts[0], *texts[1]]).evidence
    np.testing.assert_array_equal(known.evidence.views["hidden"], whole.views["hidden"])
    assert evidence_of_texts(model, texts, 1, 5, (1, 1), 0).labels.tolist() == [0, 1, -1]


@pytest.mark.parametrize("kind", ["pure", "mixed", "texts"])
def test_no_prompt_is_longer_than_the_model_reads(kind: str) -> None:
    """Of 512 tokens, of which the first begins the text, and is not counted."""
    model, lengths = tiny_backbone(dtype=torch.float32), (700, 900)
    domains = [OwnText(name, f"{name} μῆνιν ἄειδε θεὰ\n" * 200) for name in ("one", "other")]
    if kind == "texts":
        known = evidence_of_texts(model, [[each.text] for each in domains], 1, 1, lengths, 0)
    else:
        make = pure_evidence if kind == "pure" else mixed_evidence
        known = make(model, domains, 2, lengths, "train", 0)
    assert 500 < known.evidence.known_lengths().max() <= 511
