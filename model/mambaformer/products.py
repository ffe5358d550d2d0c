"""The product of hidden states with a matrix, which may be large, and less precise than they are."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.model.mambaformer.compiled.switch import array, can_compile, kernels
from bayes_dispatch.model.mambaformer.compiled.threads import sharing

__all__ = ["HALVES", "MOST_ROWS", "Head", "times"]

HALVES = {torch.bfloat16, torch.float16}  # which matrices may be kept in beside float32

SMALL = 2**16  # numbers in a matrix of which a library's product of few rows is faster
MOST_ROWS = 32  # with more, it is faster, too
PLAIN = (Tensor, nn.Parameter)  # not a quantised matrix, which multiplies in its own way
TILE = 512  # rows of a matrix that are made precise at a time, and then still are in the processor's cache


def times(
    x: Float[Tensor, "*B K"], weight: Float[Tensor, "O K"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*B O"]:
    """``x Wᵀ + b`` in the precision of ``x``, which that of ``W`` may be less than.

    On a CPU nothing but the result is rounded: a matrix in bfloat16 halves what is read from memory, and that is what
    few rows wait for. Many rows are rounded to it, too, where the processor multiplies so and the caller allows it: by
    ``torch.set_float32_matmul_precision("medium")``, which is torch's word for that. Other devices always do.
    """
    plain = type(weight) in PLAIN
    near = plain and x.device.type == weight.device.type == "cpu"
    if near and x.dtype == weight.dtype in HALVES and not torch.is_grad_enabled() and not _in_hardware(x.dtype):
        return times(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
    half = plain and weight.dtype in HALVES and x.dtype not in HALVES
    rows = x.shape[:-1].numel()
    fits = weight.ndim == 2 and x.shape[-1] == weight.shape[1] and weight.is_contiguous()  # loops look at no index
    if near and rows and (half or weight.numel() >= SMALL) and fits and can_compile(x):
        few = rows <= MOST_ROWS and weight.dtype in (x.dtype, torch.bfloat16)
        if few or half:
            product = (_few if few else _tiled)(x.reshape(rows, x.shape[-1]), weight)
            return (product if bias is None else product.add_(bias)).reshape(*x.shape[:-1], len(weight))
    x = x.contiguous()  # of a slice of several rows, torch multiplies each by a copy of the matrix
    if not half:
        return F.linear(x, weight, bias)
    by = x.dtype if near or weight.dtype != torch.bfloat16 else weight.dtype
    return F.linear(x.to(by), weight.to(by), None if bias is None else bias.to(by)).to(x.dtype)


class Head(nn.Linear):
    """What gives logits, where it is not tied to the embedding."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)

    def forward(self, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B O"]:
        return times(x, self.weight)


def _few(x: Float[Tensor, "B K"], weight: Float[Tensor, "O K"]) -> Float[Tensor, "B O"]:
    """Of few rows, by a loop that reads the matrix once; threads share its rows."""
    rows, numbers = array(x), array(weight if weight.dtype == x.dtype else weight.view(torch.uint16))
    out = np.empty((len(rows), len(numbers)), rows.dtype)
    with sharing() as threads:
        kernels().multiply(rows, numbers, out, threads)
    return torch.from_numpy(out)


def _tiled(x: Float[Tensor, "B K"], weight: Float[Tensor, "O K"]) -> Float[Tensor, "B O"]:
    """Of many rows, by the library's product with a part of the matrix at a time, or all if rows are rounded."""
    rounded = weight.dtype == torch.bfloat16 and torch.get_float32_matmul_precision() == "medium"
    if rounded and _in_hardware(torch.bfloat16):
        return F.linear(x.bfloat16(), weight).to(x.dtype)
    out = x.new_empty(len(x), len(weight))
    precise = x.new_empty(min(TILE, len(weight)), x.shape[1])
    for start in range(0, len(weight), TILE):
        part = weight[start : start + TILE]
        torch.mm(x, precise[: len(part)].copy_(part).t(), out=out[:, start : start + TILE])
    return out


@cache
def _in_hardware(dtype: torch.dtype) -> bool:
    """Whether the library has products in half precision for this processor; others are a tenth as fast as float32's.

    They need AVX-512, for bfloat16 without instructions of its own. Of other kinds of processors it is not known.
    """
    can = torch.cpu.get_capabilities()
    needed = "avx512_bw" if dtype == torch.bfloat16 else "avx512_fp16"
    return can["architecture"] != "x86_64" or bool(can[needed])
