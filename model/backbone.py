"""What experts and inference need to know of a language model, whichever it is."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayes_dispatch.arguments import shown
from bayes_dispatch.errors import ConfigError, StaleCacheError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.cache import Cache

__all__ = [
    "Backbone",
    "CausalLMOutput",
    "Read",
    "Session",
    "TextStream",
    "Tokenizer",
    "Tokens",
    "check_backbone",
    "check_ended",
    "check_hidden",
    "check_rows",
    "check_tokens",
    "clipped",
    "last_of",
    "padded",
    "token_weights",
]


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
        states: what came out after each of the ``depths`` that were asked for, as it is.
    """

    own: Float[Tensor, "R T"] | None
    after: Float[Tensor, "R t V"] | None
    hidden: Float[Tensor, "R T D"]
    states: tuple[Float[Tensor, "R T D"], ...] = ()


@runtime_checkable
class Session(Protocol):
    """R rows of tokens that a model reads, and reads on. Rows may be dropped, repeated and permuted between reads.

    A change takes effect whole; after one that was interrupted the session refuses all further ones.

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
        depths: Sequence[int] = (),
    ) -> Read:
        """Read further tokens of each row.

        Args:
            ids: right-padded. tokens: how many are real; ``None`` where all T are.
            x: what comes into the first of these blocks, where that is not the model's first.
            own: give the log-probability of each token. tail: after how many of the last tokens to give all.
            depths: give the hidden states after so many of the model's blocks, too.

        Raises:
            TensorError: shapes that do not fit. ConfigError: a depth that these blocks do not reach, or a tail below 1.
            CacheFullError: more tokens than there is room for. StaleCacheError: an earlier change was interrupted.
        """
        ...

    def after(self, hidden: Float[Tensor, "R t D"]) -> Float[Tensor, "R t V"]:
        """Log-probabilities of what follows hidden states that a read gave; for sessions with the last block."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Make row ``rows[r]`` the new row r, with its adaptation."""
        ...

    def select(self, rows: Sequence[int]) -> "Session":
        """A session of its own that goes on from these rows; this one stays as it is."""
        ...

    def join(self, other: "Session") -> None:
        """Take in copies of the rows of another session, with their adaptations, after one's own.

        Both have read something, however much, under the same blocks of one model; deltas have the same factors.

        Raises:
            TensorError: they do not fit together. StaleCacheError: a read or change of one was interrupted.
        """
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
class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        vocab_size: V. pad_token_id: fills rows. ends: ids with which a text ends; they have no text of their own.
        continues: (V,), which ids may be chosen to continue a text.
    """

    vocab_size: int
    pad_token_id: int
    ends: frozenset[int]
    continues: Bool[Tensor, " V"]

    def tokenize(self, text: str | bytes, begin: bool = True) -> Tokens:
        """Ids and spans of a text.

        Args:
            begin: put what begins every text first; not where this goes on from other tokens.

        Raises:
            PromptError: it is no UTF-8.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ones, and numbers below 0, have none, bytes that are no UTF-8 become U+FFFD."""
        ...

    def stream(self, context: Sequence[int]) -> "TextStream":
        """The text that further ids add to that of ``context``."""
        ...


@runtime_checkable
class TextStream(Protocol):
    """Text of tokens as they come."""

    def add(self, token: int) -> str:
        """What there is to say after one more token; what could still change, such as half a character, waits."""
        ...

    def end(self) -> str:
        """What still waited."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """A causal language model whose matrices can be adapted, row by row.

    Attributes:
        depth: blocks. vocab_size: of its logits. longest: tokens that it was made for, ``None`` without a bound.
        cuts: whether its blocks can run in two parts, below and above any block. continues: whether it reads several
            tokens at once from what it kept; if not, it reads them one by one.
    """

    depth: int
    vocab_size: int

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def longest(self) -> int | None: ...
    @property
    def cuts(self) -> bool: ...
    @property
    def continues(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype:
        """Of weights and hidden states."""
        ...

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the blend weights that its adaptations are made of."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its tokens go."""
        ...

    def open(
        self, rows: int, capacity: int, adaptation: Adaptation | None = None, blocks: range | None = None
    ) -> Session:
        """An empty session.

        Args:
            rows: R. capacity: tokens that each row has room for. adaptation: shared, or of R rows; ``None`` for base.
            blocks: which run, all by default. A session of blocks from 0 up to ``cut`` gives, as ``Read.hidden``, what
                one from there to the last block reads as ``x``.

        Raises:
            ConfigError: blocks that there are not, or a part of a model that cannot be cut.
            TensorError: an adaptation that does not fit.
        """
        ...

    def score(
        self, ids: Int[Tensor, "R T"], tokens: Int[Tensor, " R"] | None = None, adaptation: Adaptation | None = None
    ) -> Float[Tensor, "R T"]:
        """Log-probability of each token given all before it, NaN for the first; nothing is kept, gradients flow.

        Args:
            ids: right-padded; at padding there is no meaning. tokens: real ones of each row. adaptation: see ``open``.
        """
        ...

    def cut(self, matrices: Iterable[str]) -> int:
        """How many blocks run the same under all adaptations of these matrices; 0 where the model cannot be cut."""
        ...

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix that can be adapted, by name."""
        ...

    def adaptable(self) -> dict[str, int]:
        """The name and rank of each matrix that singular-value scales adapt unless told otherwise, in order."""
        ...

    def fingerprint(self) -> str:
        """A hash of the weights, and of no settings: equal for equal weights only."""
        ...


def clipped(tokenizer: Tokenizer, text: str, longest: int | None) -> str:
    """As much of a text's beginning as a model reads of at most ``longest`` tokens."""
    tokens = tokenizer.tokenize(text)
    while longest is not None and len(tokens.ids) > longest:  # the tokens of a part may be more than they were of it
        text = text.encode()[: tokens.spans[longest][0]].decode(errors="ignore")
        tokens = tokenizer.tokenize(text)
    return text


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """Right-padded ids, and how many of each row are real."""
    tokens = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(tokens.max())), pad)
    for row, own in zip(ids, rows, strict=True):
        row[: len(own)] = torch.tensor(own)
    return ids, tokens


