"""Laws: continuing from a cache equals reading everything at once, however the sequence is cut and padded; a cache of
other weights or scales, or one whose change was interrupted, is refused."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import BayesDispatchError, CacheFullError, ConfigError, StaleCacheError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer import blocks
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.compiled.switch import tensors_only
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from tests.model.tensors import tokens

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}

# Sizes, not configurations: the type checks of the latter use `random`, which hypothesis forbids while it draws.
configs = st.builds(
    lambda heads, pairs, taps, chunk, head_dim, window: {
        "d_model": 16,
        "n_pairs": pairs,
        "n_heads": heads[0],
        "n_kv_heads": heads[1],
        "d_state": 4,
        "d_conv": taps,
        "head_dim": head_dim,
        "chunk_size": chunk,
        "attention_window": window,
    },
    heads=st.sampled_from([(1, None), (2, 2), (4, 2), (4, 1)]),
    pairs=st.integers(0, 2),
    taps=st.integers(2, 5),
    chunk=st.sampled_from([1, 4, 7, 64]),
    head_dim=st.sampled_from([4, 16]),
    window=st.none() | st.integers(1, 6),
)


def scales(model: "MambaFormerForCausalLM", rows: int | None = None, seed: int = 0, only: str = "") -> Adaptation:
    """Random scales of the matrices whose names begin with ``only``."""
    draw = torch.Generator().manual_seed(seed)
    lead = () if rows is None else (rows,)
    return Adaptation(
        {
            name: (1 + 0.3 * torch.randn(*lead, rank, generator=draw)).to(model.dtype)
            for name, rank in model.adaptable().items()
            if name.startswith(only)
        }
    )


def pad(rows: Sequence[Tensor], sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of ids in one batch; row b has ``sides[b]`` of its padding on its left (as many as there are)."""
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), 257)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        left = min(sides[b], width - len(row))
        ids[b, left : left + len(row)] = row
        mask[b, left : left + len(row)] = 1
    return ids, mask


@settings(max_examples=20, deadline=None)
@given(
    config=configs,
    seed=st.integers(0, 1000),
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    batch=st.integers(1, 3),
    adapted=st.sampled_from(["no", "shared", "rows"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    at_once=st.sampled_from([3, blocks.PIECE]),
)
def test_any_split_gives_the_full_forward(
    make_model: MakeModel,
    config: dict[str, Any],
    seed: int,
    pieces: list[int],
    batch: int,
    adapted: str,
    dtype: torch.dtype,
    at_once: int,
) -> None:
    model = make_model(MambaFormerConfig(**config), seed=seed, dtype=dtype, tie_embeddings=bool(seed % 2))
    ids = tokens(seed, batch, sum(pieces))
    adaptation = None if adapted == "no" else scales(model, batch if adapted == "rows" else None)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "PIECE", at_once)
        full = model(ids, adaptation=adaptation).logits
        cache = model.init_cache(batch, ids.shape[1])
        parts = [model(part, cache=cache, adaptation=adaptation).logits for part in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=TOLERANCE[dtype])
    assert cache.lengths.tolist() == [ids.shape[1]] * batch


@settings(max_examples=20, deadline=None)
@given(
    config=configs,
    seed=st.integers(0, 1000),
    cuts=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=4),
    sides=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    adapted=st.booleans(),
    at_once=st.sampled_from([3, blocks.PIECE]),
)
def test_ragged_continuation_gives_each_row_alone(
    make_model: MakeModel,
    config: dict[str, Any],
    seed: int,
    cuts: list[list[int]],
    sides: list[int],
    adapted: bool,
    at_once: int,
) -> None:
    """Each row is read in four pieces of its own lengths, some of them empty, padded left, right or on both sides."""
    model = make_model(MambaFormerConfig(**config), seed=seed, dtype=torch.float64)
    batch = len(cuts)
    rows = [tokens(seed + b, sum(cut)) for b, cut in enumerate(cuts)]
    adaptation = scales(model, batch) if adapted else None
    cache = model.init_cache(batch, max(1, *map(len, rows)))
    got: list[list[Tensor]] = [[] for _ in rows]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "PIECE", at_once)
        for piece in range(4):
            parts = [row.split(cut)[piece] for row, cut in zip(rows, cuts, strict=True)]
            ids, mask = pad(parts, sides)
            logits = model(ids, attention_mask=mask, cache=cache, adaptation=adaptation).logits
            for b in range(batch):
                got[b].append(logits[b, mask[b].bool()])
        for b, row in enumerate(rows):
            if len(row):
                alone = model(row[None], adaptation=adaptation.select([b]) if adaptation else None).logits[0]
                torch.testing.assert_close(torch.cat(got[b]), alone, rtol=0, atol=1e-10)
    assert cache.lengths.tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sides", [[0, 0, 0], [9, 9, 9], [2, 0, 1]])
