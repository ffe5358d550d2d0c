"""Sequence to sequence: the decoder's cache changes nothing but the time, however rows are split, reordered, copied,
grown or stored. The encoder runs once, and its memory stands for its input."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.cache import Cache, CrossAttentionState
from bayes_dispatch.model.mambaformer.mixers import Memory
from tests.model.seq2seq import close, pad, scales, tokens

if TYPE_CHECKING:
    from bayes_dispatch.model.seq2seq.model import MambaFormerForSeq2Seq

MakeSeq2Seq = Callable[..., "MambaFormerForSeq2Seq"]

sizes = st.fixed_dictionaries(
    {
        "mixer": st.sampled_from(["mamba1", "mamba2"]),
        "n_pairs": st.integers(0, 2),
        "n_kv_heads": st.sampled_from([None, 1]),
        "positions": st.sampled_from(["none", "rotary"]),
        "attention_window": st.sampled_from([None, 2]),
        "blocks": st.sampled_from([None, None, ("attention", "feed_forward")]),
    }
)


@settings(max_examples=10, deadline=None)
@given(
    sizes=sizes,
    seed=st.integers(0, 99),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    cuts=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=3, max_size=3),
    lefts=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    adapted=st.booleans(),
    again=st.booleans(),
)
def test_any_split_of_a_ragged_batch_gives_each_row_alone(
    make_seq2seq: MakeSeq2Seq,
    sizes: dict[str, Any],
    seed: int,
    lengths: list[int],
    cuts: list[list[int]],
    lefts: list[int],
    adapted: bool,
    again: bool,
) -> None:
    """Encoders' and decoders' rows of any length, padded anywhere; the decoder reads in pieces, some of them empty."""
    model = make_seq2seq(seed, **sizes)
    inputs = [tokens(seed + b, n) for b, n in enumerate(lengths)]
    outputs = [tokens(seed + 50 + b, sum(cuts[b])) for b in range(len(inputs))]
    adaptation = scales(model, len(inputs)) if adapted else None
    ids, mask = pad(inputs, lefts)
    cache = model.init_cache(len(inputs), max(1, *map(len, outputs)))
    got: list[list[Tensor]] = [[] for _ in inputs]
    with torch.no_grad():
        for piece in range(3):
            parts = [output.split(cuts[b])[piece] for b, output in enumerate(outputs)]
            decoder_ids, decoder_mask = pad(parts, lefts[::-1])
            given = (ids, mask) if again or piece == 0 else (None, None)
            out = model(
                given[0],
                decoder_ids,
                attention_mask=given[1],
                decoder_attention_mask=decoder_mask,
                cache=cache,
                adaptation=adaptation,
            )
            assert (out.memory is None) == (piece > 0)
            for b in range(len(inputs)):
                got[b].append(out.logits[b, decoder_mask[b].bool()])
        for b, (row, output) in enumerate(zip(inputs, outputs, strict=True)):
            if len(output):
                own = adaptation.select([b]) if adaptation else None
                close(torch.cat(got[b]), model(row[None], output[None], adaptation=own).logits[0])
    assert cache.lengths.tolist() == [len(output) for output in outputs]


def test_a_memory_stands_for_its_input(make_seq2seq: MakeSeq2Seq) -> None:
    model = make_seq2seq()
    ids, mask = pad([tokens(0, 6), tokens(1, 3)], [2])
    decoder_ids = tokens(2, 2, 5)
    with torch.no_grad():
        expected = model(ids, decoder_ids, attention_mask=mask)
        memory = model.encode(ids, mask)
        assert torch.equal(expected.memory.hidden, memory.hidden)
        assert torch.equal(model(None, decoder_ids, memory=memory).logits, expected.logits)
        by_hand = Memory(memory.hidden, memory.visible)
        assert torch.equal(model(None, decoder_ids, memory=by_hand).logits, expected.logits)
        cache = model.init_cache(2, 5)
        first = model(None, decoder_ids[:, :2], memory=memory, cache=cache).logits
        rest = model(None, decoder_ids[:, 2:], memory=memory, cache=cache).logits  # compared, not read
        close(torch.cat([first, rest], 1), expected.logits)


@pytest.fixture(scope="module")
def model(make_seq2seq: MakeSeq2Seq) -> "MambaFormerForSeq2Seq":
    """Not to be changed."""
    return make_seq2seq(n_kv_heads=1)


class TestCacheOperations:
    """Each against rows that are read whole: of the reordered inputs and outputs."""

    def filled(self, model: "MambaFormerForSeq2Seq", **settings: Any) -> tuple[Cache, Adaptation]:
        ids, mask = pad([tokens(b, n) for b, n in enumerate((5, 2, 4))], [0, 9, 1])
        adaptation = scales(model, 3)
        cache = model.init_cache(3, 9, **settings)
        with torch.no_grad():
            model(ids, tokens(5, 3, 3), attention_mask=mask, cache=cache, adaptation=adaptation)
        return cache, adaptation

    def check(
        self, model: "MambaFormerForSeq2Seq", cache: Cache, adaptation: Adaptation, rows: list[int], atol: float = 1e-10
    ) -> None:
        ids, mask = pad([tokens(b, n) for b, n in enumerate((5, 2, 4))], [0, 9, 1])
        decoder_ids = torch.cat([tokens(5, 3, 3)[rows], tokens(6, len(rows), 2)], 1)
        own = adaptation.select(rows)
        with torch.no_grad():
            got = model(None, decoder_ids[:, 3:], cache=cache, adaptation=own).logits
            full = model(ids[rows], decoder_ids, attention_mask=mask[rows], adaptation=own).logits
        close(got, full[:, 3:], atol)

    @pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 0, 2, 2, 1]])
    def test_reorder(self, model: "MambaFormerForSeq2Seq", rows: list[int]) -> None:
        cache, adaptation = self.filled(model)
        self.check(model, cache.reorder(rows), adaptation, rows)

    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize("one_prompt", [False, True])
    def test_swapped_rows(self, model: "MambaFormerForSeq2Seq", adapted: bool, one_prompt: bool) -> None:
        """Of other inputs, or of one under other scales of the decoder, or of one."""
        ids, decoder_ids = tokens(0, 1 if one_prompt else 2, 5).expand(2, -1), tokens(1, 2, 4)
        adaptation = scales(model, 2, only="decoder.") if adapted else Adaptation.identity()
        cache = model.init_cache(2, 4)
        with torch.no_grad():
            model(ids, decoder_ids[:, :2], cache=cache, adaptation=adaptation)
            own = adaptation.select([1, 0])
            got = model(None, decoder_ids.flip(0)[:, 2:], cache=cache.reorder([1, 0]), adaptation=own).logits
            full = model(ids, decoder_ids, adaptation=adaptation).logits
        close(got, full.flip(0)[:, 2:])

    def test_reorder_within_a_prompt_keeps_what_the_encoder_read(self, model: "MambaFormerForSeq2Seq") -> None:
        cache, adaptation = self.filled(model)
        rows = [0, 0, 1, 1, 2, 2]
        cache.reorder(rows)
        places = [state.keys.data_ptr() for state in cache.states if isinstance(state, CrossAttentionState)]
        cache.reorder([1, 0, 3, 3, 4, 5])
        assert places == [state.keys.data_ptr() for state in cache.states if isinstance(state, CrossAttentionState)]
        self.check(model, cache, adaptation, rows)

    def test_expand_and_clone(self, model: "MambaFormerForSeq2Seq") -> None:
        cache, adaptation = self.filled(model)
        copied = cache.clone()
        self.check(model, cache.expand(2), adaptation, [0, 0, 1, 1, 2, 2])
        self.check(model, copied, adaptation, [0, 1, 2])

    @torch.no_grad()
    def test_rows_that_read_other_lengths_are_not_joined(self, model: "MambaFormerForSeq2Seq") -> None:
        cache, adaptation = self.filled(model)
        other = model.init_cache(1, 9)
        model(tokens(3, 1, 3), tokens(4, 1, 2), attention_mask=torch.tensor([[1, 1, 0]]), cache=other)
        with pytest.raises(TensorError, match=r"^expected keys of shape .* in each row, got "):
            cache.join(other)
        self.check(model, cache, adaptation, [0, 1, 2])

    @pytest.mark.parametrize("n_pairs", [1, 2])
    def test_save_and_load(self, make_seq2seq: MakeSeq2Seq, n_pairs: int, tmp_path: Path) -> None:
        """Two pairs have two blocks of cross-attention, which share the mask of their source."""
        model = make_seq2seq(n_kv_heads=1, n_pairs=n_pairs)
        cache, adaptation = self.filled(model)
        cache.save(tmp_path / "cache.safetensors")
        self.check(model, Cache.load(tmp_path / "cache.safetensors"), adaptation, [0, 1, 2])
        model.init_cache(2, 3, kv_dtype=torch.int8).save(tmp_path / "empty.safetensors")
        again = Cache.load(tmp_path / "empty.safetensors")
        with torch.no_grad():
            model(tokens(0, 2, 3), tokens(1, 2, 2), cache=again)
        assert {layer.dtype for layer in again.info().layers if layer.kind == "CrossAttentionState"} == {"int8"}

    def test_growth(self, model: "MambaFormerForSeq2Seq") -> None:
        cache, ids, decoder_ids = model.init_cache(2, 1, grow=True), tokens(8, 2, 4), tokens(9, 2, 6)
        with torch.no_grad():
            got = torch.cat([model(ids, part, cache=cache).logits for part in decoder_ids.split(2, 1)], 1)
            close(got, model(ids, decoder_ids).logits)

    def test_reset(self, model: "MambaFormerForSeq2Seq") -> None:
        cache, _ = self.filled(model)
        cache.reset()
        assert not any(state.tensors() for state in cache.states if isinstance(state, CrossAttentionState))
        with torch.no_grad():
            got = model(tokens(8, 3, 4), tokens(9, 3, 4), cache=cache).logits
            close(got, model(tokens(8, 3, 4), tokens(9, 3, 4)).logits)

    @pytest.mark.parametrize(("kv_dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.3), (torch.int8, 0.3)])
    def test_keys_and_values_in_less_precision(
        self, model: "MambaFormerForSeq2Seq", kv_dtype: torch.dtype, atol: float
    ) -> None:
        cache, adaptation = self.filled(model, kv_dtype=kv_dtype)
        (layer,) = (layer for layer in cache.info().layers if layer.kind == "CrossAttentionState")
        assert layer.dtype == str(kv_dtype).removeprefix("torch.")
        per_vector = 8 * torch.empty(0, dtype=kv_dtype).element_size() + (4 if kv_dtype == torch.int8 else 0)
        assert layer.nbytes == 3 * (5 * 2 * per_vector + 5 + 32)  # keys and values, what is visible, and the source
        self.check(model, cache, adaptation, [0, 1, 2], atol)
        with pytest.raises(AssertionError):
            self.check(model, self.filled(model, kv_dtype=kv_dtype)[0], adaptation, [0, 1, 2], atol * 1e-4)
        ids, decoder_ids = tokens(8, 2, 4), tokens(9, 2, 4)
        with torch.no_grad():  # the first call sees what later ones see
            whole = model(ids, decoder_ids, cache=model.init_cache(2, 4, kv_dtype=kv_dtype)).logits
            parted = model.init_cache(2, 4, kv_dtype=kv_dtype)
            parts = [model(ids, part, cache=parted).logits for part in decoder_ids.split(1, 1)]
        close(torch.cat(parts, 1), whole)


@pytest.mark.usefixtures("unchecked")
def test_the_encoder_and_its_keys_are_computed_once(make_seq2seq: MakeSeq2Seq) -> None:
    model = make_seq2seq(n_pairs=2)
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("kv_proj") or name == "encoder":
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected = ["encoder", *(f"decoder.blocks.{i}.mixer.kv_proj" for i in (2, 5))]
    cache, ids = model.init_cache(2, 8), tokens(0, 2, 4)
    with torch.no_grad():
        for token in tokens(1, 2, 5).split(1, 1):
            model(ids, token, cache=cache)
    assert calls == expected
    for way in ({}, {"num_beams": 3}, {"do_sample": True}):
        calls.clear()
        model.generate(ids, max_new_tokens=6, **way)
        assert calls == expected
    calls.clear()
    model.generate(ids, max_new_tokens=6, use_cache=False)
    assert calls == ["encoder", *expected[1:] * 6]
