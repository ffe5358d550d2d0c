"""What experts and inference need to know of a language model, whichever it is."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.cache import Cache

__all__ = ["Backbone", "CausalLMOutput", "Cuttable", "Read", "Session", "Tokens"]


class Tokens(NamedTuple):
    """A text in tokens.

    Attributes:
        ids: what begins every text, then the text. spans: of each id its first byte in the text and the one after its
            last; empty for what begins it.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Read(NamedTuple):
    """What R rows gave for T tokens each, where the tokens stand; at padding there is no meaning.

    Attributes:
        own: log-probability of each token given all before it; NaN for the first one that the session reads; ``None``
            where it was not asked for, or no head runs. after: log-probabilities after the last tokens of each row.
        hidden: what comes out of the blocks; of the last block after the normalisation that precedes the head.
    """

    own: Float[Tensor, "R T"] | None
    after: Float[Tensor, "R t V"] | None
    hidden: Float[Tensor, "R T D"]


@runtime_checkable
class Session(Protocol):
    """R rows of tokens that a model reads, and reads on. Rows may be dropped, repeated and permuted between reads.

    A read takes effect whole; after one that was interrupted the session refuses all further ones.

    Attributes:
        evaluated: how often a block has run on a token, padding left out.
    """

    evaluated: int

    @property
    def rows(self) -> int: ...

    @property
    def lengths(self) -> Int[Tensor, " R"]:
        """Tokens read by each row."""
        ...

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        ...

    def read(
        self,
        ids: Int[Tensor, "R T"],
        tokens: Int[Tensor, " R"] | None = None,
        x: Float[Tensor, "R T D"] | None = None,
        *,
        own: bool = False,
        tail: int = 1,
    ) -> Read:
        """Read further tokens of each row.

        Args:
            ids: right-padded. tokens: how many are real; ``None`` where all T are.
            x: what comes into the first of these blocks, where that is not the model's first.
            own: give the log-probability of each token. tail: after how many of the last tokens to give all.

        Raises:
            TensorError: shapes that do not fit. CacheFullError: more tokens than there is room for.
            StaleCacheError: an earlier read was interrupted.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Make row ``rows[r]`` the new row r, with its adaptation."""
        ...

    def select(self, rows: Sequence[int]) -> "Session":
        """A session of its own that goes on from these rows; this one stays as it is."""
        ...

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens of each row in all."""
        ...


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
