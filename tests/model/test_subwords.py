"""Texts to tokens and back, for each way in which fast tokenizers cut texts: bytes, pieces with spaces, likely ones;
and for the one that is trained here."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from bayes_dispatch.errors import ConfigError, PromptError, TensorError
from bayes_dispatch.model.subwords import SubwordTokenizer, train_subwords
from bayes_dispatch.model.transformers.tokenizer import TransformersTokenizer
from tests.tiny import tiny_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "a", "b", "c", " ", "ab", "▁a", "▁ab", "é", "ß", "日", "\n"]


def wrapped(inner: Tokenizer) -> TransformersTokenizer:
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return TransformersTokenizer(fast, 300, [2])


def byte_level() -> TransformersTokenizer:
    return TransformersTokenizer(tiny_tokenizer(), 270, [2])


def trimmed() -> TransformersTokenizer:
    """As GPT-2 has it: offsets leave spaces out."""
    fast = tiny_tokenizer()
    fast.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    return TransformersTokenizer(fast, 270, [2])


def sentencepiece() -> TransformersTokenizer:
    """As Llama 2 has it: spaces are written, one is put before all, and bytes stand for what is not known."""
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *BYTES, *PIECES])}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(inner)


def unigram(**settings: Any) -> TransformersTokenizer:
    scores = [(token, -float(1 + n % 7) if n > 258 else -20.0) for n, token in enumerate([*SPECIAL, *BYTES, *PIECES])]
    inner = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(**settings)
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**settings)])
    return wrapped(inner)


def unigram_alone() -> TransformersTokenizer:
    """No space before a text."""
    return unigram(prepend_scheme="never")


LEARNT = ["the other the other", "ab ab  ab", "é日ß 12", "a 😀😀 b\n a\n"] * 3


def trained() -> SubwordTokenizer:
    return train_subwords(LEARNT, 290)


SORTS: list[Callable[[], SubwordTokenizer]] = [byte_level, trimmed, sentencepiece, unigram, unigram_alone, trained]
FAST = [sort for sort in SORTS if sort is not trained]
TEXTS = ["", "a", " a", "ab  ab ", "é日ß", "a 😀😀 b", "the</s> <s>12", "  ", "\n a\n", "a\u0301 👩‍👩‍👧 b", "�a"]


@pytest.fixture(scope="module", params=SORTS, ids=lambda sort: sort.__name__)
def tokenizer(request: pytest.FixtureRequest) -> SubwordTokenizer:
    return request.param()  # type: ignore[no-any-return]


def check(tokenizer: SubwordTokenizer, text: str) -> None:
    whole = tokenizer.tokenize(text)
    count = len(tokenizer.prefix)
    assert whole.ids[:count] == tokenizer.prefix
    assert whole.spans[:count] == ((0, 0),) * count
    lost = (
        tokenizer.decode(whole.ids) == text.removeprefix(" ") and tokenizer.decode(tokenizer.tokenize("a").ids) == "a"
    )
    assert tokenizer.decode(whole.ids) == text or lost  # Metaspace takes a space at the beginning for its own
    reached = 0  # all bytes are covered, in order
    for start, stop in whole.spans[count:]:
        assert start <= reached <= stop
        reached = stop
    assert reached == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_spans_cover_the_text_and_its_tokens_say_it(tokenizer: SubwordTokenizer, text: str) -> None:
    check(tokenizer, text)
    check(tokenizer, text * 7)


@pytest.mark.parametrize("sort", SORTS)
def test_spans_cover_any_text(sort: Callable[[], SubwordTokenizer]) -> None:
    made = sort()

    @settings(max_examples=60, deadline=None)
    @given(st.text(alphabet="ab é日😀\n</s>", max_size=12))
    def law(text: str) -> None:
        check(made, text)

    law()


@pytest.mark.parametrize("sort", SORTS)
def test_a_stream_says_what_the_whole_says_after_its_context(sort: Callable[[], SubwordTokenizer]) -> None:
    """For any ids at all, so also for half characters, in the context and at the end."""
    made = sort()
    allowed = st.lists(st.sampled_from(made.continues.nonzero().flatten().tolist()), max_size=14)

    @settings(max_examples=60, deadline=None)
    @given(allowed, st.text(alphabet="ab é日😀\n", max_size=14), st.integers(0, 14))
    def law(drawn: list[int], text: str, begun: int) -> None:
        ids = drawn or list(made.tokenize(text).ids)
        before, whole = made.decode(ids[:begun]), made.decode(ids)
        stream = made.stream(ids[:begun])
        said = [stream.add(id_) for id_ in ids[begun:]]
        if not before.endswith("�"):
            assert few("".join(said) + stream.end()) == few(whole.removeprefix(before))

    law()


def few(text: str) -> str:
    """How often U+FFFD stands for bytes that are none is a decoder's own affair."""
    return re.sub("�+", "�", text)


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_goes_on_keeps_its_spaces(tokenizer: SubwordTokenizer, text: str) -> None:
    for context in ("ab", "a ", "\n", "é", "a�"):
        stream = tokenizer.stream(tokenizer.tokenize(context).ids)
        assert "".join(map(stream.add, tokenizer.tokenize(text, begin=False).ids)) + stream.end() == text


