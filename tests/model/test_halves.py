"""Matrices that are kept in half precision beside states in float32 give what the same numbers in float32 give."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayes_dispatch.errors import BundleError
from bayes_dispatch.model.adaptation import Adaptation, Delta
from bayes_dispatch.model.mambaformer import products
from bayes_dispatch.model.mambaformer.compiled.switch import kernels, tensors_only
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.mambaformer.products import times
from bayes_dispatch.model.mambaformer.svd.linear import matrices
from bayes_dispatch.storage import read_tensors, write_tensors

BACKBONES = {
    "mamba1": MambaFormerConfig(d_model=32, n_heads=4, n_pairs=1, mixer="mamba1"),
    "mamba2": MambaFormerConfig(d_model=32, n_heads=4, head_dim=16, n_pairs=1),
    "feed-forward-multiplied": MambaFormerConfig(
        d_model=32, n_heads=4, blocks=("attention", "feed_forward"), positions="rotary", embedding_multiplier=3.0
    ),
    "biased": MambaFormerConfig(
        d_model=32, n_heads=4, head_dim=16, blocks=("mamba2", "attention"), biased=("mamba2", "attention")
    ),
}
every_backbone = pytest.mark.parametrize("kind", BACKBONES)


def halved(
    model: MambaFormerForCausalLM, kept: torch.dtype = torch.bfloat16
) -> tuple[MambaFormerForCausalLM, MambaFormerForCausalLM]:
    """A model whose matrices are in half precision, and one with the same numbers in float32."""
    half, full = copy.deepcopy(model), copy.deepcopy(model)
    for own, other in zip(matrices(half).values(), matrices(full).values(), strict=True):
        own.data = own.data.to(kept)
        other.data = own.data.float()
    return half, full


@pytest.fixture(scope="module")
def pairs(make_model: Any) -> Callable[[str], tuple[MambaFormerForCausalLM, MambaFormerForCausalLM]]:
    @cache
    def pair(kind: str) -> Any:
        return halved(make_model(BACKBONES[kind], tie_embeddings=kind != "mamba1"))

    return pair


@pytest.fixture(scope="module")
def wide_pairs(make_model: Any) -> Callable[[str], tuple[MambaFormerForCausalLM, MambaFormerForCausalLM]]:
    """Large enough for threads to share products; decomposed by one, as two take seconds where cores are few."""

    @cache
    def pair(kind: str) -> Any:
        pair = halved(make_model(replace(BACKBONES[kind], d_model=256)))
        with torch.no_grad():
            for model in pair:
                model(tokens(1, 1), adaptation=adapted(model, "one for all", 1))
        return pair

    return pair


@contextmanager
def sharing(threads: int) -> Iterator[None]:
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))


def adapted(model: MambaFormerForCausalLM, kind: str, rows: int) -> Adaptation:
    draw = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=draw)

    rows_from_0 = (torch.arange(rows) > 0)[:, None]
    ranks = model.adaptable() | ({"embedding": 32} if kind == "embedding" else {})
    if kind == "one for all":
        return Adaptation({name: 1 + numbers(rank) for name, rank in ranks.items()})
    if kind in ("by row", "embedding"):  # nothing in the first row
        return Adaptation({name: 1 + numbers(rows, rank) * rows_from_0 for name, rank in ranks.items()})
    if kind == "leading":
        return Adaptation({name: 1 + numbers(min(rank, 3)) for name, rank in ranks.items()})
    shape = () if kind == "delta" else (rows,)
    shapes = {name: model.linears()[name] for name in ranks}
    return Adaptation({}, {n: Delta(numbers(o, 2), numbers(2, i), numbers(*shape, 2)) for n, (o, i) in shapes.items()})


ADAPTED = ["nothing", "one for all", "by row", "leading", "delta", "delta by row", "embedding"]


@every_backbone
@pytest.mark.parametrize("adaptation", ADAPTED)
def test_results_are_those_of_the_same_numbers(pairs: Any, kind: str, adaptation: str) -> None:
    equal(*pairs(kind), adaptation, rows=3)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("adaptation", ["nothing", "by row"])
def test_so_they_are_of_matrices_in_float16(make_model: Any, kind: str, adaptation: str) -> None:
    equal(*halved(make_model(BACKBONES[kind]), torch.float16), adaptation, rows=2)


@every_backbone
@pytest.mark.parametrize("rows", [1, 20])
def test_so_they_are_of_any_number_of_rows(pairs: Any, kind: str, rows: int) -> None:
    equal(*pairs(kind), "nothing", rows)


@every_backbone
@pytest.mark.parametrize("adaptation", ["nothing", "one for all", "delta by row"])
def test_so_they_are_of_threads(wide_pairs: Any, kind: str, adaptation: str) -> None:
    assert 2 * kernels().SHARED <= 4 * 256**2  # of all products but Mamba-1's selection
    equal(*wide_pairs(kind), adaptation, rows=4, slack=4, threads=2)


def equal(
    half: MambaFormerForCausalLM,
    full: MambaFormerForCausalLM,
    adaptation: str,
    rows: int,
    slack: float = 1,
    threads: int = 1,
) -> None:
    """Read at once and token by token, by loops and by tensor operations."""
    ids, given = tokens(rows, 7), None if adaptation == "nothing" else adapted(half, adaptation, rows)
    with torch.no_grad():
        expected = full(ids, adaptation=given).logits
        with tensors_only():
            torch.testing.assert_close(half(ids, adaptation=given).logits, expected, rtol=2e-5, atol=slack * 2e-5)
        cache = half.init_cache(rows, 7)
    with torch.no_grad(), sharing(threads):
        torch.testing.assert_close(half(ids, adaptation=given).logits, expected, rtol=2e-5, atol=slack * 2e-5)
        half(ids[:, :5], cache=cache, adaptation=given)
        for t in range(5, 7):
            step = half(ids[:, t : t + 1], cache=cache, adaptation=given).logits[:, 0]
            torch.testing.assert_close(step, expected[:, t], rtol=5e-5, atol=slack * 5e-5)
    assert {state.dtype for each in cache.states for state in vars(each).values() if isinstance(state, Tensor)} <= {
        torch.float32
    }


@every_backbone
def test_it_is_one_model_in_hash_and_dtype(pairs: Any, kind: str) -> None:
    half, full = pairs(kind)
    assert half.fingerprint() == full.fingerprint()
    assert half.dtype == half.weights_dtype == torch.float32
    assert sum(p.nbytes for p in half.parameters()) < 0.7 * sum(p.nbytes for p in full.parameters())


@every_backbone
def test_gradients_of_scales_are_those_of_the_same_numbers(pairs: Any, kind: str) -> None:
    ids, found = tokens(2, 7), []
    for model in pairs(kind):
        given = {name: torch.ones(rank).mul(1.1).requires_grad_() for name, rank in model.adaptable().items()}
        model(ids, adaptation=Adaptation(given)).logits.logsumexp(-1).sum().backward()
        found.append([z.grad for z in given.values()])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)


@every_backbone
def test_it_is_saved_as_it_is(pairs: Any, kind: str, tmp_path: Path) -> None:
    half, _ = pairs(kind)
    half.save_pretrained(tmp_path)
    again = MambaFormerForCausalLM.from_pretrained(tmp_path)
    for (name, own), (_, other) in zip(half.state_dict().items(), again.state_dict().items(), strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other), name
    tensors, header = read_tensors(tmp_path / "model.safetensors")
    one = next(name for name in matrices(half) if name != "embedding.weight")
    write_tensors(tmp_path / "model.safetensors", {**tensors, one: tensors[one].float()}, header)
    with pytest.raises(BundleError, match=rf"expected .*{one}.*bfloat16"):
        MambaFormerForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 1101])
def test_products_of_any_precision(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL", 1)
    draw = torch.Generator().manual_seed(2)
    for rows in (1, 2, 3, 32, 33):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(rows, 40, generator=draw, dtype=dtype)
            bias = torch.randn(columns, generator=draw, dtype=dtype)
            for kept in (torch.float16, torch.bfloat16, dtype):
                weight = torch.randn(columns, 40, generator=draw).to(kept)
                expected = x @ weight.to(dtype).T
                with torch.no_grad():
                    torch.testing.assert_close(times(x, weight), expected, rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(times(x, weight, bias), expected + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hardware", [False, True])
def test_half_precision_throughout_rounds_the_result_alone(
    dtype: torch.dtype, hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_in_hardware", lambda _: hardware)
    draw = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(70, 300, generator=draw).to(dtype), torch.randn(70, generator=draw).to(dtype)
    for rows in (1, 5, 40):
        x = torch.randn(2, rows, 300, generator=draw).to(dtype)
        expected = x.double() @ weight.double().T + bias.double()
        with torch.no_grad():
            found = times(x, weight, bias)
        assert found.dtype == dtype
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=unit, atol=(4 if hardware else 1) * unit)


@pytest.mark.parametrize("hardware", [False, True])
def test_many_rows_are_rounded_where_that_is_allowed(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's setting, where the processor multiplies so: few rows, and other processors, round nothing.

    On some processors torch itself rounds what it multiplies in float32 under this setting.
    """
    monkeypatch.setattr(products, "_in_hardware", lambda _: hardware)
    draw = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(70, 300, generator=draw).bfloat16(), torch.randn(70, generator=draw)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for rows in (1, 32, 40):
            x = torch.randn(rows, 300, generator=draw)
            expected = x.double() @ weight.double().T + bias.double()
            with torch.no_grad():
                off = (times(x, weight, bias) - expected).abs().max()
            by_torch = (x @ weight.float().T + bias - expected).abs().max() > 1e-3
            rounded = rows > products.MOST_ROWS and (hardware or by_torch)
            assert (1e-2 < off < 1) if rounded else off < 1e-3  # of sums of 300 products, some 17
    finally:
        torch.set_float32_matmul_precision(before)  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("unchecked")
