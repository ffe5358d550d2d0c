"""Decompositions, exact and randomised, give the triples; fewer scales than the rank leave the other values. They are
kept on disk, bad files and ranks are refused, threads may ask at once."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.mambaformer.svd import factors as module
from bayes_dispatch.model.mambaformer.svd.factors import decompose
from bayes_dispatch.model.mambaformer.svd.files import FACTORS_FILE, load_factors, save_factors
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

LINEAR = "bayes_dispatch.model.mambaformer.svd.linear"


def falling(rows: int, columns: int, rate: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall like ``rate^i``."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.normal(size=(rows, min(rows, columns))))
    V, _ = np.linalg.qr(rng.normal(size=(columns, min(rows, columns))))
    return torch.from_numpy(U * rate ** np.arange(min(rows, columns)) @ V.T)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_exact_triples(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rank = 1 + seed % min(rows, columns)
    found = decompose(weight, rank)
    np.testing.assert_allclose(found.s, np.linalg.svd(weight.numpy(), compute_uv=False)[:rank], rtol=1e-9, atol=1e-12)
    assert found.error < 1e-12
    torch.testing.assert_close(weight @ found.Vt.T, found.U * found.s, rtol=1e-9, atol=1e-9)


def test_randomised_triples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a falling spectrum they are the exact ones; of a flat one they are not, and the error says so."""
    monkeypatch.setattr(module, "LARGE", 60)
    weight = falling(90, 120, 0.8)
    before = torch.get_rng_state()
    found = decompose(weight, 10)
    assert torch.equal(before, torch.get_rng_state())
    assert found.error < 1e-6
    np.testing.assert_allclose(found.s, 0.8 ** np.arange(10), rtol=1e-6)
    assert torch.equal(found.U, decompose(weight, 10).U)
    monkeypatch.setattr(module, "POWER_ITERATIONS", 0)
    flat = decompose(falling(90, 120, 0.999), 10)
    assert flat.error > 1e-4


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 6), batch=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_fewer_scales_leave_the_other_values(rank: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = SVDLinear(9, 6).double()
    x = torch.randn(batch, 4, 9, generator=generator, dtype=torch.float64)
    z = 1 + torch.randn(batch, rank, generator=generator, dtype=torch.float64)
    padded = F.pad(z, (0, 6 - rank), value=1.0)
    torch.testing.assert_close(linear(x, z), linear(x, padded), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(linear(x, z[0]), linear(x, padded[0]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(F.linear(x, linear.folded(z[0])), linear(x, padded[0]), rtol=1e-9, atol=1e-9)
    fresh = SVDLinear(9, 6).double()
    fresh.load_state_dict(linear.state_dict())
    torch.testing.assert_close(fresh(x, z), linear(x, z), rtol=1e-9, atol=1e-9)  # from leading triples alone
    torch.testing.assert_close(fresh(x, padded), linear(x, padded), rtol=1e-9, atol=1e-9)  # then from all


@pytest.mark.parametrize("shared", [True, False])
def test_cached_steps_under_fewer_scales(model64: Any, shared: bool) -> None:
    """Compiled decoding equals the full forward."""
    from bayes_dispatch.model.adaptation import Adaptation

    generator = torch.Generator().manual_seed(0)
    shape = () if shared else (2,)
    scales = {
        name: 1 + 0.5 * torch.randn(*shape, max(1, rank // 3), generator=generator, dtype=torch.float64)
        for name, rank in model64.adaptable().items()
    }
    ids = torch.randint(256, (2, 12), generator=generator)
    with torch.no_grad():
        full = model64(ids, adaptation=Adaptation(scales)).logits
        cache, adaptation = model64.init_cache(2, 12), Adaptation(scales)
        steps = [model64(ids[:, t : t + 1], cache=cache, adaptation=adaptation).logits for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-9, atol=1e-9)


def test_steps_of_rows_need_no_whole_decomposition(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bayes_dispatch.model.adaptation import Adaptation

    ranks = []
    monkeypatch.setattr(
        f"{LINEAR}.decompose",
        lambda W, rank: (ranks.append(rank), decompose(W, rank))[1],
    )
    model = make_model()
    adaptation = Adaptation({name: torch.full((2, 4), 1.5) for name in model.adaptable()})
    with torch.no_grad():
        cache = model.init_cache(2, 4)
        for _ in range(3):
            model(torch.zeros(2, 1, dtype=torch.long), cache=cache, adaptation=adaptation)
    assert set(ranks) == {4}


def test_half_precision_and_zeros(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 60)
    for dtype in (torch.bfloat16, torch.float16):
        assert decompose(falling(90, 120, 0.8).to(dtype), 10).U.dtype == dtype
    model = make_model()
    with torch.no_grad():
        model.blocks[0].mixer.in_proj.weight.zero_()
    save_factors(model, tmp_path)
    assert load_factors(model, tmp_path)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_1_replaces_no_factors(make_model: Any, tmp_path: Path, rank: int) -> None:
    model = make_model()
    save_factors(model, tmp_path)
    with pytest.raises(ConfigError, match=f"^expected rank to be a whole number ≥ 1, got {rank}"):
        save_factors(model, tmp_path, rank)
    assert load_factors(model, tmp_path)


@pytest.mark.parametrize("rank", [None, 3])
def test_kept_beside_the_model(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    errors = save_factors(model, tmp_path, rank)
    assert set(errors) == set(model.adaptable())
    assert max(errors.values()) < 1e-5
    monkeypatch.setattr(f"{LINEAR}.decompose", lambda *_: pytest.fail("decomposed again"))
    again = MambaFormerForCausalLM.from_pretrained(tmp_path)
    for name, linear in again.named_modules():
        if isinstance(linear, SVDLinear):
            kept = linear.factors(rank)
            assert torch.equal(kept.U, model.get_submodule(name).factors(rank).U)
    assert not load_factors(again, tmp_path / "elsewhere")


def test_bad_files_are_refused(make_model: Any, tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / FACTORS_FILE
    save_factors(model, tmp_path)
    whole = path.read_bytes()
    with pytest.raises(BundleError, match="expected factors of base model"):
        load_factors(make_model(seed=3), tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match="whole safetensors file"):
        load_factors(model, tmp_path)
    tensors = safetensors.torch.load(whole)
    metadata = {"base": model.fingerprint(), "errors": json.dumps(dict.fromkeys(model.adaptable(), 0.0))}
    name = next(iter(model.adaptable()))
    changes = {
        "shape": {f"{name}.s": tensors[f"{name}.s"][:-1]},
        "others or fewer": {"odd": torch.ones(1)},
        "off by": {f"{name}.U": tensors[f"{name}.U"].flip(1)},
        "off by nan": {f"{name}.Vt": torch.full_like(tensors[f"{name}.Vt"], torch.nan)},
    }
    for message, change in changes.items():
        path.write_bytes(safetensors.torch.save({**tensors, **change}, metadata))
        with pytest.raises(BundleError, match=message):
            load_factors(model, tmp_path)
    path.write_bytes(safetensors.torch.save(tensors, {"base": model.fingerprint(), "errors": "3"}))
    with pytest.raises(BundleError, match="errors of decompositions"):
        load_factors(model, tmp_path)


def test_bad_ranks() -> None:
    for rank in (0, 5):
        with pytest.raises(ConfigError, match=f"rank of 1 to 4, got {rank}"):
            decompose(torch.ones(4, 6), rank)


def test_threads_may_ask_for_other_ranks(in_threads: Callable[..., Any]) -> None:
    """Each has the triples that it asked for, whatever others keep of weights that change."""
    linear, ranks = SVDLinear(6, 5), itertools.cycle([5, 2])

    @torch.no_grad()
    def ask() -> set[bool]:
        rank = next(ranks)
        return {len(linear.factors(rank).s) == rank for _ in range(200) if linear.weight.mul_(1.001) is not None}

    assert in_threads(4, ask) == [{True}] * 4


def test_random_projections_draw_nothing_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do threads disturb them: always the same triples, and the user's random numbers go on as they would have."""
    monkeypatch.setattr(module, "LARGE", 1)
    weight = falling(12, 9, 0.5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = decompose(weight, 2), decompose(weight, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.U, two.U)
