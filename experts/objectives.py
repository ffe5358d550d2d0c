"""What an expert is trained for: likelihood, or reward by REINFORCE, as Transformer² does (arXiv 2501.06252, eq. 2).

Both read documents like those that judge experts: items (or text) first, then what counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayes_dispatch.arguments import real, set_whole, whole
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Checked, Domain
from bayes_dispatch.experts.questions import Question, ask
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.backbone import Backbone, Read, Session, clipped, padded, token_weights
from bayes_dispatch.model.generation.decoding import divergence

__all__ = ["Judgement", "Likelihood", "Objective", "Reinforce", "reinforce_loss", "sequence_kl"]

LONGEST_ANSWER = 4096  # bytes


class Judgement(NamedTuple):
    """What to minimise, a scalar; and a score, the higher the better, by which the best scales are kept."""

    loss: Tensor
    score: float


@runtime_checkable
class Objective(Protocol):
    """What an expert is trained for; a frozen dataclass, whose fields are recorded with the expert."""

    def judge(
        self, model: Backbone, adaptation: Adaptation, domain: Domain, documents: Sequence[Document], seed: int
    ) -> Judgement:
        """Judge scales by some documents.

        Args:
            model: the base model, whose weights need no gradient. adaptation: the scales, shared by all rows.
            domain: where the documents are from. documents: a batch. seed: of what is random in it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Mean negative log-likelihood of a token, in nats; its negative is the score.

    A token weighs as much as its bytes do on average, however many it has. Tokens of our own model are bytes.

    Attributes:
        question_weight: loss weight of bytes that are not scored; above 0, so that every byte is evidence later. With 0
            only answers are learnt.

    Raises:
        ConfigError: a weight outside 0 … 1.
    """

    question_weight: float = 0.5

    def __post_init__(self) -> None:
        real("question_weight", self.question_weight, 0, 1)

    def judge(
        self, model: Backbone, adaptation: Adaptation, domain: Domain, documents: Sequence[Document], seed: int
    ) -> Judgement:
        """See ``Objective``; nothing is random.

        Raises:
            ConfigError: no document has a token to predict, as where each is cut within its first character.
        """
        documents = [_readable(model, document) for document in documents]
        texts = [model.tokenizer.tokenize(document.data) for document in documents]
        if max(len(text.ids) for text in texts) < 2:
            raise ConfigError(f"expected documents of more than a token each, got {documents[0].text!r:.60}")
        ids, tokens = padded([text.ids for text in texts], model.tokenizer.pad_token_id)
        weights = torch.zeros(ids.shape, dtype=torch.float32)
        for row, text, document in zip(weights, texts, documents, strict=True):
            row[: len(text.ids)] = token_weights(text, document.byte_weights(self.question_weight))
        weights[:, 0] = 0  # nothing is said of the first token
        said = model.score(ids, tokens, adaptation)
        total = float(weights.sum().clamp(min=1e-9))  # rows of one token alone weigh nothing
        weights = weights.to(said.device)
        loss = -(said.masked_fill(weights == 0, 0.0) * weights).sum() / total
        return Judgement(loss, -float(loss.detach()))


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Mean reward of sampled answers less a penalty on their divergence from the base model; the score is the reward.

    One question is asked for each document. Its gradient is estimated without bias: the return of an answer, its reward
    less ``kl`` times its divergence, is compared with the mean return of the other answers to the same question.

    Attributes:
        samples: answers to each question, at temperature 1. kl: weight of the divergence from the base model, in
            rewards per nat and answer. answer_bytes: of the answer that is asked for where a text has none of its own;
            a sampled one has at most as many tokens, and no fewer than the true one has bytes.

    Raises:
        ConfigError: fewer than two samples, or a setting that is negative or not finite.
    """

    samples: int = 8
    kl: float = 0.2
    answer_bytes: int = 16

    def __post_init__(self) -> None:
        set_whole(self, samples=2)  # each other's baseline
        real("kl", self.kl, 0)
        whole("answer_bytes", self.answer_bytes, 1, LONGEST_ANSWER)

    def judge(
        self, model: Backbone, adaptation: Adaptation, domain: Domain, documents: Sequence[Document], seed: int
    ) -> Judgement:
        """See ``Objective``.

        Raises:
            ConfigError: the domain has no checker, or the model reads no more than an answer.
        """
        if not isinstance(domain, Checked):
            raise ConfigError(f"expected a domain that rewards answers, got {domain.name}, which has no checker")
        rng = np.random.default_rng(seed)
        documents = [_readable(model, document, self.answer_bytes + 1) for document in documents]
        questions = [ask(document, rng, self.answer_bytes) for document in documents]
        reading = _Reading.of(model, questions, self.samples)
        fixed = adaptation.detached()
        tokens, real = reading.sample(fixed, torch.Generator().manual_seed(int(rng.integers(2**62))))
        own = reading.log_probabilities(adaptation, tokens)
        answers = tokens.tolist(), real.tolist()
        tokens, real = tokens.to(own.device), real.to(own.device)
        with torch.no_grad():
            base = reading.log_probabilities(Adaptation.identity(), tokens)
        asked = [question for question in questions for _ in range(self.samples)]
        rewards = [
            domain.reward(question.text, question.expected, reading.text(question, *row))
            for question, *row in zip(asked, *answers, strict=True)
        ]
        shape = (len(questions), self.samples)
        chosen = (own.gather(-1, tokens[..., None])[..., 0] * real).sum(1).view(shape)
        moved = sequence_kl(own, base, real).view(shape)
        reward = torch.tensor(rewards, dtype=own.dtype, device=own.device).view(shape)
        return Judgement(reinforce_loss(chosen, reward, moved, self.kl), float(reward.mean()))


