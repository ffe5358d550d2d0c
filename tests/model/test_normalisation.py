"""Our normalisation is the library's in value and gradient, also for zeros, large numbers and less precise inputs."""

import pytest
import torch
import torch.nn.functional as F

from bayes_dispatch.model.mambaformer.normalisation import RMSNorm, rms_norm


@pytest.mark.parametrize("shape", [(3,), (1, 5), (2, 3, 8), (2, 1, 3, 4)])
def test_value_and_gradient_are_the_librarys(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    x, out = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(shape[-1], generator=draw, dtype=torch.float64)
    results = []
    eps = 1e-3
    for norm in (rms_norm, lambda x, w, eps: F.rms_norm(x, (shape[-1],), w, eps)):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = norm(*inputs, eps)
        y.backward(out)
        results.append((y.detach(), *(i.grad for i in inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, eps), results[0][0])


def test_zeros_and_large_numbers() -> None:
    assert torch.equal(RMSNorm(4)(torch.zeros(2, 4)), torch.zeros(2, 4))
    large = torch.full((2, 4), 1e15)
    torch.testing.assert_close(RMSNorm(4)(large), torch.ones(2, 4))


def test_less_precise_inputs_are_normalised_in_the_weights_dtype() -> None:
    x = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(7)
    assert norm(x).dtype == torch.float32
    assert torch.equal(norm(x), norm(x.float()))


def test_one_that_is_built_without_memory_and_filled_later_is_the_same() -> None:
    x, norm = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), RMSNorm(4, eps=0.5)
    with torch.device("meta"):
        later = RMSNorm(4, eps=0.5)
    later.to_empty(device="cpu").load_state_dict(norm.state_dict())
    assert torch.equal(later(x), norm(x))


def test_in_half_precision_no_eps_is_zero_and_no_square_infinite() -> None:
    x = torch.tensor([[0.0, 0.0], [3e4, 3e4]]).half()
    with torch.no_grad():
        found = RMSNorm(2, eps=1e-8).half()(x)
    torch.testing.assert_close(found.float(), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), rtol=2e-3, atol=0)