def test_half_a_character_waits_and_is_given_up_at_the_end() -> None:
    made = byte_level()
    ids = made.tokenize("😀", begin=False).ids
    assert len(ids) == 4
    stream = made.stream(())
    assert [stream.add(id_) for id_ in ids] == ["", "", "", "😀"]
    stream = made.stream(())
    assert [stream.add(id_) for id_ in ids[:3]] == ["", "", ""]
    assert set(stream.end()) == {"�"}


@pytest.mark.parametrize("tokenizer", FAST, indirect=True)
def test_special_tokens_that_are_written_out_are_text(tokenizer: TransformersTokenizer) -> None:
    ids = tokenizer.tokenize("</s><s>", begin=False).ids
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "</s><s>"
    tokenizer.inner("</s>")  # whoever else asks the tokenizer of that library changes nothing
    assert tokenizer.tokenize("</s><s>", begin=False).ids == ids


@pytest.mark.parametrize("tokenizer", FAST, indirect=True)
def test_what_may_continue_a_text_has_tokens_and_no_special_ones_but_ends(tokenizer: TransformersTokenizer) -> None:
    assert tokenizer.continues.shape == (tokenizer.vocab_size,)
    assert bool(tokenizer.continues[2])
    assert not tokenizer.continues[[0, 1]].any()
    assert not tokenizer.continues[len(tokenizer.inner) :].any()
    assert tokenizer.continues[3:200].all()
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.decode([*tokenizer.tokenize("ab", begin=False).ids, -1, -1]) == "ab"  # as of a row that has ended


def test_text_that_is_no_utf8_is_refused(tokenizer: SubwordTokenizer) -> None:
    for text in (b"a\xff", "\ud800"):
        with pytest.raises(PromptError, match="expected UTF-8"):
            tokenizer.tokenize(text)


def test_nothing_of_a_long_text_is_cut_off() -> None:
    fast = tiny_tokenizer()
    fast.backend_tokenizer.enable_truncation(5)
    fast.backend_tokenizer.enable_padding(length=50)
    made = TransformersTokenizer(fast, 270, [2])
    assert len(made.tokenize("c" * 100).ids) == 101
    assert len(made.tokenize("c").ids) == 2