def reinforce_loss(
    log_probabilities: Float[Tensor, "Q S"],
    rewards: Float[Tensor, "Q S"],
    divergence: Float[Tensor, "Q S"],
    kl: float,
) -> Float[Tensor, ""]:
    """A loss whose gradient is, on average, that of −(expected reward − kl · expected divergence) (Kool et al. 2019).

    Args:
        log_probabilities: of S sampled answers to each of Q questions. rewards: theirs.
        divergence: of each answer's tokens, summed: ``sequence_kl``. kl: its weight.
    """
    returns = (rewards - kl * divergence).detach()
    others = (returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1)
    return -((returns - others) * log_probabilities).mean() + kl * divergence.mean()


def sequence_kl(
    own: Float[Tensor, "R A V"], base: Float[Tensor, "R A V"], real: Bool[Tensor, "R A"]
) -> Float[Tensor, " R"]:
    """Divergence of ``own`` from ``base``, both log-probabilities, in nats: of each row, over its real tokens."""
    return (divergence(own, base) * real).sum(1)


class _Reading(NamedTuple):
    """Q contexts, each read once for all S answers to it.

    Attributes:
        model: what reads. ids: the contexts, (Q, T), of which (Q,) ``tokens`` are real. samples: S.
        limits: most tokens of each answer, (Q S,). ends: whether a newline ends it, (Q S,).
    """

    model: Backbone
    ids: Int[Tensor, "Q T"]
    tokens: Int[Tensor, " Q"]
    samples: int
    limits: Int[Tensor, " R"]
    ends: Bool[Tensor, " R"]

    @classmethod
    def of(cls, model: Backbone, questions: Sequence[Question], samples: int) -> "_Reading":
        texts = [model.tokenizer.tokenize(question.context).ids for question in questions]
        limits = torch.tensor([question.limit for question in questions]).repeat_interleave(samples)
        ends = torch.tensor([question.is_line for question in questions]).repeat_interleave(samples)
        ids, tokens = padded(texts, model.tokenizer.pad_token_id)
        if model.longest is not None:
            limits = limits.clamp(max=model.longest - ids.shape[1])
        return cls(model, ids, tokens, samples, limits, ends)

    @torch.no_grad()
    def sample(
        self, adaptation: Adaptation, generator: torch.Generator
    ) -> tuple[Int[Tensor, "R A"], Bool[Tensor, "R A"]]:
        """An answer for each of the Q S rows, and which of its tokens count."""
        log_p, session = self._prefill(adaptation, int(self.limits.max()))
        running = torch.ones_like(self.ends)
        tokens, real = [], []
        while True:
            drawn = torch.multinomial(log_p.exp().cpu(), 1, generator=generator)[:, 0]
            tokens.append(drawn)
            real.append(running)
            over = torch.tensor(["\n" in self.model.tokenizer.decode([token]) for token in drawn.tolist()])
            final = torch.tensor([token in self.model.tokenizer.ends for token in drawn.tolist()])
            running = running & ~(self.ends & over) & ~final & (len(tokens) < self.limits)
            if not bool(running.any()):
                return torch.stack(tokens, 1), torch.stack(real, 1)
            log_p = _after(session.read(drawn[:, None]))[:, 0]

    def log_probabilities(self, adaptation: Adaptation, tokens: Int[Tensor, "R A"]) -> Float[Tensor, "R A V"]:
        """What the model says of each token of the given answers, in one pass over all of them."""
        first, session = self._prefill(adaptation, tokens.shape[1])
        log_p, count = first[:, None], tokens.shape[1] - 1
        return torch.cat([log_p, _after(session.read(tokens[:, :-1], tail=count))], 1) if count else log_p

    def text(self, question: Question, tokens: list[int], real: list[bool]) -> str:
        """An answer, without the newline that ends it."""
        text = self.model.tokenizer.decode([token for token, counts in zip(tokens, real, strict=True) if counts])
        return text.partition("\n")[0] if question.is_line else text

    def _prefill(self, adaptation: Adaptation, room: int) -> tuple[Float[Tensor, "R V"], Session]:
        """Log-probabilities of the first token of each answer, and a session of the contexts for all of them."""
        session = self.model.open(len(self.ids), self.ids.shape[1] + room, adaptation)
        rows = torch.arange(len(self.ids)).repeat_interleave(self.samples)
        first = _after(session.read(self.ids, self.tokens))[rows.to(self.ids.device), 0]
        session.keep(rows.tolist())
        return first, session


def _readable(model: Backbone, document: Document, room: int = 0) -> Document:
    """As much of a document's beginning as the model reads with so many tokens after it.

    Raises:
        ConfigError: it reads no more than these.
    """
    if model.longest is None:
        return document
    if room >= model.longest:
        raise ConfigError(
            f"expected answers of fewer tokens than the {model.longest} that the model can read, got {room}"
        )
    text = clipped(model.tokenizer, document.text, model.longest - room)
    return document if text == document.text else document.cut(len(text.encode()))


def _after(read: Read) -> Float[Tensor, "R t V"]:
    assert read.after is not None
    return read.after
