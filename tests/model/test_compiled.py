"""Compiled loops of the CPU give what tensor operations give, for every mixer, padding, length, adaptation and cache,
and follow the weights. States of wrong sizes are refused; without gradients alone are they used."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.loops import compile_with
from bayes_dispatch.model.adaptation import Adaptation, Delta
from bayes_dispatch.model.mambaformer.cache import AttentionState
from bayes_dispatch.model.mambaformer.compiled.stepping import MOST_KEPT, MOST_ROWS, Stepper, Steppers
from bayes_dispatch.model.mambaformer.compiled.switch import array, kernels, tensors_only
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from tests.model.tensors import tokens

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.cache import Cache
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]
SMALL: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_state": 4, "head_dim": 8, "chunk_size": 4}
KINDS: dict[str, dict[str, Any]] = {
    "mamba2": {"n_pairs": 1},
    "mamba1": {"n_pairs": 1, "mixer": "mamba1"},
    "groups": {"blocks": ("mamba2", "feed_forward"), "n_groups": 2, "d_conv": 2},
    "taps": {"blocks": ("mamba1", "mamba2"), "d_conv": 6},
    "rotary": {"blocks": ("attention", "feed_forward"), "positions": "rotary"},
    "window": {"blocks": ("attention", "mamba1"), "positions": "rotary", "attention_window": 4},
    "hybrid": {
        "blocks": ("mamba2", "feed_forward", "attention", "feed_forward"),
        "n_groups": 2,
        "norm_groups": 4,
        "norm_eps": 1e-3,
        "dt_limit": (0.02, 0.5),
        "positions": "rotary",
        "attention_head_dim": 6,
        "rotary_width": 4,
        "rotary_base": 100.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.4,
        "embedding_multiplier": 3.0,
    },
    "biased": {
        "blocks": ("mamba1", "mamba2", "attention", "feed_forward"),
        "biased": ("mamba1", "mamba2", "attention", "feed_forward"),
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def models(make_model: MakeModel) -> Callable[[str, torch.dtype], "MambaFormerForCausalLM"]:
    made: dict[tuple[str, torch.dtype], MambaFormerForCausalLM] = {}

    def get(kind: str, dtype: torch.dtype = torch.float64) -> "MambaFormerForCausalLM":
        if (kind, dtype) not in made:
            made[kind, dtype] = make_model(MambaFormerConfig(**SMALL | KINDS[kind]), dtype=dtype)
        return made[kind, dtype]

    return get


def scales(model: "MambaFormerForCausalLM", rows: int | None, seed: int) -> Adaptation:
    draw = torch.Generator().manual_seed(seed)
    lead = () if rows is None else (rows,)
    ranks = model.adaptable().items()
    return Adaptation({n: (1 + 0.3 * torch.randn(*lead, r, generator=draw)).to(model.dtype) for n, r in ranks})


def deltas(model: "MambaFormerForCausalLM", rows: int | None, seed: int) -> Adaptation:
    """Of every matrix, beside scales of half of the singular values of the first."""
    draw = torch.Generator().manual_seed(seed)
    lead = () if rows is None else (rows,)

    def drawn(*shape: int) -> Tensor:
        return (0.3 * torch.randn(*shape, generator=draw)).to(model.dtype)

    added = {n: Delta(drawn(out, 3), drawn(3, width), drawn(*lead, 3)) for n, (out, width) in model.linears().items()}
    name, rank = next(iter(model.adaptable().items()))
    return Adaptation({name: 1 + drawn(*lead, rank // 2)}, added)


def run(
    model: "MambaFormerForCausalLM", pieces: list[tuple[Tensor, Tensor]], adaptation: Adaptation | None
) -> tuple[list[Tensor], "Cache"]:
    """Logits at the real tokens of each piece, and the cache after them."""
    cache = model.init_cache(pieces[0][0].shape[0], 64)
    outputs = []
    for ids, mask in pieces:
        logits = model(ids, attention_mask=mask, cache=cache, adaptation=adaptation).logits
        outputs.append(logits[mask.bool()])
    return outputs, cache


def assert_equal_runs(
    model: "MambaFormerForCausalLM", pieces: list[tuple[Tensor, Tensor]], adaptation: Adaptation | None
) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if model.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    with torch.inference_mode():
        fast, cache = run(model, pieces, adaptation)
        with tensors_only():
            slow, expected = run(model, pieces, adaptation)
    torch.testing.assert_close(fast, slow, **tolerance)
    assert cache.read is expected.read or bool((cache.lengths == expected.lengths).all())
    for got, wanted in zip(cache.states, expected.states, strict=True):
        torch.testing.assert_close(got.tensors(), wanted.tensors(), **tolerance)


@pytest.mark.parametrize(
    ("dtype", "rows", "adapted"),
    [
        (torch.float64, 1, "shared"),
        (torch.float64, 3, "stored"),
        (torch.float64, MOST_ROWS + 1, "per row"),
        (torch.float32, 1, "stored"),
        (torch.float32, 3, "per row"),
        (torch.float32, MOST_ROWS + 1, "shared"),
        (torch.float64, 2, "delta"),
        (torch.float64, 2, "delta per row"),
    ],
)
@every_kind
def test_a_prompt_and_steps_after_it(
    models: Callable[..., "MambaFormerForCausalLM"], kind: str, dtype: torch.dtype, rows: int, adapted: str
) -> None:
    model = models(kind, dtype)
    adaptation = {
        "stored": None,
        "shared": scales(model, None, 1),
        "per row": scales(model, rows, 2),
        "delta": deltas(model, None, 3),
        "delta per row": deltas(model, rows, 4),
    }[adapted]
    ids = tokens(rows, rows, 13)
    whole = torch.ones_like(ids)
    pieces = [(piece, whole[:, : piece.shape[1]]) for piece in (ids[:, :9], *ids[:, 9:].split(1, dim=1))]
    assert_equal_runs(model, pieces, adaptation)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    lengths=st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2), min_size=2, max_size=5),
    left=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_ragged_pieces(
    models: Callable[..., "MambaFormerForCausalLM"], kind: str, lengths: list[list[int]], left: bool, seed: int
) -> None:
    """Rows of any number of new tokens, none included, in pieces; the width of the last is often 1."""
    model = models(kind)
    pieces = []
    for i, new in enumerate(torch.tensor(lengths).T.unbind()):
        new = new + 1 if i == 0 else new.clamp(max=1 + seed % 3)
        width = max(1, int(new.max()))
        mask = (torch.arange(width) < new[:, None]).long()
        pieces.append((tokens(seed + i, len(lengths), width), mask.flip(1) if left else mask))
    assert_equal_runs(model, pieces, None)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 66, 67, 130, 600])
def test_lengths_around_a_tile(models: Callable[..., "MambaFormerForCausalLM"], length: int) -> None:
    for kind in ("mamba2", "mamba1"):
        model, ids = models(kind), tokens(length, 2, length)
        with torch.inference_mode():
            fast = model(ids).logits
            with tensors_only():
                slow = model(ids).logits
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_the_context_restores_what_was() -> None:
    from bayes_dispatch.model.mambaformer.compiled.switch import can_compile

    with torch.no_grad():
        x = torch.zeros(1)
        with tensors_only():
            with tensors_only():
                assert not can_compile(x)
            assert not can_compile(x)
        assert can_compile(x)
        assert not can_compile(x.bfloat16())
        assert not can_compile(x, x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not can_compile(x)
    assert not can_compile(x)


@pytest.mark.parametrize("kind", ["mamba2", "mamba1", "rotary"])
def test_changed_weights_are_seen(make_model: MakeModel, kind: str) -> None:
    """In place, moved to other memory, replaced, and copied: never what the weights were."""
    model = make_model(MambaFormerConfig(**SMALL | KINDS[kind]), dtype=torch.float64)
    ids = tokens(0, 1, 6)

    def check() -> Tensor:
        with torch.inference_mode():
            cache = model.init_cache(1, 8)
            fast = torch.cat([model(piece, cache=cache).logits for piece in ids.split(1, dim=1)], dim=1)
            with tensors_only():
                slow = model(ids).logits
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
        return fast

    first = check()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = check()
    assert not torch.allclose(first, second)
    for parameter in model.blocks.parameters():
        parameter.data = parameter.data * 0.9
    third = check()
    assert not torch.allclose(second, third)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8)
    assert not torch.allclose(third, check())


def test_a_model_that_has_decoded_can_be_stored(models: Callable[..., "MambaFormerForCausalLM"]) -> None:
    model, buffer = models("mamba2"), io.BytesIO()
    ids = tokens(0, 1, 3)
    expected = model.generate(ids, max_new_tokens=4)
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=4), expected)


@every_kind
def test_a_copied_cache_is_independent(models: Callable[..., "MambaFormerForCausalLM"], kind: str) -> None:
    model, ids = models(kind), tokens(0, 2, 6)
    with torch.inference_mode():
        cache = model.init_cache(2, 16)
        model(ids[:, :4], cache=cache)
        model(ids[:, 4:5], cache=cache)
        for copied in (cache.clone(), copy.deepcopy(cache)):
            before = [{n: t.clone() for n, t in state.tensors().items()} for state in cache.states]
            model(ids[:, 5:], cache=copied)
            for state, was in zip(cache.states, before, strict=True):
                torch.testing.assert_close(state.tensors(), was, rtol=0, atol=0)
        torch.testing.assert_close(model(ids[:, 5:], cache=cache).logits, model(ids).logits[:, 5:])


@pytest.mark.parametrize("rows", [1, MOST_ROWS + 1])
@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("mamba2", "conv", (3, 48)),
        ("mamba2", "conv", (2, 40)),
        ("mamba2", "ssm", (4, 8, 8)),
        ("mamba2", "ssm", (2, 8, 4)),
        ("mamba1", "ssm", (4, 31)),
        ("mamba1", "conv", (4, 32)),
        ("rotary", "keys", (1, 8, 4)),
        ("rotary", "keys", (2, 8, 5)),
        ("rotary", "values", (2, 7, 4)),
        ("rotary", "both", (1, 8, 4)),
        ("rotary", "both", (2, 2, 4)),
    ],
)
def test_states_of_other_sizes_are_refused(
    models: Callable[..., "MambaFormerForCausalLM"], kind: str, name: str, shape: tuple[int, ...], rows: int
) -> None:
    """As from a file that says it is this model's: compiled loops do not check each index."""
    model, ids = models(kind), tokens(0, rows, 4)
    with torch.inference_mode():
        cache = model.init_cache(rows, 8)
        model(ids[:, :3], cache=cache)
        state: Any = cache.states[0]
        for changed in ("keys", "values") if name == "both" else (name,):
            setattr(state, changed, torch.zeros(rows, *shape, dtype=torch.float64))
        with pytest.raises((TensorError, RuntimeError)):
            model(ids[:, 3:], cache=cache)


