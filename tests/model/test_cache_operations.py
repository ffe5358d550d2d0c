"""Moved, copied, stored, grown, shrunk, pruned and rounded, a cache goes on as its rows' own sequences would;
gradients pass through it. What does not fit, and rows that are not there, are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import BundleError, CacheFullError, ConfigError, StaleCacheError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.cache import Cache, CrossAttentionState
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.storage import read_tensors, write_tensors
from tests.model.tensors import tokens

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]
SMALL: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_state": 4, "head_dim": 8, "chunk_size": 4}
KINDS = {
    "mamba2": {"n_pairs": 1},
    "mamba1": {"n_pairs": 1, "mixer": "mamba1"},
    "window": {"n_pairs": 1, "attention_window": 3},
    "groups": {"blocks": ("mamba2", "feed_forward"), "n_groups": 2},
    "transformer": {"blocks": ("attention", "feed_forward"), "positions": "rotary"},
    "rotary window": {"blocks": ("attention", "mamba1"), "positions": "rotary", "attention_window": 4},
}
WRONG: list[dict[str, Any]] = [  # of a cache of three states
    {"made_by": ["", ""]},
    {"made_by": ["", "", 3]},
    {"made_by": [["", ""], "", ""]},
    {"capacity": "20"},
    {"capacity": 10**6},
    {"capacity": 6},
    {"capacity": None},
    {"first": -1},
    {"grow": 1},
    {"model": None},
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(make_model: MakeModel, kind: str, dtype: torch.dtype = torch.float64) -> "MambaFormerForCausalLM":
    return make_model(MambaFormerConfig(**SMALL | KINDS[kind]), dtype=dtype)


def scales(model: "MambaFormerForCausalLM", rows: int | None = None, seed: int = 0) -> Adaptation:
    draw = torch.Generator().manual_seed(seed)
    lead = () if rows is None else (rows,)
    return Adaptation(
        {
            name: (1 + 0.3 * torch.randn(*lead, rank, generator=draw)).to(model.dtype)
            for name, rank in model.adaptable().items()
        }
    )


def ragged(model: "MambaFormerForCausalLM", adaptation: Adaptation | None = None, **options: Any) -> Cache:
    """Three rows that have read 7, 2 and 5 tokens of ``tokens(b, 20)``."""
    cache = model.init_cache(3, 20, **options)
    ids = torch.stack([tokens(b, 20)[:7] for b in range(3)])
    mask = torch.arange(7) < torch.tensor([7, 2, 5])[:, None]
    model(ids, attention_mask=mask.long(), cache=cache, adaptation=adaptation)
    return cache


def continued(model: "MambaFormerForCausalLM", cache: Cache, rows: list[int], adaptation: Adaptation | None) -> None:
    """Four more tokens of ``rows`` give what each row gives alone; ``adaptation`` has these rows' scales."""
    read = torch.tensor([7, 2, 5])[torch.tensor(rows)].tolist()
    assert cache.lengths.tolist() == read
    ids = torch.stack([tokens(b, 20)[n : n + 4] for b, n in zip(rows, read, strict=True)])
    got = model(ids, cache=cache, adaptation=adaptation).logits
    for r, (b, n) in enumerate(zip(rows, read, strict=True)):
        one = None if adaptation is None else adaptation.select([r])
        alone = model(tokens(b, 20)[None, : n + 4], adaptation=one).logits
        torch.testing.assert_close(got[r], alone[0, n:], rtol=0, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), rows=st.lists(st.integers(0, 2), min_size=1, max_size=5), per_row=st.booleans()
)
@torch.no_grad()
def test_reordered_rows_continue_as_their_own(make_model: MakeModel, kind: str, rows: list[int], per_row: bool) -> None:
    model = build(make_model, kind)
    adaptation = scales(model, 3) if per_row else None
    cache = ragged(model, adaptation)
    assert cache.reorder(rows) is cache
    continued(model, cache, rows, None if adaptation is None else adaptation.select(rows))


