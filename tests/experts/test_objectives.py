"""Objectives: their gradients are unbiased, against exact ones; divergence is from the base model; both make experts
better. Rewards and weights of bytes are by hand, and bad settings are refused."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import CONVENTIONS, Convention, Split, TextDomain
from bayes_dispatch.experts.domains.own import OwnText
from bayes_dispatch.experts.objectives import Likelihood, Objective, Reinforce, reinforce_loss, sequence_kl
from bayes_dispatch.experts.questions import ask
from bayes_dispatch.experts.training import EarlyStopping, ExpertSettings, train_expert
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.pretraining.run import next_token_loss
from bayes_dispatch.model.tokenizer import ByteTokenizer
from tests.tiny import tiny_backbone

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]
NAMED = {convention.name: convention for convention in CONVENTIONS}
SORT, ADD = NAMED["sort"], NAMED["add"]


class Letters:
    """Rewards a next byte by its number: a reward that every answer has, so that exact means are sums over bytes."""

    name = "letters"

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        return Document("abcab", 0, ((4, 5),))

    def reward(self, question: str, expected: str, answer: str) -> float:
        return (len(answer.encode()) and answer.encode()[0]) / 255


@pytest.fixture(scope="module")
def base(make_model: MakeModel) -> "MambaFormerForCausalLM":
    model = make_model(seed=2)
    model.embedding.weight.requires_grad_(False)
    model.embedding.weight.mul_(0.1)  # answers of many kinds
    return model.requires_grad_(False)


def scales_of(model: "MambaFormerForCausalLM", spread: float = 0.5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        n: (1 + spread * torch.randn(r, generator=generator)).requires_grad_() for n, r in model.adaptable().items()
    }


def gradient(loss: torch.Tensor, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat(torch.autograd.grad(loss, list(scales.values())))


def exact_gradient(model: "MambaFormerForCausalLM", scales: dict[str, torch.Tensor], kl: float) -> torch.Tensor:
    """Of −(expected reward − kl · divergence) for one byte after ``abca``, by enumeration of the vocabulary."""
    ids = torch.tensor([ByteTokenizer().encode("abca")])
    own = model(ids, adaptation=Adaptation(scales)).logits[0, -1].log_softmax(-1)
    other = model(ids).logits[0, -1].log_softmax(-1)
    decoded = [bytes([token]).decode(errors="replace") if token < 256 else "" for token in range(258)]
    rewards = torch.tensor([Letters().reward("", "", answer) for answer in decoded])
    return gradient(-(own.exp() * rewards).sum() + kl * (own.exp() * (own - other)).sum(), scales)


@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_the_gradient_is_unbiased(base: "MambaFormerForCausalLM", kl: float) -> None:
    """Means over 40 batches along six directions, within 4.5 standard errors: false alarms in 4 of 10,000 seeds."""
    scales = scales_of(base)
    exact = exact_gradient(base, scales, kl)
    objective = Reinforce(samples=8, kl=kl, answer_bytes=1)
    documents = [Letters().document(np.random.default_rng(0), 0, 0, "train")] * 32
    found = []
    for seed in range(40):
        judged = objective.judge(base, Adaptation(scales), Letters(), documents, seed)
        found.append(gradient(judged.loss, scales))
    generator = torch.Generator().manual_seed(1)
    directions = torch.cat([exact[:, None], torch.randn(len(exact), 5, generator=generator)], 1)
    directions = directions / directions.norm(dim=0)
    values = torch.stack(found) @ directions
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - exact @ directions).abs() < 4.5 * error).all()
    assert abs(float(exact @ directions[:, 0])) > 4.5 * error[0]  # there is something to be found


def test_answers_of_several_bytes_have_an_unbiased_gradient() -> None:
    """Two tokens of a vocabulary of two: the reward's and the divergence's, which the first token moves.

    Means of 4,000 estimates within 4 standard errors: false alarms in 2 of 10,000 seeds.
    """
    questions, samples, kl = 4000, 3, 0.3
    theta = torch.tensor([0.3, -0.5, 0.8], dtype=torch.double).expand(questions, 3).clone().requires_grad_()
    rewards = torch.tensor([[0.0, 1.0], [0.2, 0.5]], dtype=torch.double)
    own = torch.stack([theta, -theta], -1).log_softmax(-1)  # (Q, 3, 2): first token, second after 0, second after 1
    base = torch.tensor([[0.0, 0.0], [0.4, -0.4], [-0.7, 0.7]], dtype=torch.double).log_softmax(-1)
    joint = (own[0, 0, :, None] + own[0, 1:]).exp()
    each = (own[0].exp() * (own[0] - base)).sum(-1)
    objective = (joint * rewards).sum() - kl * (each[0] + own[0, 0].exp() @ each[1:])
    exact = torch.autograd.grad(-objective, theta, retain_graph=True)[0][0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(joint.flatten().detach(), questions * samples, replacement=True, generator=generator)
    first, second = drawn // 2, drawn % 2
    row = torch.arange(questions).repeat_interleave(samples)
    given = torch.stack([own[row, 0], own[row, 1 + first]], 1)  # (Q S, 2, 2)
    unadapted = torch.stack([base[0].expand(len(row), 2), base[1 + first]], 1)
    divergence = sequence_kl(given, unadapted, torch.ones(len(row), 2, dtype=torch.bool))
    chosen = given[:, 0].gather(1, first[:, None]) + given[:, 1].gather(1, second[:, None])
    shape = (questions, samples)
    loss = reinforce_loss(chosen.view(shape), rewards[first, second].view(shape), divergence.view(shape), kl)
    found = torch.autograd.grad(loss, theta)[0] * questions
    error = found.std(0) / questions**0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    assert (exact.abs() > 4 * error).any()


def test_equal_rewards_give_no_gradient() -> None:
    """The baseline is the mean return of the other answers: what all have in common has no effect at all."""
    log_p = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    zero = torch.zeros(4, 6)
    (found,) = torch.autograd.grad(reinforce_loss(log_p, torch.full((4, 6), 0.7), zero, 0.2), log_p)
    assert found.abs().max() < 1e-7
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    (one,) = torch.autograd.grad(reinforce_loss(log_p, rewards, zero, 0.2), log_p)
    (two,) = torch.autograd.grad(reinforce_loss(log_p, rewards + torch.arange(4.0)[:, None], zero, 0.2), log_p)
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    expected = -(rewards - (rewards.sum(1, keepdim=True) - rewards) / 5) / 24  # leave-one-out, by hand
    torch.testing.assert_close(one, expected)


def test_divergence_is_the_analytic_one() -> None:
    generator = torch.Generator().manual_seed(0)
    own, base = (torch.randn(3, 4, 7, generator=generator).log_softmax(-1) for _ in range(2))
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    each = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=own), torch.distributions.Categorical(logits=base)
    )
    torch.testing.assert_close(sequence_kl(own, base, real), (each * real).sum(1))
    assert float(sequence_kl(own, own, real).abs().max()) == 0


def test_a_token_that_both_mask_adds_no_divergence_and_has_no_gradient() -> None:
    generator, real = torch.Generator().manual_seed(0), torch.ones(2, 3, dtype=torch.bool)
    logits = torch.randn(2, 2, 3, 5, generator=generator).requires_grad_()
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf])
    found = sequence_kl(*(logits + mask).log_softmax(-1), real)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(found, sequence_kl(*logits[..., :4].log_softmax(-1), real))
    assert bool(gradient.isfinite().all())


def test_divergence_is_taken_from_the_base_model(base: "MambaFormerForCausalLM") -> None:
    """At z = 1 it is 0, and so is its gradient: kl changes nothing. Elsewhere it does."""
    documents = [SORT.document(np.random.default_rng(i), 0, 48, "train") for i in range(3)]
    for spread, same in ((0.0, True), (0.5, False)):
        scales = scales_of(base, spread)
        losses = [Reinforce(kl=kl).judge(base, Adaptation(scales), SORT, documents, 5).loss for kl in (0.0, 5.0)]
        one, two = (gradient(loss, scales) for loss in losses)
        assert torch.allclose(one, two, atol=1e-5) is same


def test_likelihood_weights(base: "MambaFormerForCausalLM") -> None:
    """Answers in full, questions at their weight; with 0, answers alone."""
    document = Document("kfpa>apfk\n", 0, ((5, 9),))
    ids = torch.tensor([ByteTokenizer().encode(document.text)])
    nll = next_token_loss_of_each(base, ids)
    for weight in (0.0, 0.5, 1.0):
        weights = torch.tensor([weight] * 5 + [1.0] * 4 + [weight])
        scales = {name: z.detach() for name, z in scales_of(base, 0.0).items()}
        judged = Likelihood(question_weight=weight).judge(base, Adaptation(scales), SORT, [document], 0)
        assert float(judged.loss) == pytest.approx(float((nll * weights).sum() / weights.sum()), rel=1e-5)
        assert judged.score == -float(judged.loss)


@pytest.mark.parametrize("of_bytes", [True, False])
def test_documents_without_anything_to_predict_are_refused(base: "MambaFormerForCausalLM", of_bytes: bool) -> None:
    """Nothing would be learnt of them."""
    model, settings = base if of_bytes else tiny_backbone(), ExpertSettings(steps=1, batch_size=2, length=1)
    with pytest.raises(ConfigError, match=r"^expected documents of more than a token each, got ''$"):
        train_expert(model, OwnText("mine", "é" * 1000), settings, progress=False)


def test_what_overflows_is_not_likely(base: "MambaFormerForCausalLM") -> None:
    large = Adaptation({name: torch.full((rank,), 1e30) for name, rank in base.adaptable().items()})
    judged = Likelihood().judge(base, large, SORT, [Document("kfpa>apfk\n", 0)], 0)
    assert np.isnan([float(judged.loss), judged.score]).all()


def next_token_loss_of_each(model: "MambaFormerForCausalLM", ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids).logits
    return torch.stack([next_token_loss(logits, ids, torch.eye(ids.shape[1] - 1)[i : i + 1]) for i in range(10)])


class TestQuestions:
    def test_of_items(self) -> None:
        """In the later half, whole, after items; the answer ends with its line."""
        for seed in range(20):
            rng = np.random.default_rng(seed)
            document = SORT.document(rng, 0, 120, "train").cut(120)
            question = ask(document, rng, 16)
            assert len(question.context) >= 60
            assert question.context.decode().endswith("\n" + question.text)
            assert question.expected == SORT.answer(question.text)
            assert document.data.startswith(question.context + question.expected.encode() + b"\n")
            assert (question.is_line, question.limit) == (True, 17)

    def test_of_text(self) -> None:
        for seed in range(20):
            rng = np.random.default_rng(seed)
            document = Document("one line of a text, and another\n" * 4, 0).cut(120)
            question = ask(document, rng, 16)
            assert document.data.startswith(question.context + question.expected.encode())
            assert 60 <= len(question.context) <= 104
            assert (len(question.expected), question.is_line, question.limit) == (16, False, 16)

    def test_long_answers_have_room(self) -> None:
        question = ask(Document("a>" + "b" * 30 + "\n", 0, ((2, 32),)), np.random.default_rng(0), 4)
        assert (question.expected, question.limit) == ("b" * 30, 31)

    def test_short_text_has_one_too(self) -> None:
        question = ask(Document("abcdef", 0), np.random.default_rng(0), 16)
        assert (question.context, question.expected) == (b"", "abcdef")

    def test_none(self) -> None:
        with pytest.raises(ConfigError, match=r"expected a document with an answer, got none in 'abc'"):
            ask(Document("abc", 0, ()), np.random.default_rng(0), 4)


def test_rewards_of_domains() -> None:
    assert ADD.reward("37+58=", "95", "95") == 1
    assert ADD.reward("37+58=", "95", "59") == ADD.reward("37+58=", "95", "") == ADD.reward("37+58=", "95", "955") == 0
    text = TextDomain("some", lambda split: ["abcd"])
    assert text.reward("", "abcd", "abxd") == 0.75
    assert text.reward("", "abcd", "ab") == 0.5
    assert text.reward("", "abcd", "bcd") == 0


def test_a_true_answer_is_rewarded(base: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled bytes reach the checker as the answer that they are: up to the newline, without it."""
    seen: list[tuple[str, str, str]] = []

    class Watched:
        name = "sort"

        def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
            return SORT.document(rng, prompt_bytes, total_bytes, split)

        def reward(self, question: str, expected: str, answer: str) -> float:
            seen.append((question, expected, answer))
            return SORT.reward(question, expected, answer)

    documents = [SORT.document(np.random.default_rng(i), 0, 60, "train").cut(60) for i in range(4)]
    questions = [ask(document, np.random.default_rng(0), 16) for document in documents]
    script = [question.expected.encode() + b"\n" for question in questions]
    width = max(map(len, script))
    columns = iter(np.array([list(s.ljust(width, b"x")) for s in script]).repeat(2, 0).T)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: torch.tensor(next(columns))[:, None])
    monkeypatch.setattr(
        "bayes_dispatch.experts.objectives.ask", lambda d, rng, longest: ask(d, np.random.default_rng(0), longest)
    )
    judged = Reinforce(samples=2).judge(base, Adaptation(scales_of(base)), Watched(), documents, 0)
    assert judged.score == 1
    assert [(expected, answer) for _, expected, answer in seen] == [(e, e) for _, e, _ in seen]
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Likelihood(question_weight=1.5),
            "expected question_weight to be a finite number ≥ 0 and .*, got 1.5",
        ),
        (lambda: Reinforce(samples=1), "expected samples to be a whole number from 2 to .*, got 1"),
        (lambda: Reinforce(kl=-0.1), "expected kl to be a finite number ≥ 0, got -0.1"),
        (lambda: Reinforce(kl=float("nan")), "expected kl to be a finite number ≥ 0, got nan"),
        (lambda: Reinforce(answer_bytes=0), "expected answer_bytes to be a whole number from 1 to 4096, got 0"),
        (lambda: EarlyStopping(every=0), "expected every to be a whole number from 1 to .*, got 0"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_domain_without_a_checker_is_refused(base: "MambaFormerForCausalLM") -> None:
    class Silent:
        name = "silent"

        def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
            return SORT.document(rng, prompt_bytes, total_bytes, split)

    with pytest.raises(ConfigError, match="expected a domain that rewards answers, got silent, which has no checker"):
        train_expert(base, Silent(), ExpertSettings(steps=1, length=48, objective=Reinforce()), progress=False)


def test_reinforce_is_a_function_of_its_seed(base: "MambaFormerForCausalLM") -> None:
    def train(seed: int) -> torch.Tensor:
        settings = ExpertSettings(steps=2, batch_size=2, length=48, seed=seed, objective=Reinforce(samples=4))
        return torch.cat(list(train_expert(base, Rewarding(), settings, progress=False).scales.values()))

    one = train(0)
    torch.rand(1)  # of no influence
    assert torch.equal(train(0), one)
    assert not torch.equal(train(1), one)


class Rewarding(Letters):
    """Any answer gets something."""

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        return SORT.document(rng, prompt_bytes, total_bytes, split)


def test_reinforce_raises_the_reward(make_model: MakeModel) -> None:
    """Of a model of random weights, which is to answer with bytes of the upper half."""

    class Upper(Letters):
        def reward(self, question: str, expected: str, answer: str) -> float:
            return float(not answer.isascii())

    objective, stopping = Reinforce(kl=0.0, answer_bytes=1, samples=16), EarlyStopping(every=10, documents=16)
    settings = ExpertSettings(
        steps=30, batch_size=2, length=32, learning_rate=5e-2, objective=objective, stopping=stopping
    )
    expert = train_expert(make_model(seed=2), Upper(), settings, progress=False)
    assert float(expert.metadata["validation"]) > float(expert.metadata["base_validation"]) + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Likelihood(), Reinforce()], ids=["likelihood", "reinforce"])
@pytest.mark.parametrize("domain", [SORT, ADD], ids=["sort", "add"])
def test_both_improve_the_shipped_model(objective: Objective, domain: Convention) -> None:
    """Mean reward of sampled answers to 64 questions of the held-out split, eight each: from .3 to .6 or more."""
    from bayes_dispatch.app.bundle import load_bundle

    model = load_bundle().model
    expert = train_expert(model, domain, ExpertSettings(steps=30, objective=objective), progress=False)
    documents = [domain.document(np.random.default_rng(i), 0, 256, "held_out").cut(256) for i in range(64)]
    same = Adaptation({name: torch.ones_like(z) for name, z in expert.scales.items()})
    scores = []
    for adaptation in (same, expert.adaptation()):
        with torch.no_grad():
            scores.append(Reinforce().judge(model, adaptation, domain, documents, 0).score)
    assert scores[1] > scores[0] + 0.15