def test_autograd_knows_of_changed_states(models: Callable[..., "MambaFormerForCausalLM"]) -> None:
    """A backward pass through states that a compiled loop has changed since is an error, not a wrong gradient."""
    model, ids = models("mamba2"), tokens(0, 1, 4)
    cache = model.init_cache(1, 8)
    model(ids[:, :2], cache=cache)
    state: Any = cache.states[0]
    product = (state.ssm * state.ssm.detach()).sum()
    with torch.no_grad():
        model(ids[:, 2:3], cache=cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_functions(dtype: torch.dtype) -> None:
    """To a few units in the last place, from underflow to saturation; NaN stays NaN."""
    numba = pytest.importorskip("numba")
    K = kernels()

    @numba.njit
    def evaluate(function: Any, x: Any, out: Any) -> None:
        for i in range(len(x)):
            out[i] = function(x[i])

    kind = np.float32 if dtype == torch.float32 else np.float64
    unit = float(np.finfo(kind).eps)
    x = np.concatenate([np.linspace(-87, 87, 100_001), np.random.default_rng(0).normal(0, 2, 10_000)]).astype(kind)
    exact = x.astype(np.longdouble)
    expected = {
        "exp": np.exp(exact),
        "softplus": np.logaddexp(0, exact),
        "sigmoid": 1 / (1 + np.exp(-exact)),
    }
    for name, values in expected.items():
        got = np.empty_like(x)
        evaluate(numba.njit(_calling(K, name)), x, got)
        assert np.max(np.abs(got / values - 1)) < 4 * unit, name
        special, out = np.array([np.nan, -np.inf, np.inf, -1e4, 1e4], kind), np.empty(5, kind)
        evaluate(numba.njit(_calling(K, name)), special, out)
        assert np.isnan(out[0])
        assert 0 <= out[1] == out[3] < 1e-37
        if name == "sigmoid":
            assert out[2] == out[4] == 1
        elif name == "softplus":
            assert out[2] == np.inf
            assert out[4] == 1e4
        else:
            assert out[2] == out[4]
            assert out[2] > np.exp(kind(87))


def _calling(module: Any, name: str) -> Callable[[Any], Any]:
    exp, softplus, sigmoid = module.exp, module.softplus, module.sigmoid
    calls: dict[str, Callable[[Any], Any]] = {
        "exp": lambda x: exp(x),
        "softplus": lambda x: softplus(x),
        "sigmoid": lambda x: sigmoid(x),
    }
    return calls[name]


def test_hooks_are_called_with_tensors_only(models: Callable[..., "MambaFormerForCausalLM"]) -> None:
    model, called = models("mamba2"), []
    handle = model.blocks[0].register_forward_hook(lambda *_: called.append(1))
    with torch.inference_mode(), tensors_only():
        cache = model.init_cache(1, 4)
        model(tokens(0, 1, 1), cache=cache)
    handle.remove()
    assert called == [1]


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_keys_and_values_are_kept_as_tensors_keep_them(dtype: torch.dtype, ring: bool) -> None:
    """To the last bit, whatever their size; and attention to them is attention to what tensors read of them."""
    draw, slots = torch.Generator().manual_seed(3), 5
    made = [torch.zeros(2, 2, slots, 8, dtype=dtype) for _ in range(4)]
    scales = [torch.zeros(2, 2, slots, 1) if dtype == torch.int8 else None for _ in range(4)]
    state, expected = (AttentionState(*made[i : i + 2], *scales[i : i + 2]) for i in (0, 2))
    for t in range(2 * slots if ring else slots):
        heads = torch.randn(2, 8, 8, generator=draw) * 10.0 ** (3 * t - 9)
        heads[:, 4, 0] = heads[:, 4].abs().amax(1) * 2 / 127  # ties, or numbers near them
        heads[:, 5], heads[:, 6, ::2] = 0, torch.nan if t == slots - 1 else 1 + 2**-8
        out, place = np.empty((2, 32), np.float32), np.full(2, t)
        kept = state.arrays(torch.float32)
        assert kept is not None
        kernels().attend(array(heads.view(2, 64)), 1, np.ones(2, np.int64), place, place, kept, ring, 1e4, 0, 0.2, out)
        expected.write(*(heads[:, i : i + 2, None] for i in (4, 6)), t % slots)
        torch.testing.assert_close(state.tensors(), expected.tensors(), rtol=0, atol=0, equal_nan=True)
        keys, values = expected.read(min(t + 1, slots), torch.float32)
        wanted = F.scaled_dot_product_attention(heads[:, :4, None], keys, values, scale=0.2, enable_gqa=True)
        torch.testing.assert_close(torch.from_numpy(out), wanted.reshape(2, 32), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loops_are_of_one_kind_whatever_the_defaults_are(dtype: torch.dtype) -> None:
    """Else there would be a program for each default dtype, and on another default device or in half precision none."""
    kept = [torch.zeros(2, 2, 5, 8, dtype=dtype) for _ in range(2)]
    before = torch.get_default_dtype()
    for default in (torch.float16, torch.float64):
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                arrays = AttentionState(*kept).arrays(dtype)
        finally:
            torch.set_default_dtype(before)
        assert arrays is not None
        assert [array.dtype for array in arrays] == [kept[0].numpy().dtype] * 2 + [np.float32] * 2


@pytest.mark.parametrize("rows", [1, MOST_ROWS + 1])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_loops_read_caches_of_less_precision(
    make_model: MakeModel, kv_dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, used = make_model(MambaFormerConfig(**SMALL | KINDS["rotary"])), tokens(5, rows, 7), []
    name = "step_attention" if rows == 1 else "attend"
    compiled = getattr(kernels(), name)
    monkeypatch.setattr(kernels(), name, lambda *arguments: (used.append(1), compiled(*arguments)))

    def decode() -> Tensor:
        cache = model.init_cache(rows, 8, kv_dtype=kv_dtype)
        return torch.cat([model(piece, cache=cache).logits for piece in ids.split(1, dim=1)], dim=1)

    with torch.inference_mode():
        fast = decode()
        assert len(used) == 7
        with tensors_only():
            slow = decode()
    assert len(used) == 7
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=5e-3)  # a number between two may be rounded to either


@pytest.mark.parametrize(
    ("rows", "padded", "kv_dtype", "dtype"),
    [
        (1, False, None, torch.float64),
        (1, True, torch.int8, torch.float64),
        (3, True, None, torch.float64),
        (MOST_ROWS + 1, True, torch.int8, torch.float64),
        (3, True, torch.int8, torch.float32),
        (1, False, torch.bfloat16, torch.float32),
    ],
)
def test_a_decoder_with_cross_attention(
    make_seq2seq: Callable[..., Any], rows: int, padded: bool, kv_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    model = make_seq2seq(n_kv_heads=1, dtype=dtype)
    draw = torch.Generator().manual_seed(rows)
    source, target = (torch.randint(0, 40, (rows, n), generator=draw) for n in (7, 5))
    lengths = torch.arange(rows) % 7 + 1
    mask = (torch.arange(7) < lengths[:, None]).long() if padded else None

    def decode() -> Tensor:
        cache = model.init_cache(rows, 8, kv_dtype=kv_dtype)
        outputs = [model(source, target[:, :1], attention_mask=mask, cache=cache).logits]
        outputs += [model(None, piece, cache=cache).logits for piece in target[:, 1:].split(1, dim=1)]
        return torch.cat(outputs, dim=1)

    with torch.inference_mode():
        fast = decode()
        with tensors_only():
            slow = decode()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3 if kv_dtype == torch.int8 else 5e-3
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)


def test_without_a_directory_to_keep_programs_in() -> None:
    """Text that is in no file has no place for its program: it is compiled and not kept."""
    made: dict[str, Any] = {}
    exec(compile("def double(x):\n    return 2 * x\n", "<text>", "exec"), made)
    double = compile_with()(made["double"])
    assert double(3.5) == 7.0
    assert double.signatures


def test_steps_are_built_once() -> None:
    """For each adaptation, whose takes turns, and anew for other weights; what nobody holds goes."""
    steppers, built = Steppers(), 0

    def build() -> Stepper:
        nonlocal built
        built += 1
        return Stepper([], None, [])

    weights, adaptations = object(), [Adaptation({"a": torch.ones(2)}) for _ in range(MOST_KEPT)]
    first = [steppers.of(weights, adaptation, build) for adaptation in adaptations]
    assert [steppers.of(weights, adaptation, build) for adaptation in adaptations] == first
    assert built == MOST_KEPT
    assert steppers.of(weights, Adaptation.identity(), build) is steppers.of(weights, Adaptation({}), build)
    assert built == MOST_KEPT + 1  # one for all that scale nothing
    again = [steppers.of(weights, adaptation, build) for adaptation in reversed(adaptations)][::-1]
    assert again[1:] == first[1:]
    assert again[0] is not first[0]  # it had gone, as the oldest
    assert steppers.of(object(), adaptations[5], build) is not first[5]
    for same in (copy.deepcopy(steppers), pickle.loads(pickle.dumps(steppers))):
        assert same.of(weights, adaptations[3], build) is not first[3]


def test_adaptations_that_take_turns_build_their_steps_once(
    models: Callable[[str, torch.dtype], "MambaFormerForCausalLM"], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, built, build = models("mamba2", torch.float32), [], Stepper.__init__

    def counted(self: Stepper, *arguments: Any) -> None:
        built.append(self)
        build(self, *arguments)

    monkeypatch.setattr(Stepper, "__init__", counted)
    turns = [(scales(model, 1, seed), model.init_cache(1, 16)) for seed in range(3)]
    with torch.inference_mode():
        for _ in range(4):
            for adaptation, cache in turns:
                model(tokens(0, 1, 1), cache=cache, adaptation=adaptation)
    assert len(built) == len(turns)
