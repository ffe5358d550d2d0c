"""Evidence is a property of the prompt: not of its neighbours, their order, or the batch. Its views are what they are
called; prompts are their bytes, and bad ones are refused."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import PromptError
from bayes_dispatch.inference.two_pass import first_pass as first_pass_module
from bayes_dispatch.inference.two_pass.first_pass import TOKEN_CLASSES, class_counts, depths_of, first_pass, surprise_of
from bayes_dispatch.inference.two_pass.prompts import check_prompts
from bayes_dispatch.model.backbone import Read
from bayes_dispatch.model.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

TOKENIZER = ByteTokenizer()
PROMPTS = [
    "kfpa>apfk\nbcde>",
    "37+58=95\n12+11=",
    "a",
    "naïve “prose”, 3 kinds",
    "x" * 40,
    "def mean(xs):\n    return ",
]


def assert_same(a: Any, b: Any, tolerance: float) -> None:
    assert list(a.views) == list(b.views) == ["hidden", "counts", "surprise"]
    for name in ("hidden", "surprise"):
        np.testing.assert_allclose(a.views[name], b.views[name], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(a.views["counts"], b.views["counts"])
    np.testing.assert_array_equal(a.lengths, b.lengths)


def test_hidden_is_the_mean_over_the_bytes(model64: "MambaFormerForCausalLM") -> None:
    evidence = first_pass(model64, TOKENIZER, PROMPTS).evidence
    for prompt, got in zip(PROMPTS, evidence.views["hidden"], strict=True):
        with torch.no_grad():
            ids = torch.tensor([[256, *prompt.encode()]])
            states = torch.cat([*(model64.below(d, ids) for d in depths_of(model64.depth)), model64(ids).hidden], -1)[0]
        np.testing.assert_allclose(got, np.mean([state.numpy() for state in states[1:]], axis=0), rtol=0, atol=1e-10)
    assert evidence.lengths is not None
    assert evidence.lengths.tolist() == [len(prompt.encode()) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("blocks", "depths"), [(1, ()), (2, (1,)), (3, (1, 2)), (4, (2, 3)), (5, (2, 4)), (15, (5, 10)), (30, (10, 20))]
)
def test_thirds_of_the_blocks_are_looked_at(blocks: int, depths: tuple[int, ...]) -> None:
    assert depths_of(blocks) == depths


def test_surprise_is_the_mean_nll_and_the_spread_of_the_hidden_states(model64: "MambaFormerForCausalLM") -> None:
    prompts = [*PROMPTS, "ab" * 300]  # the last one has more bytes than are normalised at once
    surprise = first_pass(model64, TOKENIZER, prompts).evidence.views["surprise"]
    for prompt, got in zip(prompts, surprise, strict=True):
        data = prompt.encode()
        with torch.no_grad():
            output = model64(torch.tensor([[256, *data]]))
        log_p = output.logits[0].log_softmax(-1).numpy()
        nll = -np.mean([log_p[t, byte] for t, byte in enumerate(data)])
        states = output.hidden[0, 1:].numpy()
        distances = ((states - states.mean(0)) ** 2).sum(1)
        floor = 0.01 * (states**2).sum(1).mean()
        np.testing.assert_allclose(got, [nll, np.log(max(distances.mean(), floor))], rtol=0, atol=1e-10)


def test_surprise_of_one_byte_is_finite_and_below_that_of_others(model: "MambaFormerForCausalLM") -> None:
    surprise = first_pass(model, TOKENIZER, ["a", "q", "ab", "q>"]).evidence.views["surprise"]
    assert np.isfinite(surprise).all()
    assert surprise[:2, 1].max() < surprise[2:, 1].min()


def test_nan_surprises_unless_nothing_is_said_there() -> None:
    """Of the first token, and of padding."""
    tokens, hidden = torch.tensor([3, 1, 4]), torch.ones(3, 4, 2)
    own = torch.full((3, 4), torch.nan)
    own[0, 1:3], own[2, 1:] = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, torch.nan, -1.0])
    np.testing.assert_allclose(surprise_of(Read(own, None, hidden), tokens)[:, 0], [1.5, 0.0, np.nan])


@pytest.mark.parametrize(("name", "tolerance"), [("model64", 1e-10), ("model", 1e-5)])
def test_a_batch_is_one_by_one_in_any_order(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str, tolerance: float
) -> None:
    model = request.getfixturevalue(name)
    together = first_pass(model, TOKENIZER, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        assert_same(first_pass(model, TOKENIZER, [prompt]).evidence, together.evidence.select([i]), tolerance)
    order = [4, 2, 0, 5, 1, 3]
    monkeypatch.setattr(first_pass_module, "PROMPTS_AT_ONCE", 2)
    shuffled = first_pass(model, TOKENIZER, [PROMPTS[i].encode() for i in order])
    assert_same(shuffled.evidence, together.evidence.select(order), tolerance)


def test_short_prompts_are_not_padded_to_a_long_one(
    model64: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of similar lengths run together; evidence comes in their own order."""
    prompts, read, shapes = ["ab>", "b" * 60, "c", "d" * 64, "efg"], first_pass_module._pooled, []

    def watched(model: Any, ids: Any, tokens: Any, cut: int) -> Any:
        shapes.append(tuple(ids.shape))
        return read(model, ids, tokens, cut)

    monkeypatch.setattr(first_pass_module, "_pooled", watched)
    monkeypatch.setattr(first_pass_module, "TOKENS_AT_ONCE", 130)
    evidence = first_pass(model64, TOKENIZER, prompts).evidence
    assert shapes == [(3, 4), (2, 65)]
    assert evidence.lengths.tolist() == [len(prompt) for prompt in prompts]