def last_of(hidden: Float[Tensor, "R T D"], tokens: Int[Tensor, " R"] | None, tail: int) -> Float[Tensor, "R tail D"]:
    """The last ``tail`` of each row's real tokens, all T for ``None``; the first again where a row has fewer."""
    if tokens is None:
        return hidden[:, hidden.shape[1] - tail :]
    places = (tokens.to(hidden.device)[:, None] - tail + torch.arange(tail, device=hidden.device)).clamp(min=0)
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))


def token_weights(text: Tokens, weights: Sequence[float]) -> Float[Tensor, " T"]:
    """Weight of each token, given that of each byte: the mean over its bytes, 0 where it has none."""
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    starts, stops = np.array(text.spans, dtype=int).reshape(-1, 2).T
    return torch.from_numpy((sums[stops] - sums[starts]) / np.maximum(stops - starts, 1)).float()


def check_backbone(model: object) -> None:
    """Raise ``ConfigError`` for anything else than a language model, such as the path of one."""
    if not isinstance(model, Backbone):
        raise ConfigError(f"expected a model, as TransformersBackbone.load gives one, got {shown(model)}")


def check_tokens(ids: Tensor, tokens: Tensor | None, rows: int) -> None:
    """Raise a ``TensorError`` unless a session of so many rows can read these: see ``Session.read``."""
    if ids.ndim != 2 or ids.shape[0] != rows or not ids.shape[1]:
        raise TensorError(f"expected tokens (R, T) of {rows} rows, got shape {tuple(ids.shape)}")
    if tokens is not None and (tokens.shape != (rows,) or not bool(((tokens > 0) & (tokens <= ids.shape[1])).all())):
        raise TensorError(f"expected 1 … {ids.shape[1]} tokens of each of {rows} rows, got {tokens.tolist()}")


def check_hidden(x: Tensor | None, ids: Tensor) -> Tensor:
    """The hidden states that upper blocks read, or a ``TensorError`` unless they are of these tokens."""
    if x is None or x.shape[:2] != ids.shape:
        got = "none" if x is None else f"shape {tuple(x.shape)}"
        raise TensorError(f"expected hidden states (R, T, D) for tokens of shape {tuple(ids.shape)}, got {got}")
    return x


def check_ended(changing: bool) -> None:
    """Raise a ``StaleCacheError`` where the last change of a session was interrupted."""
    if changing:
        raise StaleCacheError("expected a session whose last change ended, got one that was interrupted")


def check_rows(rows: Sequence[int], count: int) -> None:
    """Raise a ``TensorError`` unless these are some of ``count`` rows."""
    if not len(rows) or not all(0 <= row < count for row in rows):
        raise TensorError(f"expected some rows of 0 … {count - 1}, got {list(rows)}")
