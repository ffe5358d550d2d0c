"""What decoding needs of a model: sequences that it continues, one token at a time, with a cache and without."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.padding import Padding

__all__ = ["CachedContinuation", "Continuation", "LanguageModel", "Beginning", "UncachedContinuation"]


@runtime_checkable
class Continuation(Protocol):
    """R sequences that a model continues; it remembers what they are. Nothing here is checked again.

    The loops call ``start`` once, then ``step`` for each further token, and ``reorder`` between those at will, all in
    ``torch.inference_mode``.
    """

    def start(self) -> Float[Tensor, "R V"]:
        """Read the prompts; logits of the first new token of each row."""
        ...

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Append a token to each row; logits of the next one."""
        ...

    def reorder(self, rows: Sequence[int]) -> None:
        """Make row ``rows[r]`` the new row r: to drop rows that have ended, or to repeat and permute beams."""
        ...


@dataclass(frozen=True, eq=False)
class Beginning:
    """What generation begins with: B rows, and what the loops know of them.

    Attributes:
        continuation: of these rows, not started yet.
        content: what seeds the random numbers of each row.
        ids: (B, T), right-padded: the tokens that ``repetition_penalty`` counts before any is generated.
        tokens: real tokens of each row of ``ids``, (B,); ``None`` where all T are.
    """

    continuation: Continuation
    content: Sequence[bytes]
    ids: Int[Tensor, "B T"]
    tokens: Int[Tensor, " B"] | None = None


@runtime_checkable
class LanguageModel(Protocol):
    """The parts of a causal language model that a continuation calls; a ``TokenModel`` with a head has them."""

    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, adaptation: Adaptation | None
    ) -> tuple[Tensor, Padding]:
        """Hidden states (B, T, D) of tokens (B, T)."""
        ...

    def step(self, tokens: Tensor, cache: Cache, adaptation: Adaptation) -> Tensor:
        """Hidden states (B, D) of one more token for each row (B,)."""
        ...

    def logits(self, hidden: Tensor, adaptation: Adaptation) -> Tensor:
        """The next-token head: (B, T, D) to (B, T, V)."""
        ...

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache."""
        ...


AHEAD = 64  # tokens that a cache has room for beyond its prompt; then as many as it holds, as these may end the text


class CachedContinuation:
    """Keeps the states of a causal model, so that a step costs one token.

    Args:
        model: the language model. ids: (R, T) prompts, right-padded. tokens: real tokens of each row, (R,); ``None``
            where all T are. adaptation: shared or per-row scales. room: tokens that ``step`` may append.
    """

    def __init__(
        self, model: LanguageModel, ids: Tensor, tokens: Tensor | None, adaptation: Adaptation, room: int
    ) -> None:
        self._model = model
        self._prompt = ids, tokens
        self._length, self._most = ids.shape[1], ids.shape[1] + room
        self._adaptation = adaptation
        self._scales = list(range(ids.shape[0]))  # which row of the scales each row has
        self._cache: Cache

    def start(self) -> Float[Tensor, "R V"]:
        ids, tokens = self._prompt
        self._capacity = min(self._length + AHEAD, self._most)
        self._cache = self._model.init_cache(ids.shape[0], self._capacity)
        hidden, _ = self._model.read(ids, _mask(tokens, ids.shape[1]), self._cache, self._adaptation)
        return self._model.logits(_last(hidden, tokens), self._adaptation)[:, 0]

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        if self._length == self._capacity:
            self._capacity = min(2 * self._length, self._most)
            self._cache.reserve(self._capacity)
        self._length += 1
        hidden = self._model.step(tokens, self._cache, self._adaptation)
        return self._model.logits(hidden[:, None], self._adaptation)[:, 0]

    def reorder(self, rows: Sequence[int]) -> None:
        self._cache.reorder(rows)
        scales = [self._scales[row] for row in rows]
        if scales != self._scales:  # beams change places within a prompt, where the scales are the same
            self._adaptation, self._scales = self._adaptation.select(rows), scales


class UncachedContinuation:
    """Reads the whole of each sequence again for each token: the slow reference.

    Args:
        model, ids, tokens, adaptation: as for ``CachedContinuation``.
    """

    def __init__(self, model: LanguageModel, ids: Tensor, tokens: Tensor | None, adaptation: Adaptation) -> None:
        self._model = model
        self._adaptation = adaptation
        self._sequence = ids
        self._tokens = ids.new_full(ids.shape[:1], ids.shape[1]) if tokens is None else tokens.to(ids.device)

    def start(self) -> Float[Tensor, "R V"]:
        width = int(self._tokens.max())
        mask = _mask(self._tokens, width)
        hidden, _ = self._model.read(self._sequence[:, :width], mask, None, self._adaptation)
        return self._model.logits(_last(hidden, self._tokens), self._adaptation)[:, 0]

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        if int(self._tokens.max()) == self._sequence.shape[1]:
            self._sequence = F.pad(self._sequence, (0, 1))
        self._sequence = self._sequence.scatter(1, self._tokens[:, None], tokens[:, None])
        self._tokens = self._tokens + 1
        return self.start()

    def reorder(self, rows: Sequence[int]) -> None:
        index = torch.as_tensor(rows, device=self._sequence.device)
        self._sequence, self._tokens = self._sequence[index], self._tokens[index]
        self._adaptation = self._adaptation.select(rows)


def _mask(tokens: Tensor | None, length: int) -> Tensor | None:
    """(R, T), 1 at the first ``tokens`` of each row."""
    return None if tokens is None else (torch.arange(length, device=tokens.device) < tokens[:, None]).long()


def _last(hidden: Tensor, tokens: Tensor | None) -> Tensor:
    """(R, 1, D): the hidden states at the last real token of each row."""
    if tokens is None:
        return hidden[:, -1:]
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, tokens.to(hidden.device) - 1][:, None]
