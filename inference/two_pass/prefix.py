"""Prompts read up to the first adapted block: what both passes share (DESIGN §5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.parts import CutModel
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["Prefix", "read_prefix"]


@dataclass(frozen=True, eq=False)
class Prefix:
    """U prompts below the cut of a model.

    Attributes:
        ids: (U, T) tokens, right-padded: the beginning token and the prompt's bytes. tokens: (U,), real ones.
        x: (U, T, D), or the tokens themselves: what the blocks above the cut read.
        cache: of the blocks below, which have read them; ``None`` where there are none.
    """

    ids: Int[Tensor, "U T"]
    tokens: Int[Tensor, " U"]
    x: Int[Tensor, "U T"] | Float[Tensor, "U T D"]
    cache: Cache | None

    def select(self, rows: Sequence[int]) -> "Prefix":
        """Some rows, in that order."""
        if list(rows) == list(range(len(self.tokens))):
            return self
        index = torch.tensor(rows)
        tokens = self.tokens[index]
        width = int(tokens.max())
        cache = None if self.cache is None else self.cache.select(index)
        return Prefix(self.ids[index, :width], tokens, self.x[index, :width], cache)


def read_prefix(cut: CutModel, tokenizer: ByteTokenizer, prompts: Sequence[bytes], capacity: int) -> Prefix:
    """Read prompts below the cut.

    Args:
        capacity: tokens that the states have room for, those of the prompts included.
    """
    ids, mask = tokenizer.pad([[tokenizer.bos_token_id, *prompt] for prompt in prompts])
    cache = cut.cache_below(len(prompts), capacity)
    return Prefix(ids, mask.sum(1), cut.below(ids, mask, cache), cache)
