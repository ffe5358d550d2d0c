"""The SVD linear map is the stored matrix without scales or with ones, and U diag(s z) Vᵀ with scales, however it is
computed. Factors follow the weight and its dtype."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.svd.factors import Factors
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear
from tests.model.tensors import normal


def linear_of(in_features: int, out_features: int, seed: int = 0) -> SVDLinear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SVDLinear(in_features, out_features).double()


def dense(linear: SVDLinear, z: Tensor) -> Tensor:
    """W(z) by numpy's decomposition."""
    U, s, Vt = np.linalg.svd(linear.weight.detach().numpy(), full_matrices=False)
    return torch.from_numpy(U @ np.diag(s * z.detach().numpy()) @ Vt)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**31))
def test_scaled_map_is_the_dense_product(n_in: int, n_out: int, batch: int, length: int, seed: int) -> None:
    linear, x = linear_of(n_in, n_out, seed), normal(batch, length, n_in, seed=seed + 1)
    z = 1 + normal(linear.rank, seed=seed + 2)
    rows = 1 + normal(batch, linear.rank, seed=seed + 3)
    torch.testing.assert_close(linear(x, z), F.linear(x, dense(linear, z)), rtol=1e-10, atol=1e-10)
    each = torch.stack([F.linear(x[b], dense(linear, rows[b])) for b in range(batch)])
    torch.testing.assert_close(linear(x, rows), each, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(linear(x, z.expand(batch, -1)), linear(x, z), rtol=1e-10, atol=1e-10)


def test_without_scales_it_is_the_stored_matrix_itself() -> None:
    linear, x = linear_of(9, 7), normal(2, 5, 9)
    assert torch.equal(linear(x), F.linear(x, linear.weight))
    torch.testing.assert_close(linear(x, torch.ones(7, dtype=torch.float64)), linear(x), rtol=1e-12, atol=1e-12)


def test_folded_is_factored_in_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = linear_of(9, 7), normal(2, 5, 9)
    results = []
    for folded in (True, False):
        monkeypatch.setattr(SVDLinear, "_folding_pays", lambda *_, folded=folded: folded)
        z = (1 + normal(7)).requires_grad_()
        y = linear(x, z)
        results.append((y, *torch.autograd.grad((y * normal(2, 5, 7, seed=9)).sum(), [z])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_folding_is_chosen_by_the_number_of_multiplications() -> None:
    """A square matrix folds from n tokens on: n² (n + t) multiplications against 2 n² t."""
    linear = linear_of(16, 16)
    assert [linear._folding_pays(tokens) for tokens in (1, 16, 17, 1000)] == [False, False, True, True]


@pytest.mark.parametrize("shape", [(0,), (8,), (2, 8), (3, 7), (1, 7), (2, 5, 7), (3, 1)])
def test_scales_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorError, match=r"expected scales of shape \(7,\) or \(2, 7\) or fewer of them, got"):
        linear_of(9, 7)(normal(2, 5, 9), torch.ones(shape, dtype=torch.float64))


def changed_in_place(linear: SVDLinear) -> SVDLinear:
    with torch.no_grad():
        linear.weight.add_(1.0)
    return linear


def loaded(linear: SVDLinear) -> SVDLinear:
    linear.load_state_dict({"weight": linear.weight.detach() + 1})
    return linear


def trained(linear: SVDLinear) -> SVDLinear:
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1)
    linear(normal(1, 2, 9)).square().sum().backward()
    optimizer.step()
    return linear


def copied(linear: SVDLinear) -> SVDLinear:
    return changed_in_place(copy.deepcopy(linear))


@pytest.mark.parametrize("change", [changed_in_place, loaded, trained, copied])
def test_factors_follow_the_weight(change: Callable[[SVDLinear], SVDLinear]) -> None:
    linear, x, z = linear_of(9, 7), normal(2, 5, 9), 1 + normal(7)
    before = linear(x, z)
    linear = change(linear)
    after = linear(x, z)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, F.linear(x, dense(linear, z)), rtol=1e-10, atol=1e-10)


def test_factors_follow_the_dtype() -> None:
    linear, x, z = linear_of(9, 7).float(), normal(2, 5, 9), 1 + normal(7)
    single = linear(x.float(), z.float())
    linear.double()
    double = linear(x, z)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(double, F.linear(x, dense(linear, z)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_factors_are_kept_while_the_weight_stays() -> None:
    linear = linear_of(9, 7)
    assert linear.factors()[0] is linear.factors()[0]


def test_factors_made_in_inference_mode_can_be_trained_through() -> None:
    linear, z = linear_of(9, 7), torch.ones(7, dtype=torch.float64)
    with torch.inference_mode():
        linear(normal(2, 5, 9), z)
    z.requires_grad_()
    linear(normal(2, 5, 9), z).sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("embedding", [False, True])
def test_rows_of_ones_are_the_plain_model(make_model: Any, mixer: Any, embedding: bool) -> None:
    """To the last bit where all rows are, and in a mixed batch as nearly as a product of other rows allows."""
    model = make_model(replace(MambaFormerConfig.tiny(), mixer=mixer))
    ids = torch.arange(18).view(3, 6)
    ranks = model.adaptable() | (model.adaptable_on_request() if embedding else {})
    for other, tolerance in ((1.0, 0.0), (1.3, 2e-6)):
        z = torch.tensor([1.0, other, 1.0])
        rows = Adaptation({name: z[:, None].expand(3, rank) for name, rank in ranks.items()})
        with torch.no_grad():
            plain, adapted = model.init_cache(3, 8), model.init_cache(3, 8)
            for new in (ids, ids[:, :1]):  # a prompt, and a compiled step
                expected = model(new, cache=plain).logits
                got = model(new, cache=adapted, adaptation=rows).logits
                torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=0, atol=tolerance)
                assert torch.equal(got[1], expected[1]) == (other == 1)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2,), (3, 2)])
def test_scales_go_where_the_weight_is(shape: tuple[int, ...]) -> None:
    """Experts and blends of them are on the CPU, wherever a model is."""
    linear = SVDLinear(5, 4).to("meta")
    linear.keep_factors(Factors(*(torch.empty(shape, device="meta") for shape in ((4, 4), (4,), (4, 5))), 0.0))
    y = linear(torch.empty(3, 7, 5, device="meta"), torch.ones(shape, requires_grad=True))
    assert (y.shape, y.device.type) == ((3, 7, 4), "meta")


def test_scales_of_ones_have_gradients() -> None:
    """Training begins there."""
    linear, z = SVDLinear(4, 3), torch.ones(3, requires_grad=True)
    linear(torch.randn(1, 2, 4), z).square().sum().backward()
    assert z.grad is not None
    assert bool((z.grad != 0).all())


def test_rows_of_ones_found_in_inference_mode_serve_training(make_model: Any) -> None:
    model, ids = make_model(), torch.tensor([[1, 2, 3]] * 2)
    z = {name: torch.stack([torch.ones(rank), torch.full((rank,), 1.1)]) for name, rank in model.adaptable().items()}
    adaptation = Adaptation(z)
    with torch.inference_mode():
        expected = model(ids, cache=model.init_cache(2, 3), adaptation=adaptation).logits
        plain = model(ids[:1], cache=model.init_cache(1, 3)).logits
    got = model(ids, cache=model.init_cache(2, 3), adaptation=adaptation).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(got[:1], plain, rtol=0, atol=1e-4)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
