"""How probable given answers are under blends of the experts: the likelihood of few-shot adaptation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayes_dispatch.errors import PromptError, TensorError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.model.backbone import Backbone, padded
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["MAX_PAIR_BYTES", "AnswerLikelihood", "check_pairs"]

MAX_PAIR_BYTES = 4096
TOKENS_AT_ONCE = 16384  # bounds memory: particles times the pairs that run together times the longest of them


class AnswerLikelihood:
    """``log p(answers | questions, w)`` of blend weights ``w``, many of them in one batch.

    Each pair is read by itself, from what begins a text of the model's tokenizer on; the tokens of its answer count.

    Args:
        model: a language model. experts: of that model. pairs: (prompt, answer) texts.

    Attributes:
        components: names of the K + 1 components, base last.
        layers: those of the experts (``ExpertBank.layers``).

    Raises:
        ForeignExpertError: the experts were made for another model.
        PromptError: no pairs, an empty answer, or a pair of more than ``MAX_PAIR_BYTES`` bytes, of more tokens than the
            model can read, or no UTF-8.
    """

    def __init__(self, model: Backbone, experts: ExpertBank, pairs: Sequence[tuple[str | bytes, str | bytes]]) -> None:
        experts.check_base(model)
        self.pairs = check_pairs(pairs)
        tokenizer = model.tokenizer
        self.model, self.experts, self.components = model, experts, experts.components
        asked = [tokenizer.tokenize(prompt).ids for prompt, _ in self.pairs]
        rows = [
            (*ids, *tokenizer.tokenize(answer, begin=False).ids)
            for ids, (_, answer) in zip(asked, self.pairs, strict=True)
        ]
        for index, row in enumerate(rows):
            if model.longest is not None and len(row) > model.longest:
                raise PromptError(f"expected pair {index} to have at most {model.longest} tokens, got {len(row)}")
        begins = [max(1, len(ids)) for ids in asked]  # the very first token has no probability
        self._batches = [_Batch.of(part, rows, begins, tokenizer.pad_token_id) for part in _alike(list(map(len, rows)))]
        self.layers = experts.layers

    @property
    def answer_bytes(self) -> int:
        """How many bytes the answers have."""
        return sum(len(answer) for _, answer in self.pairs)

    def __call__(self, weights: Float[Tensor, "P *layers components"]) -> Float[Tensor, " P"]:
        """Log-likelihood of all answers together, in nats, float64; differentiable.

        Args and errors are those of :meth:`by_pair`.
        """
        return self.by_pair(weights).sum(1)

    def by_pair(self, weights: Float[Tensor, "P *layers components"]) -> Float[Tensor, "P pairs"]:
        """Log-likelihood of each answer, in nats, float64; differentiable.

        Args:
            weights: (P, K + 1) for the same weights in every layer, or (P, layers, K + 1).

        Raises:
            TensorError: another number of components or layers.
        """
        expected = {(len(self.components),), (len(self.layers), len(self.components))}
        if tuple(weights.shape[1:]) not in expected:
            shapes = " or ".join(f"(P, {', '.join(map(str, shape))})" for shape in sorted(expected, key=len))
            raise TensorError(f"expected weights of shape {shapes}, got {tuple(weights.shape)}")
        scores = [
            torch.cat([self._score(batch, part) for part in weights.split(max(1, TOKENS_AT_ONCE // batch.ids.numel()))])
            for batch in self._batches
        ]
        order = torch.tensor([pair for batch in self._batches for pair in batch.pairs])
        return torch.cat(scores, 1)[:, order.argsort()]

    def _score(self, batch: "_Batch", weights: Tensor) -> Tensor:
        particles, pairs = len(weights), len(batch.ids)
        adaptation = self.experts.blend_rows(weights.to(self.model.weights_dtype).repeat_interleave(pairs, 0))
        ids, tokens = batch.ids.repeat(particles, 1), batch.tokens.repeat(particles)  # (P pairs, T)
        said = self.model.score(ids, tokens, adaptation).double()
        counted = batch.counted.repeat(particles, 1).to(said.device)
        return said.masked_fill(~counted, 0.0).sum(1).cpu().unflatten(0, (particles, pairs))


class _Batch(NamedTuple):
    """Pairs that run together.

    Attributes:
        pairs: their indices. ids: (pairs, T), of which ``tokens`` are real. counted: which are of the answers.
    """

    pairs: Sequence[int]
    ids: Int[Tensor, "pairs T"]
    tokens: Int[Tensor, " pairs"]
    counted: Bool[Tensor, "pairs T"]

    @classmethod
    def of(cls, pairs: Sequence[int], rows: Sequence[Sequence[int]], begins: Sequence[int], pad: int) -> "_Batch":
        """Some of ``rows``, whose answers begin at ``begins``."""
        ids, tokens = padded([rows[pair] for pair in pairs], pad)
        places, first = torch.arange(ids.shape[1]), torch.tensor([begins[pair] for pair in pairs])
        return cls(pairs, ids, tokens, (places >= first[:, None]) & (places < tokens[:, None]))


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Pairs that run together, by their lengths: at least half of what runs is real, and no more than may be."""
    batches: list[list[int]] = []
    for pair in sorted(range(len(lengths)), key=lambda pair: lengths[pair]):
        own, length = batches[-1] if batches else [], lengths[pair]
        if own and length <= 2 * lengths[own[0]] and (len(own) + 1) * length <= TOKENS_AT_ONCE:
            own.append(pair)
        else:
            batches.append([pair])
    return batches


def check_pairs(pairs: Sequence[tuple[str | bytes, str | bytes]]) -> list[tuple[bytes, bytes]]:
    """The pairs' bytes.

    Raises:
        PromptError: no pairs, something else than pairs of texts, an empty answer, or a pair that is too long or no
            UTF-8.
    """
    if not isinstance(pairs, Sequence) or not pairs:
        raise PromptError(f"expected a list of at least one pair of prompt and answer, got {pairs!r:.60}")
    checked = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(x, str | bytes) for x in pair):
            raise PromptError(f"expected pair {index} to be a prompt and an answer, got {pair!r:.60}")
        try:
            prompt, answer = utf8(pair[0]), utf8(pair[1])
        except PromptError as error:
            raise PromptError(f"pair {index}: {error}") from None
        if not answer or len(prompt) + len(answer) > MAX_PAIR_BYTES:
            got = f"{len(prompt)} and {len(answer)} bytes"
            most = f"at most {MAX_PAIR_BYTES} bytes with its prompt"
            raise PromptError(f"expected pair {index} to have an answer, and {most}, got {got}")
        checked.append((prompt, answer))
    return checked
