"""What experts and inference need to know of a language model, whichever it is."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.cache import Cache

__all__ = ["Backbone", "CausalLMOutput", "Cuttable"]


class CausalLMOutput(NamedTuple):
    """Logits (B, T, V), the last hidden states (B, T, D) after the final normalisation, and the cache, filled."""

    logits: Float[Tensor, "B T V"]
    hidden: Float[Tensor, "B T D"]
    cache: Cache | None


@runtime_checkable
class Backbone(Protocol):
    """A causal language model with adaptable matrices and an explicit cache."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, logits and cached states."""
        ...

    def __call__(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        adaptation: Adaptation | None = None,
    ) -> CausalLMOutput:
        """Run the whole model over the tokens that follow those in ``cache``."""
        ...

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for ``batch_size`` rows of up to ``max_length`` tokens."""
        ...

    def adaptable(self) -> dict[str, int]:
        """The name and rank of each matrix that experts adapt unless told otherwise, in order."""
        ...

    def fingerprint(self) -> str:
        """A hash of the weights: equal for equal weights only."""
        ...


@runtime_checkable
class Cuttable(Protocol):
    """A causal language model whose blocks can also run in two parts."""

    def below(
        self,
        block: int,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The hidden states that come into ``block``; ``cache`` is of the blocks before it."""
        ...

    def above(
        self,
        block: int,
        x: Int[Tensor, "B T"] | Float[Tensor, "B T D"],
        *,
        attention_mask: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        adaptation: Adaptation | None = None,
        last: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B t V"]:
        """Logits: run ``block`` and all after it on what ``below`` gave; ``cache`` is of these blocks.

        Block 0 runs on tokens, too: the embedding of each row may be adapted.
        With ``last`` (B,) those of one place of each row alone, (B, 1, V).
        """
        ...

    def init_cache(self, batch_size: int, max_length: int, *, blocks: range | None = None) -> Cache:
        """An empty cache of some blocks, all by default."""
        ...