def test_a_stream_costs_the_same_for_each_token(tokenizer: SubwordTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens are decoded again with the last as with earlier ones, also where no character ends."""
    decoded: list[int] = []
    said = SubwordTokenizer.said

    def counted(self: SubwordTokenizer, ids: list[int]) -> str:
        decoded.append(len(ids))
        return said(self, ids)

    lone = next(id_ for id_ in range(3, 259) if tokenizer.decode([id_]) == "�")
    monkeypatch.setattr(SubwordTokenizer, "said", counted)
    for ids in ([5, 60, 70], [lone]):
        stream, costs = tokenizer.stream(()), []
        for n in range(1200):
            decoded.clear()
            stream.add(ids[n % len(ids)])
            costs.append(sum(decoded))
        assert sum(costs[600:]) <= 1.1 * sum(costs[:600])
        assert max(costs[600:]) <= 1.1 * max(costs[:600])


def test_the_same_texts_give_the_same_tokenizer() -> None:
    made = trained()
    assert train_subwords(iter(LEARNT), 290).to_json() == made.to_json()
    assert made.digest() == trained().digest() != train_subwords(LEARNT, 270).digest()
    assert made.vocab_size <= 290
    assert len(made.tokenize("the other").ids) < len("the other")  # merges were learnt
    assert train_subwords([], 258).tokenize("ab", begin=False).spans == ((0, 1), (1, 2))


def test_begin_and_padding_of_a_trained_tokenizer_are_no_text() -> None:
    made = trained()
    (begin,) = made.prefix
    assert {begin, made.pad_token_id} == set((~made.continues).nonzero().flatten().tolist())
    assert made.ends == frozenset()
    ids = made.tokenize("<bos><pad>").ids
    assert made.pad_token_id not in ids
    assert ids.count(begin) == 1
    assert made.decode(ids) == "<bos><pad>"


def test_a_tokenizer_of_json_is_that_which_was_written() -> None:
    made = trained()
    read = SubwordTokenizer.from_json(made.to_json(), made.vocab_size + 7)
    assert read.to_json() == made.to_json()
    for text in TEXTS:
        assert read.tokenize(text) == made.tokenize(text)
    assert not read.continues[made.vocab_size :].any()


@pytest.mark.parametrize(
    ("data", "size", "told"),
    [
        (b"{", 300, "expected a tokenizer of the tokenizers library"),
        (b"\xff", 300, "expected a tokenizer of the tokenizers library"),
        (b'{"model": {"type": "Unknown"}}', 300, "expected a tokenizer of the tokenizers library"),
        (Tokenizer(models.BPE()).to_str().encode(), 300, "expected a tokenizer with the tokens <bos> and <pad>"),
        (trained().to_json(), 258, "expected a tokenizer of at most 258 ids"),
    ],
)
def test_what_is_no_tokenizer_of_this_model_is_refused(data: bytes, size: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SubwordTokenizer.from_json(data, size)


def test_one_without_tokens_is_refused() -> None:
    settings = {"prefix": [], "pad": 0, "special": []}
    with pytest.raises(ConfigError, match="expected a tokenizer with tokens, got one without any"):
        SubwordTokenizer.from_json(Tokenizer(models.BPE()).to_str().encode(), 300, settings)


def with_settings(**changed: Any) -> SubwordTokenizer:
    made = trained()
    return SubwordTokenizer.from_json(made.to_json(), 300, made.settings | changed)


def test_digests_tell_settings() -> None:
    """What is trained here has the digest that it had when only its vocabulary was hashed."""
    (begin,), pad = trained().prefix, trained().pad_token_id
    others = [
        {"prefix": []},
        {"prefix": [begin, begin]},
        {"pad": 5},
        {"special": [begin]},
        {"unknown": pad},
        {"ends": [7]},
    ]
    digests = [trained().digest(), *(with_settings(**each).digest() for each in others)]
    assert len(set(digests)) == 7
    assert digests[0] == hashlib.blake2b(trained().to_json(), digest_size=16).hexdigest()
    assert with_settings().digest() == digests[0]
    same = (with_settings(ends=ends, special=special) for ends, special in (([7, 5], [1, 0]), ([5, 7, 7], [0, 1])))
    assert len({each.digest() for each in same}) == 1


@pytest.mark.parametrize("name", ["prefix", "pad", "special", "unknown", "ends"])
@pytest.mark.parametrize("id_", [-1, 300, True])
def test_ids_of_settings_are_those_of_the_embedding(name: str, id_: object) -> None:
    value = id_ if name in ("pad", "unknown") else [0, id_]
    with pytest.raises(ConfigError, match=f"^expected {name} of a text among 300 ids, got {id_}$"):
        with_settings(**{name: value})


def test_texts_to_learn_from_are_several_and_utf8() -> None:
    expected = train_subwords(LEARNT, 300).digest()
    assert train_subwords((text.encode() for text in LEARNT), 300).digest() == expected  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^expected several texts, got one: 'the the'"):
        train_subwords("the the", 300)
    with pytest.raises(PromptError, match=r"^expected UTF-8 text, got the lone surrogate"):
        train_subwords(["the", "\ud800"], 300)


@pytest.mark.parametrize("id_", [300, 2**40])
def test_ids_beyond_the_embedding_are_no_text(id_: int) -> None:
    tokenizer = with_settings()
    assert tokenizer.decode([299, *tokenizer.tokenize("the").ids, -1]) == "the"
    with pytest.raises(TensorError, match=rf"^expected ids in 0 … 299, got 5 … {id_}$"):
        tokenizer.decode([5, id_, -1])


def test_a_vocabulary_has_all_bytes() -> None:
    with pytest.raises(ConfigError, match="expected vocab_size to be a whole number ≥ 258, got 257"):
        train_subwords(LEARNT, 257)
