"""A language model cut in two between blocks: what no adaptation reaches, and what it does.

Below the cut all adaptations agree. That part runs once for a text, whatever is done with it above, and its states
never go stale (DESIGN §5).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.adaptation import Adaptation, block_of
from bayes_dispatch.model.backbone import Backbone, Cuttable
from bayes_dispatch.model.mambaformer.cache import Cache

__all__ = ["CutModel"]


class CutModel:
    """The blocks below a cut, which are never adapted, and those above it.

    A model that cannot be cut, or is cut before its first block, is all above: what is below gives its tokens, as the
    embedding may be adapted.

    Attributes:
        model: the whole. block: the first block above the cut. depth: blocks in all.

    Raises:
        ConfigError: the model has no such block, or is none that can be cut.
    """

    def __init__(self, model: Backbone, block: int) -> None:
        self.depth = 1 + max(block_of(name) for name in model.adaptable())
        self._parts = model if isinstance(model, Cuttable) else None
        if not 0 <= block < self.depth:
            raise ConfigError(f"expected a block of 0 … {self.depth - 1} to cut before, got {block}")
        if block > 0 and self._parts is None:
            raise ConfigError(f"expected a model that can be cut before block {block}, got a {type(model).__name__}")
        self.model = model
        self.block = block

    def cache_below(self, rows: int, max_length: int) -> Cache | None:
        """An empty cache of the blocks below; ``None`` where there are none."""
        if self._parts is None or self.block == 0:
            return None
        return self._parts.init_cache(rows, max_length, blocks=range(self.block))

    def cache_above(self, rows: int, max_length: int) -> Cache:
        """An empty cache of the blocks above."""
        if self._parts is None:
            return self.model.init_cache(rows, max_length)
        return self._parts.init_cache(rows, max_length, blocks=range(self.block, self.depth))

    def below(
        self, input_ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"] | None, cache: Cache | None
    ) -> Int[Tensor, "B T"] | Float[Tensor, "B T D"]:
        """What the blocks above read."""
        if self._parts is None or self.block == 0:
            return input_ids
        return self._parts.below(self.block, input_ids, attention_mask=mask, cache=cache)

    def above(
        self,
        x: Int[Tensor, "B T"] | Float[Tensor, "B T D"],
        mask: Int[Tensor, "B T"] | None,
        cache: Cache | None,
        adaptation: Adaptation,
        last: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B t V"]:
        """Logits (B, T, V) of the rest of the model, over what ``below`` gave.

        Args:
            last: (B,) the one place of each row whose logits are wanted: (B, 1, V).
        """
        if self._parts is not None:
            return self._parts.above(self.block, x, attention_mask=mask, cache=cache, adaptation=adaptation, last=last)
        logits = self.model(x, attention_mask=mask, cache=cache, adaptation=adaptation).logits
        return logits if last is None else logits[torch.arange(len(logits)), last][:, None]
