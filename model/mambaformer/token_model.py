"""Blocks over token embeddings: what language models, classifiers and feature extractors begin with."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.blocks import BlockStack
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.mixers import Memory
from bayes_dispatch.model.mambaformer.padding import Padding, check_padding
from bayes_dispatch.model.mambaformer.svd.embedding import EMBEDDING

__all__ = ["TokenModel", "check_ids"]


class TokenModel(BlockStack):
    """An embedding, the blocks, and a normalisation."""

    def __init__(self, backbone: MambaFormerConfig, vocab_size: int) -> None:
        super().__init__(backbone, vocab_size=vocab_size)
        self.vocab_size = vocab_size

    def read(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None,
        cache: Cache | None,
        adaptation: Adaptation | None,
        memory: Memory | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Padding]:
        """The last hidden states, normalised, where the tokens stand; and where padding does.

        Raises:
            TensorError, CacheFullError, StaleCacheError: see ``MambaFormerForCausalLM``.
        """
        adaptation = adaptation or Adaptation.identity()
        self._check_adaptation(adaptation, input_ids.shape[0])
        x, padding = self._embed(input_ids, attention_mask, cache, adaptation)
        return padding.restore(self._run(x, padding, cache, adaptation, memory)), padding

    def below(
        self,
        block: int,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The hidden states that come into ``block``; ``cache`` is of ``init_cache(…, blocks=range(block))``.

        Raises:
            TensorError, CacheFullError, StaleCacheError: see ``MambaFormerForCausalLM``.
        """
        identity = Adaptation.identity()
        x, padding = self._embed(input_ids, attention_mask, cache, identity)
        if block == 0:
            return padding.restore(x)
        return padding.restore(self._run(x, padding, cache, identity, stretch=self._stretch(range(block))))

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, adaptation: Adaptation
    ) -> tuple[Float[Tensor, "B T D"], Padding]:
        """Embeddings of tokens, which are checked, right-padded; the caller has checked the scales."""
        check_ids(input_ids, self.vocab_size)
        padding = check_padding(attention_mask, input_ids, at_least=1 if cache is None else 0)
        return self.embedding(padding.to_right(input_ids.long()), adaptation.of(EMBEDDING), self.dtype), padding

    def step(self, tokens: Int[Tensor, " B"], cache: Cache, adaptation: Adaptation) -> Float[Tensor, "B D"]:
        """What ``read`` gives for one more token of each row, with nothing checked: for loops that have done so.

        ``cache`` is of this model as it is and has room, ``adaptation`` is the one that filled it.
        """
        weights = self._fingerprint.key
        x = self.embedding(tokens[:, None], adaptation.of(EMBEDDING, weights), self.dtype)
        return self.advance(x, None, cache, adaptation, weights=weights)[:, 0]


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ``TensorError`` unless these are (B, T) tokens of the vocabulary, at least one."""
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
        raise TensorError(f"expected input_ids of shape (B, T) with B, T >= 1, got {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TensorError(f"expected integer input_ids, got {input_ids.dtype}")
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise TensorError(f"expected input_ids in 0 … {vocab_size - 1}, got {low} … {high}")
