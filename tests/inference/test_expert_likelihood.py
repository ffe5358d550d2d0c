"""Scores of a batch of experts are those of one expert and one prompt at a time; base's is the surprise of the first
pass. Bad prompts, experts of another model and those under which a model says NaN are refused."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.dispatcher.evidence.functions import LogLikelihoods, read
from bayes_dispatch.errors import ForeignExpertError, PromptError, TensorError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.two_pass import likelihood
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.inference.two_pass.likelihood import ExpertLogLikelihoods
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

PROMPTS = ["kfpa>apfk\nbcde>", "a", "naïve “prose”, 3 kinds", "x" * 40, "37+58=95\n12+11="]


@pytest.fixture(scope="module")
def bank64(make_bank: Callable[..., ExpertBank], model64: "MambaFormerForCausalLM") -> ExpertBank:
    return make_bank(model64)


@pytest.fixture(scope="module")
def score(model64: "MambaFormerForCausalLM", bank64: ExpertBank) -> ExpertLogLikelihoods:
    return ExpertLogLikelihoods(model64, bank64, ByteTokenizer())


def one_by_one(model: Any, bank: ExpertBank, prompt: str) -> list[float]:
    data, found = prompt.encode(), []
    for name in bank.components:
        scales = bank[name].scales if name in bank else {}
        adaptation = Adaptation({matrix: z.to(model.dtype) for matrix, z in scales.items()})
        with torch.no_grad():
            logits = model(torch.tensor([[256, *data]]), adaptation=adaptation).logits[0]
        log_p = logits.log_softmax(-1).numpy()
        found.append(float(np.mean([log_p[t, byte] for t, byte in enumerate(data)])))
    return found


@pytest.mark.parametrize("tokens_at_once", [1, 200, 8192])
def test_a_batch_is_one_by_one(
    score: ExpertLogLikelihoods, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", tokens_at_once)
    expected = [one_by_one(score.model, score.experts, prompt) for prompt in PROMPTS]
    np.testing.assert_allclose(score(PROMPTS), expected, rtol=0, atol=1e-10)
    order = [3, 0, 4, 2, 1]
    np.testing.assert_allclose(score([PROMPTS[i] for i in order]), score(PROMPTS)[order], rtol=0, atol=1e-10)


def test_base_is_the_surprise_of_the_first_pass(score: ExpertLogLikelihoods) -> None:
    surprise = first_pass(score.model, score.tokenizer, PROMPTS).evidence.views["surprise"]
    np.testing.assert_allclose(-score(PROMPTS)[:, -1], surprise[:, 0], rtol=0, atol=1e-10)


def test_an_empty_prompt_has_no_likelihood(score: ExpertLogLikelihoods) -> None:
    scores = score(["ab", "", "cd"])
    assert np.isnan(scores).all(1).tolist() == [False, True, False]
    np.testing.assert_allclose(scores[[0, 2]], score(["ab", "cd"]), rtol=0, atol=1e-10)
    assert np.isnan(score([""])).all()
    evidence = read([LogLikelihoods(score)], ["ab", "", "cd"])
    assert evidence.is_missing("log_likelihoods").tolist() == [False, True, False]


def test_bad_prompts(score: ExpertLogLikelihoods) -> None:
    with pytest.raises(PromptError, match="expected at least one prompt, got none"):
        score([])
    with pytest.raises(PromptError, match="expected a list of prompts, got a single str"):
        score("ab")
    with pytest.raises(PromptError, match="to have at most 32768 tokens, got 40001"):
        score(["a" * 40_000])


def test_experts_of_another_model(make_model: Callable[..., "MambaFormerForCausalLM"], bank64: ExpertBank) -> None:
    with pytest.raises(ForeignExpertError, match="expected experts made for base model"):
        ExpertLogLikelihoods(make_model(seed=5), bank64, ByteTokenizer())


def test_an_expert_under_which_the_model_overflows_is_no_certain_one(
    model: "MambaFormerForCausalLM", bank: ExpertBank
) -> None:
    scales = {name: torch.full((rank,), 1e30) for name, rank in model.adaptable().items()}
    broken = ExpertBank([*bank.values(), ExpertVector("large", scales, bank.base)])
    with pytest.raises(TensorError, match=r"^expected finite log-probabilities under large, got NaN or infinity$"):
        ExpertLogLikelihoods(model, broken, ByteTokenizer())(PROMPTS)
