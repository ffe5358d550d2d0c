"""Documents that are read together, by rows that share what they can, say what the uncached reader says; what they
share runs once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.scoring import document_reader as reading_module
from bayes_dispatch.inference.scoring.compare import score_together
from bayes_dispatch.inference.scoring.document_reader import TokenDocument, following, read_documents
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.readers import UncachedReader, straight
from bayes_dispatch.model.mambaformer.session import MambaFormerSession
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.model.transformers.tokenizer import TransformersTokenizer
from tests.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM


def experts_from(model: "MambaFormerForCausalLM", block: int) -> ExpertBank:
    """Two experts of random scales in the blocks from one on."""
    draw = torch.Generator().manual_seed(5)
    ranks = {name: rank for name, rank in model.adaptable().items() if int(name.split(".")[1]) >= block}
    scales = [{matrix: 1 + 0.5 * torch.randn(rank, generator=draw) for matrix, rank in ranks.items()} for _ in "xy"]
    return ExpertBank([ExpertVector(name, own, model.fingerprint()) for name, own in zip("xy", scales, strict=True)])


def in_tokens(documents: Sequence[Document]) -> list[TokenDocument]:
    return [TokenDocument.of(document, ByteTokenizer()) for document in documents]


def one_by_one(
    model: "MambaFormerForCausalLM", experts: ExpertBank, document: Document, weights: np.ndarray
) -> tuple[Tensor, Tensor]:
    """The reference: every row through the whole model, again for each document."""
    ids = torch.tensor([[256, *document.data]])
    particles = Particles(weights[None], np.full((1, len(weights)), 1 / len(weights)))
    with torch.no_grad():
        reader = UncachedReader(model, experts, particles, ids, torch.tensor([ids.shape[1]]))
        after = torch.cat(list(straight(reader.read_prompts(own=False, tail=ids.shape[1])).after), 2)[0]
    own = torch.stack([after[:, i, byte] for i, byte in enumerate(document.data)], 1)
    return own, torch.stack([after[:, i] for start, stop in document.ranges for i in range(start, stop)], 1)


@settings(max_examples=15, deadline=None)
@given(
    block=st.integers(0, 2),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    at_once=st.sampled_from([1, 50, 8192]),
    seed=st.integers(0, 999),
)
def test_rows_together_are_rows_alone(
    model64: "MambaFormerForCausalLM",
    model: "MambaFormerForCausalLM",
    block: int,
    lengths: list[int],
    at_once: int,
    seed: int,
) -> None:
    """Any lengths, any numbers of rows, experts that adapt all blocks or the upper ones alone."""
    rng = np.random.default_rng(seed)
    texts = ["".join(map(chr, rng.integers(0, 128, length))) for length in lengths]
    documents = [Document(text, int(rng.integers(len(text)))) for text in texts]
    tokens = in_tokens(documents)
    weights = [rng.dirichlet(np.ones(3), int(rng.integers(1, 6))) for _ in documents]
    for own, tolerance in ((model64, 1e-10), (model, 1e-5)):
        experts = experts_from(own, block)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading_module, "TOKENS_AT_ONCE", at_once)
            patch.setattr(reading_module, "LOGITS_AT_ONCE", own.vocab_size * at_once)
            found = [
                (reading.own, torch.cat(list(following(own, experts, rows, reading.hidden)), 1))
                for rows, reading in zip(weights, read_documents(own, experts, tokens, weights), strict=True)
            ]
        for document, rows, read in zip(documents, weights, found, strict=True):
            for fast, slow in zip(read, one_by_one(own, experts, document, rows), strict=True):
                torch.testing.assert_close(fast.double(), slow.double(), rtol=tolerance, atol=tolerance)


def opened(model: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each read of a session of the model from now on: below or above, and how many rows and tokens."""
    seen: list[Any] = []
    read = MambaFormerSession.read

    def told(self: MambaFormerSession, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(("above" if self._whole else "below", *ids.shape))
        return read(self, ids, *args, **kwargs)

    monkeypatch.setattr(MambaFormerSession, "read", told)
    return seen


def test_what_is_below_runs_once(model64: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the cut a document is one row, whatever is read above; of no more tokens at once than may be."""
    seen = opened(model64, monkeypatch)
    monkeypatch.setattr(reading_module, "TOKENS_AT_ONCE", 16)
    documents = in_tokens([Document("abcdefg", 1), Document("abc", 1)])  # 8 and 4 tokens with the beginning
    read_documents(model64, experts_from(model64, 1), documents, [np.eye(3), np.eye(3)[:2]])
    assert [each[:2] for each in seen] == [("below", 2), ("above", 2), ("above", 2), ("above", 1)]


def test_no_more_log_probabilities_than_may_be_are_there_at_once(
    model64: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real vocabulary there is no room for those of a whole document under all its particles."""
    at_once, made = 4 * 3 * model64.vocab_size, list[ReferenceType[Tensor]]()
    after = MambaFormerSession.after

    def told(self: MambaFormerSession, hidden: Tensor) -> Tensor:
        found = after(self, hidden)
        alive = [numbers for each in made if (numbers := each()) is not None and numbers.shape[1] > 1]
        assert sum(map(Tensor.numel, alive)) + found.numel() <= 2 * at_once  # those that are mixed, and the next
        made.append(ref(found))
        return found

    monkeypatch.setattr(MambaFormerSession, "after", told)
    monkeypatch.setattr(reading_module, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr("bayes_dispatch.model.mambaformer.session.LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr("bayes_dispatch.model.mambaformer.session.ROWS_AT_ONCE", 1)
    experts = experts_from(model64, 1)
    particles = {"p": Particles(np.eye(3)[None], np.full((1, 3), 1 / 3))}
    score_together(model64, experts, [Document("ab" * 30, 4)], particles)
    assert len(made) > 56 / 4


def test_documents_of_similar_lengths_are_read_below_together(
    model64: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more padded tokens at once than may be, but for one document that is longer; the order stays."""
    experts, documents = experts_from(model64, 1), in_tokens([Document("ab" * n, 1) for n in (3, 20, 1, 2, 1, 9)])
    weights = [np.eye(3)[:2]] * len(documents)
    expected = read_documents(model64, experts, documents, weights)
    seen = opened(model64, monkeypatch)
    monkeypatch.setattr(reading_module, "BELOW_AT_ONCE", 24)
    found = read_documents(model64, experts, documents, weights)
    assert [each[1:] for each in seen if each[0] == "below"] == [(3, 5), (1, 7), (1, 19), (1, 41)]
    for ours, theirs in zip(found, expected, strict=True):
        for part, whole in zip(ours, theirs, strict=True):
            torch.testing.assert_close(part, whole, rtol=0, atol=1e-12)


def test_scored_places_are_those_of_the_ranges() -> None:
    (text,) = in_tokens([Document("abcdefgh", 2, ((6, 8), (3, 3), (2, 4)))])
    assert text.places.tolist() == [6, 7, 2, 3]
    assert (text.sizes, text.scored_bytes, text.tokens_before(5)) == ((2, 2), 4, 5)


def test_tokens_of_several_bytes_are_scored_where_they_begin() -> None:
    tokenizer = TransformersTokenizer(tiny_tokenizer(), 270)
    text = TokenDocument.of(Document("the ab 12é the", 4, ((4, 9),)), tokenizer)  # é takes the bytes 9 and 10
    data = b"the ab 12\xc3\xa9 the"
    pieces = [data[a:b] for a, b in zip(text.starts, text.stops, strict=True)]
    assert [pieces[place] for place in text.places] == [b"ab", b" ", b"12"]
    assert text.tokens_before(4) == pieces.index(b"ab")
    assert text.scored_bytes == 5


@pytest.mark.parametrize(
    "ranges", [((1, 12),), ((3, 12),), ((4, 10), (0, 2)), ((9, 12),), ((10, 15),), ((1, 3), (0, 4))]
)
def test_scored_bytes_are_those_of_the_scored_tokens(ranges: tuple[tuple[int, int], ...]) -> None:
    """Whatever of a token a range holds; a character that several tokens share counts once."""
    tokenizer, text = TransformersTokenizer(tiny_tokenizer(), 270), "the ab 12é the"
    spans = tokenizer.tokenize(text).spans[1:]
    assert len(set(spans)) < len(spans)  # é is two tokens
    own = [{place for start, stop in spans if a <= start < b for place in range(start, stop)} for a, b in ranges]
    assert TokenDocument.of(Document(text, 0, ranges), tokenizer).scored_bytes == sum(map(len, own))
