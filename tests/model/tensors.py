"""Tensors that tests of models share: drawn from a seed, and compared."""

import torch
from torch import Tensor, nn

__all__ = ["assert_equal", "assert_same", "normal", "tokens"]


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 258, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same(a: nn.Module, b: nn.Module, rtol: float = 0, atol: float = 0) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=name)
