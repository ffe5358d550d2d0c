"""The likelihood of answers is that of one pair and one particle at a time, also by layer; batches do not matter, and
its gradient is right. Bad pairs, shapes and models are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import ForeignExpertError, PromptError, TensorError
from bayes_dispatch.inference.few_shot import answers
from bayes_dispatch.inference.few_shot.answers import AnswerLikelihood

PAIRS = [("kfpa>", "apfk\n"), ("", "37+58=95"), ("ß>", "é")]


def one_by_one(model: Any, bank: Any, weights: torch.Tensor) -> float:
    """The log-likelihood of all answers, pair by pair without padding."""
    total = 0.0
    adaptation = bank.blend(weights) if weights.ndim == 1 else bank.blend_by_matrix(weights)
    for prompt, answer in PAIRS:
        row = [256, *prompt.encode(), *answer.encode()]
        logs = model(torch.tensor([row]), adaptation=adaptation).logits[0].log_softmax(-1)
        first = 1 + len(prompt.encode())
        total += sum(float(logs[t - 1, row[t]]) for t in range(first, len(row)))
    return total


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), particles=st.integers(1, 5))
def test_equals_one_by_one(model64: Any, bank: Any, seed: int, particles: int) -> None:
    likelihood = AnswerLikelihood(model64, bank, PAIRS)
    weights = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(4), particles))
    with torch.no_grad():
        found = likelihood(weights)
        expected = [one_by_one(model64, bank, each) for each in weights]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["llama64", "hybrid64"])
def test_answers_are_in_the_tokens_of_the_model(request: pytest.FixtureRequest, name: str) -> None:
    """Ids of bytes would be valid in its vocabulary, too, and mean something else."""
    system = request.getfixturevalue(name)
    weights = torch.tensor([[0.2, 0.3, 0.1, 0.4]], dtype=torch.double)
    expected = []
    for prompt, answer in PAIRS:
        asked = system.tokenizer.tokenize(prompt).ids
        row = [*asked, *system.tokenizer.tokenize(answer, begin=False).ids]
        with torch.no_grad():
            session = system.model.open(1, len(row), system.experts.blend(weights))
            said = session.read(torch.tensor([row]), own=True).own
        expected.append(float(said[0, len(asked) :].sum()))
    with torch.no_grad():
        found = AnswerLikelihood(system.model, system.experts, PAIRS).by_pair(weights)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_refuses_more_tokens_than_the_model_can_read(llama64: Any) -> None:
    longest = llama64.model.longest
    with pytest.raises(PromptError, match=f"^expected pair 1 to have at most {longest} tokens, got "):
        AnswerLikelihood(llama64.model, llama64.experts, [PAIRS[0], ("#" * longest, "a")])


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_by_layer_equals_one_by_one(model64: Any, bank: Any, seed: int) -> None:
    likelihood = AnswerLikelihood(model64, bank, PAIRS)
    count = len(likelihood.layers)
    assert count == len(model64.blocks)
    weights = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(4), (3, count)))
    matrices = [likelihood.layers.index(".".join(name.split(".")[:2])) for name in bank.matrices]
    with torch.no_grad():
        expected = [one_by_one(model64, bank, each[matrices]) for each in weights]
        np.testing.assert_allclose(likelihood(weights).numpy(), expected, rtol=1e-9)
        shared = weights[:, :1].expand(-1, count, -1)
        np.testing.assert_allclose(likelihood(shared).numpy(), likelihood(weights[:, 0]).numpy(), rtol=1e-9)


@pytest.mark.parametrize("tokens_at_once", [1, 70, 16384])
def test_what_runs_together_is_alike_and_fits(
    model64: Any, bank: Any, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    """Pairs of any lengths, in any order: half of what runs is real. One row alone may be too long, and runs."""
    pairs, runs, whole = [("x" * n, "y") for n in (3, 60, 3, 5, 130, 4, 1)], [], type(model64).score

    def counted(self: Any, ids: torch.Tensor, tokens: torch.Tensor, adaptation: Any) -> torch.Tensor:
        runs.append((ids.numel(), int(tokens.sum()), len(ids)))
        return whole(self, ids, tokens, adaptation)

    weights = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(4), 3))
    with torch.no_grad():
        expected = torch.cat([AnswerLikelihood(model64, bank, [pair]).by_pair(weights) for pair in pairs], 1)
        monkeypatch.setattr(answers, "TOKENS_AT_ONCE", tokens_at_once)
        monkeypatch.setattr(type(model64), "score", counted)
        found = AnswerLikelihood(model64, bank, pairs).by_pair(weights)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-9)
    assert sum(real for _, real, _ in runs) == 3 * sum(len(prompt) + 2 for prompt, _ in pairs)
    assert all(run <= 2 * real for run, real, _ in runs)
    assert all(run <= tokens_at_once or rows == 1 for run, _, rows in runs)


def test_batches_do_not_matter(model64: Any, bank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood = AnswerLikelihood(model64, bank, PAIRS)
    weights = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(4), 7))
    with torch.no_grad():
        whole = likelihood(weights)
        monkeypatch.setattr(answers, "TOKENS_AT_ONCE", 80)
        np.testing.assert_allclose(likelihood(weights).numpy(), whole.numpy(), rtol=1e-12)


def test_gradient(model64: Any, bank: Any) -> None:
    likelihood = AnswerLikelihood(model64, bank, PAIRS[:1])
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(likelihood, (weights,))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "at least one pair"),
        ([("a", "")], "pair 0 to have an answer"),
        ([("a", "b"), ("a",)], "pair 1 to be a prompt and an answer"),
        ([("a", 3)], "pair 0 to be a prompt and an answer"),
        ([("a" * 4096, "b")], "at most 4096 bytes"),
        ([("a", b"\xff")], "pair 0: expected UTF-8"),
    ],
)
def test_refuses_bad_pairs(model: Any, bank: Any, pairs: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        AnswerLikelihood(model, bank, pairs)


@pytest.mark.usefixtures("unchecked")
def test_refuses_other_shapes_and_models(model: Any, bank: Any, make_model: Any) -> None:
    likelihood = AnswerLikelihood(model, bank, PAIRS)
    with pytest.raises(TensorError, match=r"expected weights of shape \(P, 4\) or"):
        likelihood(torch.ones(2, 3))
    with pytest.raises(TensorError, match="got"):
        likelihood(torch.ones(2, 9, 4))
    with pytest.raises(ForeignExpertError):
        AnswerLikelihood(make_model(seed=7), bank, PAIRS)