def test_a_padded_batch_gives_each_row_alone(make_model: MakeModel, dtype: torch.dtype, sides: list[int]) -> None:
    model = make_model(dtype=dtype)
    rows = [tokens(b, n) for b, n in enumerate((11, 3, 8))]
    ids, mask = pad(rows, sides)
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
        for b, row in enumerate(rows):
            alone = model(row[None])
            for got, expected in ((out.logits, alone.logits), (out.hidden, alone.hidden)):
                torch.testing.assert_close(got[b, mask[b].bool()], expected[0], rtol=0, atol=TOLERANCE[dtype])


def test_padding_content_does_not_matter(model64: "MambaFormerForCausalLM") -> None:
    ids, mask = pad([tokens(0, 9), tokens(1, 4)], [0, 2])
    other = torch.where(mask.bool(), ids, 7)
    with torch.no_grad():
        a, b = (model64(x, attention_mask=mask).logits[mask.bool()] for x in (ids, other))
    assert torch.equal(a, b)


def test_reset_is_a_new_cache_in_the_same_memory(model64: "MambaFormerForCausalLM") -> None:
    ids = tokens(2, 2, 7)
    cache = model64.init_cache(2, 7)
    places = [t.data_ptr() for state in cache.states for t in state.tensors().values()]
    with torch.no_grad():
        first = model64(ids, cache=cache, adaptation=scales(model64)).logits
        cache.reset()
        assert cache.lengths.tolist() == [0, 0]
        second = model64(ids, cache=cache).logits  # under other scales
        assert torch.equal(second, model64(ids, cache=model64.init_cache(2, 7)).logits)
    assert not torch.allclose(first, second)
    assert places == [t.data_ptr() for state in cache.states for t in state.tensors().values()]


def test_nbytes_counts_every_state(make_model: MakeModel) -> None:
    model = make_model(
        MambaFormerConfig(d_model=16, n_pairs=1, n_heads=4, n_kv_heads=2, d_state=4, d_conv=3, head_dim=8)
    )
    mamba = (2 * 16 + 2 * 4) * 2 + 4 * 8 * 4
    attention = 2 * 2 * 10 * 4
    assert model.init_cache(5, 10).nbytes == 5 * (2 * mamba + attention) * 4