def test_different_prompts_give_different_evidence(model64: "MambaFormerForCausalLM") -> None:
    hidden = first_pass(model64, TOKENIZER, ["ab>", "ba>"]).evidence.views["hidden"]
    assert not np.allclose(hidden[0], hidden[1], atol=0.01)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_counts_are_counts(text: str) -> None:
    data = text.encode()
    expected = dict.fromkeys([*TOKEN_CLASSES, "other"], 0)
    for byte in data:
        expected[next((name for name, members in TOKEN_CLASSES.items() if byte in members), "other")] += 1
    assert class_counts(data, TOKENIZER.tokenize(data)).tolist() == list(expected.values())


def test_classes_do_not_overlap() -> None:
    members = [byte for members in TOKEN_CLASSES.values() for byte in members]
    assert len(members) == len(set(members))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4))
def test_good_prompts_are_their_bytes(prompts: list[str]) -> None:
    expected = [prompt.encode() for prompt in prompts]
    assert check_prompts(prompts) == check_prompts(expected) == expected


def test_the_longest_prompt() -> None:
    assert check_prompts(["é" * 5000]) == [("é" * 5000).encode()]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a single text", "expected a list of prompts, got a single str"),
        (b"bytes", "expected a list of prompts, got a single bytes"),
        ([], "expected at least one prompt, got none"),
        (["fine", ""], "expected prompt 1 to have at least 1 byte, got none"),
        ([b""], "expected prompt 0 to have at least 1 byte, got none"),
        (["fine", b"\xff\xfe"], "prompt 1: expected UTF-8 text, got byte 0xff at position 0"),
        (["\udc80"], "prompt 0: expected UTF-8 text, got the lone surrogate"),
        (["fine", 3], "expected prompt 1 to be text, got int"),
        ([None], "expected prompt 0 to be text, got NoneType"),
    ],
)
def test_bad_prompts(model: "MambaFormerForCausalLM", prompts: Sequence[Any], message: str) -> None:
    for read in (check_prompts, lambda p: first_pass(model, TOKENIZER, p)):
        with pytest.raises(PromptError, match=message) as error:
            read(prompts)
        assert "\n" not in str(error.value)
