"""A decoder beside what its encoder reads, as the loops of ``generate`` see it: a language model of its own tokens."""

from collections.abc import Callable, Sequence

from torch import Tensor

from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.generation import UncachedContinuation
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.mixers import Memory
from bayes_dispatch.model.mambaformer.padding import Padding

__all__ = ["ConditionedDecoder", "UncachedConditioned"]


class ConditionedDecoder:
    """A ``LanguageModel`` of rows that all begin together, so that none is padded.

    Args:
        encode: reads the input; called once, at the first ``read``.
        decode: hidden states (B, T, D) of tokens (B, T) that follow those in a cache, attending to a memory.
        logits, init_cache: the decoder's own.
    """

    def __init__(
        self,
        encode: Callable[[], Memory],
        decode: Callable[[Tensor, Padding, Cache | None, Memory | None, Adaptation], Tensor],
        logits: Callable[[Tensor], Tensor],
        init_cache: Callable[[int, int], Cache],
    ) -> None:
        self._encode, self._decode, self._logits, self._init_cache = encode, decode, logits, init_cache
        self._memory: Memory | None = None

    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, adaptation: Adaptation | None
    ) -> tuple[Tensor, Padding]:
        """Hidden states (B, T, D) of the decoder's tokens (B, T); ``attention_mask`` has no zeros here."""
        if self._memory is None:
            self._memory = self._encode()
        adaptation = adaptation or Adaptation.identity()
        return self._decode(input_ids, Padding(), cache, self._memory, adaptation), Padding()

    def step(self, tokens: Tensor, cache: Cache, adaptation: Adaptation) -> Tensor:
        """Hidden states (B, D) of one more token for each row; the cache holds what they attend to."""
        return self._decode(tokens[:, None], Padding(), cache, None, adaptation)[:, 0]

    def logits(self, hidden: Tensor, adaptation: Adaptation) -> Tensor:
        """Logits (B, T, V); the head is never adapted."""
        return self._logits(hidden)

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        return self._init_cache(batch_size, max_length)

    def reorder(self, rows: Sequence[int]) -> None:
        """Make the input of row ``rows[r]`` that of the new row r; a cache has its own of it."""
        if self._memory is not None:
            self._memory = self._memory.select(rows)


class UncachedConditioned(UncachedContinuation):
    """``UncachedContinuation`` of a ``ConditionedDecoder``: the input is read once, and each output again and again."""

    def __init__(self, model: ConditionedDecoder, ids: Tensor, tokens: Tensor | None, adaptation: Adaptation) -> None:
        super().__init__(model, ids, tokens, adaptation)
        self._decoder = model

    def reorder(self, rows: Sequence[int]) -> None:
        super().reorder(rows)
        self._decoder.reorder(rows)
