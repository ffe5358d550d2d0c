"""Given documents read under many blend weights: each row reads its document once, in one go.

What is below the first adapted block runs once for a document, whatever its rows. Nothing is decoded, so nothing is
cached. ``UncachedReader`` is the slow reference.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.model.parts import CutModel
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["Reading", "read_documents", "scored_places"]

TOKENS_AT_ONCE = 8192  # of the rows that run together: of more, activations only leave the processor's caches
BELOW_AT_ONCE = 32768  # of the documents that are read below the cut together, which is kept


class Reading(NamedTuple):
    """What W blend weights say of a document of T bytes, P of them scored; in nats.

    Attributes:
        own: log-probability of each byte. following: all log-probabilities at the scored bytes, of which ``entropy``.
    """

    own: Float[Tensor, "W T"]
    following: Float[Tensor, "W P V"]
    entropy: Float[Tensor, "W P"]


@torch.no_grad()
def read_documents(
    cut: CutModel,
    experts: ExpertBank,
    documents: Sequence[Document],
    weights: Sequence[Float[np.ndarray, "_ *layers components"]],
) -> list[Reading]:
    """Read each document under weights of its own.

    Args:
        cut: the model, cut before the first block that the experts adapt, or lower. documents: N, of any lengths.
        weights: for each document (W, K + 1), on the simplex, or (W, L, K + 1), by layer; W may differ from document to
            document.
    """
    lengths = torch.tensor([1 + len(document.data) for document in documents])
    found: dict[int, Reading] = {}
    for alike in _batches(lengths, [1] * len(documents), BELOW_AT_ONCE):
        group = [n for n, _ in alike]
        readings = _read_together(cut, experts, [documents[n] for n in group], [weights[n] for n in group])
        found.update(zip(group, readings, strict=True))
    return [found[n] for n in range(len(documents))]


def scored_places(document: Document) -> Int[Tensor, " P"]:
    """The scored bytes of a document, in the order of its ranges."""
    return torch.cat([torch.arange(start, stop) for start, stop in document.ranges])


def _read_together(
    cut: CutModel,
    experts: ExpertBank,
    documents: Sequence[Document],
    weights: Sequence[Float[np.ndarray, "_ *layers components"]],
) -> list[Reading]:
    tokenizer = ByteTokenizer()
    ids, mask = tokenizer.pad([[tokenizer.bos_token_id, *document.data] for document in documents])
    lengths, below = mask.sum(1), cut.below(ids, mask, None)
    places = [scored_places(document) for document in documents]
    parts: list[list[Reading]] = [[] for _ in documents]
    for rows in _batches(lengths, [len(own) for own in weights], TOKENS_AT_ONCE):
        owner = torch.tensor([n for n, _ in rows])
        blended = torch.tensor(np.stack([weights[n][w] for n, w in rows])).to(cut.model.dtype)
        tokens = lengths[owner]
        width = int(tokens.max())
        real = None if bool((tokens == width).all()) else mask[owner, :width]
        after = cut.above(below[owner, :width], real, None, experts.blend_rows(blended)).log_softmax(-1)
        for n in owner.unique().tolist():
            parts[n].append(_of(after[owner == n], ids[n, 1 : int(lengths[n])], places[n]))
    return [Reading(*map(torch.cat, zip(*each, strict=True))) for each in parts]


def _of(after: Float[Tensor, "W t V"], data: Int[Tensor, " T"], places: Int[Tensor, " P"]) -> Reading:
    """From log-probabilities after the beginning token and each byte."""
    own = after[:, : len(data)].gather(2, data[:, None].expand(len(after), -1, 1))[..., 0]
    following = after[:, places]
    return Reading(own, following, -(following.exp() * following).sum(-1, dtype=torch.double))


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