class TestErrors:
    """What may not be continued is refused, and the refusal changes nothing."""

    @pytest.fixture
    def cache(self, model64: "MambaFormerForCausalLM") -> Cache:
        """Half full, under scales of all blocks."""
        cache = model64.init_cache(2, 8)
        with torch.no_grad():
            model64(tokens(3, 2, 4), cache=cache, adaptation=scales(model64))
        return cache

    def refused(
        self,
        model: "MambaFormerForCausalLM",
        cache: Cache,
        error: type[BayesDispatchError],
        text: str,
        **changed: object,
    ) -> None:
        given = {"input_ids": tokens(4, 2, 2), "adaptation": scales(model)} | changed
        before = [t.clone() for state in cache.states for t in state.tensors().values()]
        with pytest.raises(error, match=text) as raised, torch.no_grad():
            model(**given, cache=cache)
        assert "\n" not in str(raised.value)
        after = [t for state in cache.states for t in state.tensors().values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert cache.lengths.tolist() == [4, 4]

    def test_equal_scales_in_another_object_continue(self, model64: "MambaFormerForCausalLM", cache: Cache) -> None:
        with torch.no_grad():
            got = model64(tokens(4, 2, 2), cache=cache, adaptation=scales(model64)).logits
            full = model64(torch.cat([tokens(3, 2, 4), tokens(4, 2, 2)], 1), adaptation=scales(model64)).logits
        torch.testing.assert_close(got, full[:, 4:], rtol=0, atol=1e-10)

    def test_other_scales(self, model64: "MambaFormerForCausalLM", cache: Cache) -> None:
        text = "expected the scales that filled block 0"
        self.refused(model64, cache, StaleCacheError, text, adaptation=scales(model64, seed=1))
        self.refused(model64, cache, StaleCacheError, text, adaptation=scales(model64, rows=2))

    def test_no_scales(self, model64: "MambaFormerForCausalLM", cache: Cache) -> None:
        self.refused(model64, cache, StaleCacheError, "block 0 .* got others .none.", adaptation=None)
        self.refused(model64, cache, StaleCacheError, "block 0 .* got others .none.", adaptation=Adaptation.identity())

    def test_scales_after_none(self, model64: "MambaFormerForCausalLM") -> None:
        cache = model64.init_cache(2, 8)
        with torch.no_grad():
            model64(tokens(3, 2, 4), cache=cache)
        self.refused(model64, cache, StaleCacheError, r"block 0 \(none\)")

    def test_other_scales_of_a_late_block_alone(self, model64: "MambaFormerForCausalLM", cache: Cache) -> None:
        """The blocks before it are not run either."""
        late = scales(model64, seed=1, only="blocks.2.").scales
        mixed = Adaptation({**scales(model64).scales, **late})
        self.refused(model64, cache, StaleCacheError, "block 2", adaptation=mixed)

    def test_another_model(self, make_model: MakeModel, cache: Cache) -> None:
        self.refused(make_model(seed=5, dtype=torch.float64), cache, StaleCacheError, "expected a cache of model")

    @pytest.mark.parametrize(
        "setting", [{"attention_window": 3}, {"positions": "rotary"}, {"n_heads": 4}, {"dt_limit": (0.1, 0.2)}]
    )
    def test_the_same_weights_under_other_settings(
        self, make_model: MakeModel, model64: "MambaFormerForCausalLM", cache: Cache, setting: dict[str, Any]
    ) -> None:
        other = make_model(replace(model64.backbone, **setting), dtype=torch.float64)
        assert other.fingerprint() == model64.fingerprint()
        self.refused(other, cache, StaleCacheError, "expected a cache of model", adaptation=scales(model64))
        same = make_model(replace(model64.backbone, chunk_size=5), dtype=torch.float64)  # it changes no result
        for each in (copy.deepcopy(same), same):
            with torch.no_grad():
                each(tokens(4, 2, 2), cache=cache.clone(), adaptation=scales(model64))

    def test_the_same_model_in_another_dtype(self, model: "MambaFormerForCausalLM", cache: Cache) -> None:
        self.refused(model, cache, StaleCacheError, r"torch.float32.*torch.float64")

    def test_no_room(self, model64: "MambaFormerForCausalLM", cache: Cache) -> None:
        self.refused(model64, cache, CacheFullError, "at most 8 tokens .* got 9", input_ids=tokens(4, 2, 5))
        with torch.no_grad():  # a shorter row still has room, and the last place can be used
            mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
            model64(tokens(4, 2, 4), attention_mask=mask, cache=cache, adaptation=scales(model64))
        assert cache.lengths.tolist() == [8, 6]

    def test_another_batch(self, model64: "MambaFormerForCausalLM", cache: Cache) -> None:
        self.refused(model64, cache, TensorError, "batch of 2 rows for this cache, got 3", input_ids=tokens(4, 3, 2))

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 3), (2.5, 10), (2, "9")])
    def test_sizes(self, model64: "MambaFormerForCausalLM", size: tuple[Any, Any]) -> None:
        with pytest.raises(ConfigError, match=r"expected (batch_size|max_length) to be a whole number ≥ 1, got"):
            model64.init_cache(*size)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("dtypes", [{"dtype": "float16"}, {"kv_dtype": "int8"}, {"dtype": torch.int8}])
    def test_dtypes(self, model64: "MambaFormerForCausalLM", dtypes: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"^expected a float dtype, and a float one or int8 for kv_dtype, got "):
            model64.init_cache(1, 4, **dtypes)


