"""How probable given answers are under blends of the experts: the likelihood of few-shot adaptation."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.errors import PromptError, TensorError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.model.backbone import Backbone, padded
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["MAX_PAIR_BYTES", "AnswerLikelihood", "check_pairs"]

MAX_PAIR_BYTES = 4096
TOKENS_AT_ONCE = 16384  # bounds memory: particles times pairs times their length


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
        self._ids, self._tokens = padded(rows, tokenizer.pad_token_id)
        places = torch.arange(self._ids.shape[1])
        begins = torch.tensor([max(1, len(ids)) for ids in asked])  # the very first token has no probability
        self._counted = (places >= begins[:, None]) & (places < self._tokens[:, None])
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
        pairs, length = self._ids.shape
        at_once = max(1, TOKENS_AT_ONCE // (pairs * length))
        return torch.cat([self._score(part) for part in weights.split(at_once)])

    def _score(self, weights: Tensor) -> Tensor:
        particles, pairs = len(weights), len(self._ids)
        adaptation = self.experts.blend_rows(weights.to(self.model.weights_dtype).repeat_interleave(pairs, 0))
        ids, tokens = self._ids.repeat(particles, 1), self._tokens.repeat(particles)  # (P pairs, T)
        said = self.model.score(ids, tokens, adaptation).double()
        counted = self._counted.repeat(particles, 1).to(said.device)
        return said.masked_fill(~counted, 0.0).sum(1).cpu().unflatten(0, (particles, pairs))


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
