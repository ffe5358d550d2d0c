"""Given documents read under many blend weights: each row reads its document once, in one go.

What is below the first adapted block runs once for a document, whatever its rows. Nothing is decoded.
``UncachedReader`` is the slow reference.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.two_pass.first_pass import Prefix, read_prefix
from bayes_dispatch.model.backbone import Backbone, Tokenizer, padded

__all__ = ["DocumentReading", "TokenDocument", "following", "read_documents"]

TOKENS_AT_ONCE = 8192  # of the rows that run together: of more, activations only leave the processor's caches
BELOW_AT_ONCE = 32768  # of the documents that are read below the cut together, which is kept
LOGITS_AT_ONCE = 2**22  # numbers: 16 MiB, and several times that while they are mixed


class TokenDocument(NamedTuple):
    """A document in tokens.

    Attributes:
        ids: of all its tokens, (1 + T,): nothing is said of the first. starts: (T,) first bytes of the others.
        stops: (T,) the bytes after their last. places: which of the T are scored, in the order of the scored ranges.
        sizes: how many are in each range that has some. scored_bytes: of the text of these, of all ranges together.
    """

    ids: tuple[int, ...]
    starts: np.ndarray
    stops: np.ndarray
    places: np.ndarray
    sizes: tuple[int, ...]
    scored_bytes: int

    @classmethod
    def of(cls, document: Document, tokenizer: Tokenizer) -> "TokenDocument":
        """A token is scored, whole, where it begins within a scored range of bytes."""
        text = tokenizer.tokenize(document.data)
        starts, stops = np.array(text.spans[1:], dtype=int).reshape(-1, 2).T
        inside = [np.flatnonzero((starts >= a) & (starts < b) & (stops > starts)) for a, b in document.ranges]
        inside = [own for own in inside if len(own)]
        places, sizes = np.concatenate([np.zeros(0, int), *inside]), tuple(map(len, inside))
        scored = sum(int(stops[own[-1]] - starts[own[0]]) for own in inside)  # several tokens may share a character
        return cls(text.ids, starts, stops, places, sizes, scored)

    def tokens_before(self, byte: int) -> int:
        """How many of the T tokens are whole before this byte."""
        return int((self.stops <= byte).sum())


class DocumentReading(NamedTuple):
    """What W blend weights make of a document of T tokens, P of them scored.

    Attributes:
        own: log-probability of each token, nats. hidden: states that the scored ones are predicted from.
    """

    own: Float[Tensor, "W T"]
    hidden: Float[Tensor, "W P D"]


@torch.no_grad()
def read_documents(
    model: Backbone,
    experts: ExpertBank,
    documents: Sequence[TokenDocument],
    weights: Sequence[Float[np.ndarray, "_ *layers components"]],
) -> list[DocumentReading]:
    """Read each document under weights of its own.

    Args:
        model, experts: to blend. documents: N, of any lengths.
        weights: for each document (W, K + 1), on the simplex, or (W, L, K + 1), by layer; W may differ from document to
            document.
    """
    lengths, cut = torch.tensor([len(document.ids) for document in documents]), model.cut(experts.adapts)
    found: dict[int, DocumentReading] = {}
    for alike in _batches(lengths, [1] * len(documents), BELOW_AT_ONCE):
        group = [n for n, _ in alike]
        texts = [documents[n] for n in group]
        prefix = read_prefix(model, cut, [text.ids for text in texts], model.tokenizer.pad_token_id, int(lengths.max()))
        found.update(zip(group, _above(model, experts, prefix, texts, [weights[n] for n in group]), strict=True))
    return [found[n] for n in range(len(documents))]


@torch.no_grad()
def following(
    model: Backbone,
    experts: ExpertBank,
    weights: Float[np.ndarray, "W *layers components"],
    hidden: Float[Tensor, "W P D"],
) -> Iterator[Float[Tensor, "W p V"]]:
    """All log-probabilities at the scored tokens of a ``DocumentReading``, a few tokens after the other: of a real
    vocabulary there is no room for those of a whole document.
    """
    adaptation = experts.blend_rows(torch.tensor(weights).to(model.weights_dtype))
    session = model.open(len(weights), 1, adaptation)
    for part in hidden.split(max(1, LOGITS_AT_ONCE // (len(weights) * model.vocab_size)), 1):
        yield session.after(part).cpu()


def _above(
    model: Backbone,
    experts: ExpertBank,
    prefix: Prefix,
    documents: Sequence[TokenDocument],
    weights: Sequence[Float[np.ndarray, "_ *layers components"]],
) -> list[DocumentReading]:
    parts: list[list[DocumentReading]] = [[] for _ in documents]
    for rows in _batches(prefix.tokens, [len(own) for own in weights], TOKENS_AT_ONCE):
        owner = torch.tensor([n for n, _ in rows])
        tokens = prefix.tokens[owner]
        width = int(tokens.max())
        adaptation = experts.blend_rows(
            torch.tensor(np.stack([weights[n][w] for n, w in rows])).to(model.weights_dtype)
        )
        session = model.open(len(rows), width, adaptation, range(prefix.cut, model.depth))
        x = None if prefix.x is None else prefix.x[owner, :width]
        read = session.read(prefix.ids[owner, :width], tokens, x, own=True)
        assert read.own is not None
        places, _ = padded([documents[n].places.tolist() or [0] for n, _ in rows], 0)
        index = places.to(read.hidden.device)[..., None].expand(-1, -1, read.hidden.shape[2])
        own, hidden = read.own.cpu(), read.hidden.gather(1, index)
        for n in owner.unique().tolist():
            mine, document = owner == n, documents[n]
            parts[n].append(DocumentReading(own[mine, 1 : len(document.ids)], hidden[mine, : len(document.places)]))
    return [DocumentReading(*map(torch.cat, zip(*each, strict=True))) for each in parts]


def _batches(lengths: Int[Tensor, " N"], counts: Sequence[int], most: int) -> Iterator[list[tuple[int, int]]]:
    """(document, row) of those that run together: documents of similar lengths, no more padded tokens than may be."""
    rows: list[tuple[int, int]] = []
    for n in lengths.argsort(stable=True).tolist():  # so that the last row of a batch is its longest
        for w in range(counts[n]):
            if rows and (len(rows) + 1) * int(lengths[n]) > most:
                yield rows
                rows = []
            rows.append((n, w))
    if rows:
        yield rows
