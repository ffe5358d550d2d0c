"""The first pass: the unadapted model reads the prompts and yields evidence about which experts would serve them.

What it has read below the first adapted block, the second pass uses again (``Prefix``).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.inference.two_pass.prompts import check_prompts, tokenized
from bayes_dispatch.model.backbone import Backbone, Read, Session, Tokenizer, Tokens, padded

__all__ = [
    "TOKEN_CLASSES",
    "PROMPTS_AT_ONCE",
    "FirstPass",
    "Prefix",
    "batches",
    "class_counts",
    "depths_of",
    "looked_at",
    "pooled",
    "evidence_of",
    "first_pass",
    "read_prefix",
    "surprise_of",
    "together",
    "token_means",
]

# Classes of bytes; a byte belongs to the first class that holds it, others to "other".
TOKEN_CLASSES: dict[str, bytes] = {
    "digit": b"0123456789",
    "a-p": b"abcdefghijklmnop",
    "q-z": b"qrstuvwxyz",
    "upper": b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "space": b" \t",
    "newline": b"\r\n",
    "arrow": b">",
    "plus": b"+",
    "equals": b"=",
    "quote": b"\"'`",
    "bracket": b"()[]{}",
    "stop": b".,:;",
}
_CLASS_OF = np.full(256, len(TOKEN_CLASSES))
for _index, _members in enumerate(TOKEN_CLASSES.values()):
    _CLASS_OF[list(_members)] = _index

PROMPTS_AT_ONCE = 32
TOKENS_AT_ONCE = 8192  # of them, padded to the longest
RESIDUAL_FLOOR = 0.01  # of the mean squared hidden state: the residual of one token is 0, which has no logarithm


@dataclass(frozen=True, eq=False)
class FirstPass:
    """What the first pass found.

    Attributes:
        evidence: the views ``hidden`` (prompt, 3 D), the mean hidden states over the prompt's tokens but the first,
            after a third, two thirds and all of the blocks that ran, side by side; ``counts`` (prompt, C), how many of
            its tokens fall into each class; and ``surprise`` (prompt, 2), the mean negative log-likelihood of these
            tokens in nats, and the log of the mean squared distance between their last hidden states and the mean.
            Tokens of our own model are bytes, after one that begins the text. Where only some blocks ran there is no
            ``surprise``, which needs them all. One or two blocks have fewer depths.
    """

    evidence: Evidence


@torch.no_grad()
def first_pass(
    model: Backbone,
    tokenizer: Tokenizer,
    prompts: Sequence[str | bytes],
    progress: bool = False,
    cut: int = 0,
) -> FirstPass:
    """Read prompts of any lengths with the unadapted model.

    Args:
        model, tokenizer: of a bundle. prompts: UTF-8, as long as the model can read.
        progress: show a progress bar.
        cut: how many blocks no expert adapts: these alone run, as the second pass goes on from there. With 0 all do.

    Raises:
        PromptError: see ``check_prompts``. ConfigError: the model has fewer blocks, or cannot be cut there.
    """
    checked = check_prompts(prompts)
    texts = tokenized(tokenizer, checked, model.longest)
    rows: dict[int, dict[str, np.ndarray]] = {}
    for batch in tqdm(batches(texts), "first pass", disable=None if progress else True):
        ids, tokens = padded([texts[i].ids for i in batch], tokenizer.pad_token_id)
        rows.update(zip(batch, _pooled(model, ids, tokens, cut), strict=True))
    views = {name: np.stack([rows[i][name] for i in range(len(checked))]) for name in rows[0]}
    return FirstPass(evidence_of(checked, texts, views))


def batches(texts: Sequence[Tokens]) -> list[list[int]]:
    """Which are read together, in their order: those of similar lengths."""
    lengths = [len(text.ids) for text in texts]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    return list(together(order, lengths, PROMPTS_AT_ONCE, TOKENS_AT_ONCE))


def together(order: Iterable[int], lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
    """Parts of an order by length: of so many rows at most, and of so many tokens once they are padded."""
    part: list[int] = []
    for n in order:
        if part and (len(part) == rows or (len(part) + 1) * lengths[n] > tokens):
            yield part
            part = []
        part.append(n)
    if part:
        yield part


def _pooled(
    model: Backbone, ids: Int[Tensor, "B T"], tokens: Int[Tensor, " B"], cut: int
) -> list[dict[str, np.ndarray]]:
    """The views of each row that are read off the model."""
    blocks = range(cut or model.depth)
    session = model.open(len(ids), ids.shape[1], blocks=blocks)
    read = session.read(ids, tokens, own=not cut, depths=depths_of(blocks.stop))
    means = pooled(read, tokens)
    if read.own is None:
        return [{"hidden": mean} for mean in means]
    surprise = surprise_of(read, tokens)
    return [{"hidden": mean, "surprise": pair} for mean, pair in zip(means, surprise, strict=True)]


def depths_of(blocks: int) -> tuple[int, ...]:
    """After how many of the blocks that run evidence looks at hidden states, beside the last: a third, and two thirds.

    Earlier blocks tell the kind of a text, later ones what comes next: together more than the last alone.
    """
    return tuple(sorted({-(-blocks // 3), -(-2 * blocks // 3)} - {blocks}))


def looked_at(read: Read) -> tuple[Float[Tensor, "R T D"], ...]:
    """The hidden states that evidence looks at, by depth, the last ones last."""
    return *read.states, read.hidden


def pooled(read: Read, tokens: Int[Tensor, " R"]) -> Float[np.ndarray, "R F"]:
    """The view ``hidden`` of right-padded rows of a read from their beginning."""
    return np.concatenate([token_means(states, tokens) for states in looked_at(read)], 1)


@dataclass(frozen=True, eq=False)
class Prefix:
    """U prompts below the cut of a model.

    Attributes:
        ids: (U, T) tokens, right-padded. tokens: (U,), real ones.
        x: (U, T, D), what the blocks above the cut read. below: the session of those under it, which has read the
            prompts. Both are ``None`` where nothing is below. cut: how many blocks are.
        means: (U, F), the view ``hidden`` of the prompts, where it was asked for.
    """

    ids: Int[Tensor, "U T"]
    tokens: Int[Tensor, " U"]
    x: Float[Tensor, "U T D"] | None
    below: Session | None
    cut: int = 0
    means: Float[np.ndarray, "U F"] | None = None

    def select(self, rows: Sequence[int]) -> "Prefix":
        """Some rows, in that order, without ``means``."""
        if list(rows) == list(range(len(self.tokens))):
            return self
        index = torch.tensor(rows)
        tokens = self.tokens[index]
        width = int(tokens.max())
        below = None if self.below is None else self.below.select(rows)
        x = None if self.x is None else self.x[index, :width]
        return Prefix(self.ids[index, :width], tokens, x, below, self.cut)


def read_prefix(
    model: Backbone, cut: int, texts: Sequence[Sequence[int]], pad: int, capacity: int, means: bool = False
) -> Prefix:
    """Read prompts below the cut.

    Args:
        cut: blocks that are below it. texts: ids of each prompt. pad: fills rows.
        capacity: tokens that the states have room for, those of the prompts included.
        means: pool hidden states, for evidence.
    """
    ids, tokens = padded(texts, pad)
    if not cut:
        return Prefix(ids, tokens, None, None)
    below = model.open(len(ids), capacity, blocks=range(cut))
    read = below.read(ids, tokens, depths=depths_of(cut) if means else ())
    return Prefix(ids, tokens, read.hidden, below, cut, pooled(read, tokens) if means else None)


def evidence_of(prompts: Sequence[bytes], texts: Sequence[Tokens], views: Mapping[str, np.ndarray]) -> Evidence:
    """Evidence of what was pooled over prompts, and of their tokens, of which it counts those that have bytes."""
    counts = np.stack([class_counts(data, text) for data, text in zip(prompts, texts, strict=True)])
    lengths = counts.sum(1)
    first = {"hidden": views["hidden"]} if "hidden" in views else {}
    return Evidence(first | {"counts": counts} | dict(views), lengths)


def class_counts(data: bytes, text: Tokens) -> np.ndarray:
    """(C,) how many tokens fall into each class of ``TOKEN_CLASSES``, then the others.

    A token is of the class of its first byte, or of the one after a space that begins it.
    """
    starts = np.array(
        [start + (data[start : start + 1] == b" " and stop > start + 1) for start, stop in text.spans if stop > start],
        dtype=int,
    )
    classes = _CLASS_OF[np.frombuffer(data, dtype=np.uint8)[starts]]
    return np.bincount(classes, minlength=len(TOKEN_CLASSES) + 1).astype(float)


def token_means(hidden: Float[Tensor, "B T D"], tokens: Int[Tensor, " B"]) -> Float[np.ndarray, "B D"]:
    """Means of right-padded hidden states over all real tokens (B,) of each row but the first, or of that alone."""
    hidden = _wide(hidden)
    real = _after_first(hidden, tokens)
    return ((hidden * real).sum(1) / real.sum(1)).double().cpu().numpy()


def surprise_of(read: Read, tokens: Int[Tensor, " B"]) -> Float[np.ndarray, "B 2"]:
    """Mean negative log-likelihood of a token, and log of the mean squared distance of hidden states from their mean.

    The distance is no less than the floor's; a row of one token has a likelihood of 1.
    """
    assert read.own is not None
    hidden = _wide(read.hidden)
    real = _after_first(hidden, tokens)
    means = (hidden * real).sum(1) / real.sum(1)
    said = torch.where(real[:, 1:, 0] > 0, read.own[:, 1:].double(), 0.0)  # nothing is said of the first
    nll = -said.sum(1) / real.sum((1, 2)).double()
    return torch.stack([nll, _log_residual(hidden, means, real).double()], -1).cpu().numpy()


def _wide(hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """In float32 or better: sums and counts of tokens are not for half precision."""
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def _after_first(hidden: Float[Tensor, "B T D"], tokens: Int[Tensor, " B"]) -> Float[Tensor, "B T 1"]:
    places, counts = torch.arange(hidden.shape[1], device=hidden.device), tokens.to(hidden.device)[:, None]
    return ((places < counts) & ((places > 0) | (counts == 1)))[..., None].to(hidden)


def _log_residual(
    hidden: Float[Tensor, "B T D"], means: Float[Tensor, "B D"], real: Float[Tensor, "B T 1"]
) -> Float[Tensor, " B"]:
    """Log of the mean squared distance of a row's hidden states from their mean, no less than the floor's."""
    count = real.sum((1, 2))
    squared = ((hidden - means[:, None]) * real).square().sum((1, 2)) / count
    length = (hidden * real).square().sum((1, 2)) / count
    return torch.maximum(squared, RESIDUAL_FLOOR * length).log()
