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
    eps = torch.tensor(1e-3, dtype=torch.float64)
    for norm in (rms_norm, lambda x, w, eps: F.rms_norm(x, (shape[-1],), w, float(eps))):
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