class TestInterruptions:
    """A change takes effect whole, or the cache says that it is spoilt."""

    @pytest.mark.parametrize("length", [1, 3])
    @pytest.mark.parametrize("block", [0, 1, 2])
    def test_a_forward_that_stops_half_way(self, make_model: MakeModel, block: int, length: int) -> None:
        model, ids = make_model(dtype=torch.float64), tokens(0, 2, 8)
        new = ids[:, 8 - length :]

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with torch.no_grad(), tensors_only():
            cache = model.init_cache(2, 16)
            model(ids, cache=cache)
            hook = model.blocks[block].register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model(new, cache=cache)
            hook.remove()
            assert cache.info().lengths == (8, 8)
            for use in (
                lambda: model(new, cache=cache),
                lambda: cache.reorder([0]),
                lambda: cache.expand(2),
                lambda: cache.prune(2),
                lambda: cache.reserve(32),
                cache.clone,
                lambda: cache.save("never"),
            ):
                with pytest.raises(StaleCacheError, match="got one that was interrupted as it changed: reset it"):
                    use()
            cache.reset()
            torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("change", ["reorder", "reserve"])
    def test_a_change_of_shape_that_stops_half_way(
        self, make_model: MakeModel, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is spoilt, and whole again once it is reset: no block has another shape than the others."""
        model, ids = make_model(dtype=torch.float64), tokens(0, 2, 4)
        with torch.no_grad():
            cache = model.init_cache(2, 8)
            model(ids, cache=cache)
            left = [2]

            def stops(done: Callable[..., Any]) -> Callable[..., Any]:
                def run(*given: Any) -> Any:
                    left[0] -= 1
                    if left[0] < 0:
                        raise KeyboardInterrupt
                    return done(*given)

                return run

            with monkeypatch.context() as patched:
                if change == "reorder":
                    patched.setattr(torch.Tensor, "index_select", stops(torch.Tensor.index_select))
                else:
                    left[0] = 1
                    patched.setattr("torch.nn.functional.pad", stops(torch.nn.functional.pad))
                with pytest.raises(KeyboardInterrupt):
                    cache.reorder([0, 1, 1, 0]) if change == "reorder" else cache.reserve(32)
            with pytest.raises(StaleCacheError, match="reset it"):
                model(ids, cache=cache)
            cache.reset()
            torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, rtol=0, atol=1e-10)

    def test_refused_arguments_spoil_nothing(self, model64: "MambaFormerForCausalLM") -> None:
        with torch.no_grad():
            cache = model64.init_cache(2, 8)
            model64(tokens(0, 2, 4), cache=cache)
            for refused in (
                lambda: model64(tokens(0, 2, 9), cache=cache),
                lambda: model64(tokens(0, 2, 1), cache=cache, adaptation=scales(model64)),
                lambda: cache.reorder([2]),
            ):
                with pytest.raises(BayesDispatchError):
                    refused()
            model64(tokens(1, 2, 4), cache=cache)

    def test_no_memory_to_grow(self, model64: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch) -> None:
        cache = model64.init_cache(2, 4, grow=True)
        monkeypatch.setattr(torch.nn.functional, "pad", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            cache.reserve(8)
        with pytest.raises(StaleCacheError, match="interrupted"), torch.no_grad():
            model64(tokens(0, 2, 2), cache=cache)

    @pytest.mark.parametrize("change", ["none", "reorder", "prune", "reset"])
    def test_inference_mode_may_end(self, model64: "MambaFormerForCausalLM", change: str) -> None:
        """What was made in it is continued outside, with gradients and without."""
        ids, new = tokens(0, 2, 6), tokens(1, 2, 2)
        changes: dict[str, Callable[[Cache], object]] = {
            "none": lambda c: c,
            "reorder": lambda c: c.reorder([0, 1]),
            "prune": lambda c: c.prune(20),
            "reset": lambda c: (c.reset(), model64(ids, cache=c)),
        }
        for mode in (torch.no_grad, torch.enable_grad):
            with torch.inference_mode():
                cache = model64.init_cache(2, 16)
                model64(ids, cache=cache)
            with mode():
                changes[change](cache)
                got = model64(new, cache=cache).logits
                expected = model64(torch.cat([ids, new], 1)).logits[:, -2:]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