@every_kind
@torch.no_grad()
def test_copies_of_rows_continue_as_their_own(make_model: MakeModel, kind: str) -> None:
    model = build(make_model, kind)
    cache = ragged(model).expand(2)
    assert cache.batch_size == 6
    continued(model, cache, [0, 0, 1, 1, 2, 2], None)


@every_kind
@torch.no_grad()
def test_a_clone_is_independent(make_model: MakeModel, kind: str) -> None:
    model = build(make_model, kind)
    cache = ragged(model, scales(model))
    copy = cache.clone()
    model(tokens(9, 3, 3), cache=cache, adaptation=scales(model))
    cache.reset()
    continued(model, copy, [0, 1, 2], scales(model))


@every_kind
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@torch.no_grad()
def test_a_stored_cache_continues(
    make_model: MakeModel, kind: str, kv_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model = build(make_model, kind)
    cache = ragged(model, scales(model, 3), kv_dtype=kv_dtype)
    cache.save(tmp_path / "cache.safetensors")
    loaded = Cache.load(tmp_path / "cache.safetensors")
    assert loaded.info() == cache.info()
    ids, adaptation = tokens(5, 3, 4), scales(model, 3)
    with pytest.raises(StaleCacheError):
        model(ids, cache=loaded, adaptation=scales(model, 3, seed=1))
    expected = model(ids, cache=cache, adaptation=adaptation).logits
    assert torch.equal(model(ids, cache=loaded, adaptation=adaptation).logits, expected)
    with pytest.raises(StaleCacheError, match="expected a cache of model"):
        make_model(seed=3, dtype=torch.float64)(ids, cache=loaded)


@torch.no_grad()
def test_a_cache_that_does_not_fit_together_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    """Where its digest is right, too; what is damaged otherwise: tests/test_damage.py."""
    path = tmp_path / "cache.safetensors"
    ragged(build(make_model, "mamba2")).save(path)
    tensors, header = read_tensors(path)
    for more, texts in (
        ({}, {"format": "pt"}),
        ({"9.ssm": torch.zeros(3, 2, 2)}, {}),
        ({"read": torch.tensor([1, 2])}, {}),
        ({"read": torch.tensor([7, 2, 21])}, {}),
        ({}, {"about": "{}"}),
        ({"0.ssm": torch.tensor(1.0)}, {}),
        *(({}, {"about": json.dumps(json.loads(header["about"]) | change)}) for change in WRONG),
    ):
        write_tensors(path, tensors | more, header | texts)
        with pytest.raises(BundleError, match=r"^expected .* got[^\n]*$"):
            Cache.load(path)


class TestBounds:
    """Memory stays where it should, and grows where it may."""

    @torch.no_grad()
    def test_a_stream_without_end_needs_no_more_memory(self, make_model: MakeModel) -> None:
        model = build(make_model, "rotary window")
        cache = model.init_cache(2)
        assert cache.capacity is None
        before = cache.nbytes
        ids = tokens(0, 2, 60)
        parts = [model(part, cache=cache).logits for part in ids.split([1, 2, 9, 1, 1, 30, 16], dim=1)]
        assert cache.nbytes == before
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-10)

    def test_a_window_bounds_memory_whatever_the_capacity(self, make_model: MakeModel) -> None:
        model = build(make_model, "window")
        assert model.init_cache(1, 50).nbytes == model.init_cache(1, 50_000).nbytes == model.init_cache(1).nbytes

    def test_attention_without_a_window_needs_a_bound(self, make_model: MakeModel) -> None:
        with pytest.raises(ConfigError, match="expected max_length for attention without a window, got None"):
            build(make_model, "mamba2").init_cache(1)

    @every_kind
    @torch.no_grad()
    def test_growth_changes_no_result(self, make_model: MakeModel, kind: str) -> None:
        model = build(make_model, kind)
        cache = model.init_cache(2, 2, grow=True)
        ids = tokens(1, 2, 19)
        parts = [model(part, cache=cache).logits for part in ids.split([1, 1, 1, 7, 9], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-10)
        assert cache.capacity == 20

    @every_kind
    @torch.no_grad()
    def test_room_that_is_reserved(self, make_model: MakeModel, kind: str) -> None:
        """As much as is asked for and no more; less than there is changes nothing."""
        model = build(make_model, kind)
        cache, ids = model.init_cache(2, 3), tokens(1, 2, 9)
        parts = [model(ids[:, :3], cache=cache).logits]
        cache.reserve(9)
        cache.reserve(4)
        assert cache.nbytes == model.init_cache(2, 9).nbytes
        parts.append(model(ids[:, 3:], cache=cache).logits)
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-10)
        if cache.capacity is not None:
            with pytest.raises(CacheFullError, match="at most 9 tokens in this cache, got 10"):
                model(ids[:, :1], cache=cache)

    @torch.no_grad()
    def test_pruning_makes_room(self, make_model: MakeModel) -> None:
        model = build(make_model, "mamba2")
        cache = model.init_cache(1, 8)
        model(tokens(0, 1, 8), cache=cache)
        with pytest.raises(CacheFullError, match="at most 8 tokens in this cache, got 9"):
            model(tokens(1, 1, 1), cache=cache)
        cache.prune(keep=5, sinks=1)
        model(tokens(1, 1, 2), cache=cache)
        assert cache.lengths.tolist() == [10]

    @pytest.mark.parametrize("sinks", [0, 2])
    @torch.no_grad()
    def test_pruned_attention_sees_the_sinks_and_the_last_tokens(self, make_model: MakeModel, sinks: int) -> None:
        """For one block of attention, whose keys depend on nothing but their own tokens, that is a shorter prompt."""
        model = make_model(MambaFormerConfig(**SMALL | {"blocks": ("attention",)}), dtype=torch.float64)
        cache = ragged(model)
        cache.prune(keep=3, sinks=sinks)
        next_ids = tokens(7, 3, 2)
        got = model(next_ids, cache=cache).logits
        for b, n in enumerate([7, 2, 5]):
            row = tokens(b, 20)[:n]
            kept = row if n <= 3 + sinks else torch.cat([row[:sinks], row[-3:]])
            alone = model(torch.cat([kept, next_ids[b]])[None]).logits
            torch.testing.assert_close(got[b], alone[0, len(kept) :], rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_pruning_all_but_enough_changes_nothing(self, make_model: MakeModel) -> None:
        model = build(make_model, "transformer")
        cache = ragged(model)
        cache.prune(keep=5, sinks=2)
        continued(model, cache, [0, 1, 2], None)


class TestPrecision:
    """Less precise states: the error is bounded, and it does not depend on how the prompt was cut."""

    @pytest.mark.parametrize(
        ("options", "bound"),
        [({"dtype": torch.bfloat16}, 0.15), ({"kv_dtype": torch.bfloat16}, 0.03), ({"kv_dtype": torch.int8}, 0.05)],
    )
    @torch.no_grad()
    def test_error_and_size(self, make_model: MakeModel, options: dict[str, Any], bound: float) -> None:
        model = make_model(MambaFormerConfig(d_model=32, n_pairs=2, n_heads=2, d_state=8, head_dim=16))
        ids = tokens(2, 4, 40)
        full = model(ids).logits
        cache = model.init_cache(4, 40, **options)
        got = torch.cat([model(part, cache=cache).logits for part in ids.split(8, dim=1)], dim=1)
        error = (got - full).abs().mean() / full.abs().mean()
        assert 1e-5 < error < bound
        assert cache.nbytes < model.init_cache(4, 40).nbytes

    @pytest.mark.parametrize("kind", ["transformer", "rotary window"])
    @pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
    @torch.no_grad()
    def test_rounded_keys_and_values_do_not_depend_on_the_split(
        self, make_model: MakeModel, kind: str, kv_dtype: torch.dtype
    ) -> None:
        model = build(make_model, kind)
        ids = tokens(3, 2, 17)
        results = []
        for split in ([17], [1] * 17, [5, 1, 11]):
            cache = model.init_cache(2, 17, kv_dtype=kv_dtype)
            results.append(torch.cat([model(part, cache=cache).logits for part in ids.split(split, dim=1)], dim=1))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_int8_is_no_further_off_than_a_half_step(self, dtype: torch.dtype) -> None:
        """Of the largest number in a vector, too, which is 127 and not −128."""
        keys = torch.randn(2, 3, 100, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        state = CrossAttentionState(torch.int8)
        state.fill(keys, -keys, None, None)
        bound = keys.double().abs().amax(-1, keepdim=True) * (0.5 / 127 + 2 * torch.finfo(dtype).eps)
        for got, expected in zip(state.read(dtype), (keys, -keys), strict=True):
            assert ((got.double() - expected.double()).abs() <= bound).all()

    @pytest.mark.parametrize("options", [{"dtype": torch.int8}, {"kv_dtype": torch.int32}])
    def test_other_dtypes_are_refused(self, make_model: MakeModel, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="expected a float dtype"):
            build(make_model, "mamba2").init_cache(1, 4, **options)


class TestGradients:
    """Gradients flow through padded batches and through caches as through each row alone."""

    @every_kind
    @pytest.mark.parametrize("left", [False, True])
    @pytest.mark.parametrize("cached", [False, True])
    def test_each_row_alone(self, make_model: MakeModel, kind: str, left: bool, cached: bool) -> None:
        model = build(make_model, kind)
        lengths = [9, 4, 6]
        rows = [tokens(b, n) for b, n in enumerate(lengths)]
        pieces = [[9], [4], [6]] if not cached else [[5, 4], [1, 3], [6, 0]]
        weights = torch.randn(258, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def gradients(loss: Tensor) -> list[Tensor]:
            return torch.autograd.grad(loss, list(model.parameters()))

        cache = model.init_cache(3, 9) if cached else None
        loss = torch.zeros((), dtype=torch.float64)
        for piece in range(len(pieces[0])):
            parts = [row.split(cut)[piece] for row, cut in zip(rows, pieces, strict=True)]
            width = max(map(len, parts))
            ids = torch.full((3, width), 257)
            mask = torch.zeros(3, width, dtype=torch.long)
            for b, part in enumerate(parts):
                place = slice(width - len(part), width) if left else slice(0, len(part))
                ids[b, place], mask[b, place] = part, 1
            logits = model(ids, attention_mask=mask, cache=cache).logits
            loss = loss + (logits.tanh() @ weights)[mask.bool()].sum()
        expected = gradients(
            sum(((model(row[None]).logits.tanh() @ weights).sum() for row in rows), start=torch.zeros(()))
        )
        for got, want in zip(gradients(loss), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_info_tells_what_is_held(make_model: MakeModel) -> None:
    model = build(make_model, "mamba2")
    info = ragged(model, kv_dtype=torch.int8).info()
    assert (info.batch_size, info.lengths, info.capacity) == (3, (7, 2, 5), 20)
    assert [layer.kind for layer in info.layers] == ["MambaState", "AttentionState", "MambaState"]
    assert [layer.dtype for layer in info.layers] == ["float64", "int8", "float64"]
    assert info.layers[1].nbytes == 3 * 2 * 20 * 2 * (4 + 4)  # rows, heads, slots, (key and value), (bytes and scale)
    assert info.nbytes == sum(layer.nbytes for layer in info.layers)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("indices", [[], [3], [-1], [0.5], [[0]]])
@torch.no_grad()
def test_rows_that_are_not_there(make_model: MakeModel, indices: list[Any]) -> None:
    cache = ragged(build(make_model, "mamba2"))
    with pytest.raises(TensorError, match=r"expected .* got"):
        cache.reorder(torch.tensor(indices))
    assert cache.batch_size == 3


@pytest.mark.usefixtures("unchecked")
@torch.no_grad()
def test_arguments_out_of_range(make_model: MakeModel) -> None:
    cache = ragged(build(make_model, "mamba2"))
    for call in (
        lambda: cache.expand(0),
        lambda: cache.expand(1.5),  # type: ignore[arg-type]
        lambda: cache.prune(keep=0),
        lambda: cache.prune(keep=2, sinks=-1),
        lambda: cache.reserve(40.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=r"expected .* got"):
            call()