def test_another_width_is_refused() -> None:
    for width in (200, 400):
        with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
            times(torch.randn(1, width), torch.randn(300, 300))


def test_a_matrix_of_another_kind_multiplies_in_its_own_way() -> None:
    class Doubled(Tensor):
        """Stands for a quantised one: its numbers are not what it multiplies by."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.linear:
                return 2 * torch.nn.functional.linear(args[0], args[1].as_subclass(Tensor))
            return super().__torch_function__(func, types, args, kwargs or {})

    x, weight = torch.randn(1, 300), torch.randn(300, 300)
    with torch.no_grad():
        torch.testing.assert_close(times(x, weight.as_subclass(Doubled)), 2 * x @ weight.T)


def test_threads_may_share_loops_at_once(in_threads: Any) -> None:
    draw = torch.Generator().manual_seed(3)
    x, weight = torch.randn(4, 300, generator=draw), torch.randn(500, 300, generator=draw).bfloat16()

    def product() -> Tensor:
        torch.set_num_threads(2)
        with torch.no_grad():
            return torch.stack([times(x, weight) for _ in range(30)])

    with sharing(2):
        each = in_threads(6, product)
    for found in each:
        torch.testing.assert_close(found, (x @ weight.float().T).expand(30, -1, -1), rtol=1e-4, atol=1e-4)


def test_products_of_no_rows_and_by_hooks(make_model: Any) -> None:
    weight = torch.randn(300, 300)
    for kept in (weight, weight.bfloat16()):
        with torch.no_grad():
            assert times(torch.zeros(2, 0, 300), kept).shape == (2, 0, 300)
    model, seen = make_model(tie_embeddings=False), []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    model(tokens(1, 3))
    assert seen == [1]


def test_other_precisions_do_not_mix() -> None:
    """Nothing but half precision is brought to that of the inputs."""
    for x, weight in ((torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        with pytest.raises(RuntimeError, match="dtype"):
            times(torch.zeros(1, 4, dtype=x), torch.zeros(4, 4, dtype=weight))
