"""Padding of a batch: checked once, and moved to the right, where no causal block can see it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_dispatch.errors import TensorError

__all__ = ["Padding", "check_padding"]


@dataclass(frozen=True, eq=False)
class Padding:
    """Where the real tokens of a (B, T) batch stand.

    Attributes:
        tokens: real tokens of each row, (B,); ``None`` where all T are.
        shift: (B, T) index that moves each row's first real token to the left end; ``None`` where all begin there.
    """

    tokens: Tensor | None = None
    shift: Tensor | None = None

    def to_right(self, x: Tensor) -> Tensor:
        """(B, T) or (B, T, D) with its padding on the right."""
        return x if self.shift is None else _gather(x, self.shift)

    def restore(self, x: Tensor) -> Tensor:
        """Inverse of ``to_right``."""
        return x if self.shift is None else _gather(x, self.shift.argsort(dim=1))

    def real(self, length: int) -> Tensor | None:
        """(B, T) for T = ``length``: true where a token stands; ``None`` where all do."""
        if self.tokens is None:
            return None
        return self.restore(torch.arange(length, device=self.tokens.device) < self.tokens[:, None])


def check_padding(mask: Tensor | None, of: Tensor, at_least: int) -> Padding:
    """Read an attention mask: 1 for tokens, 0 for padding at the ends of each row.

    Args:
        mask: (B, T), or ``None`` where all tokens are real. of: the batch (B, T) or (B, T, D) that it is of.
        at_least: tokens that each row must have.

    Raises:
        TensorError: a mask of another shape, on another device, of other numbers than 0 and 1, with holes, or a row of
            too few tokens.
    """
    if mask is None:
        return Padding()
    shape = (of.shape[0], of.shape[1])
    if tuple(mask.shape) != shape:
        raise TensorError(f"expected an attention_mask of shape {shape}, got {tuple(mask.shape)}")
    if mask.device != of.device:
        raise TensorError(f"expected an attention_mask on {of.device}, as what it is of, got one on {mask.device}")
    if mask.is_floating_point() or mask.is_complex():  # such as one that is added to products: there 0 is for tokens
        raise TensorError(f"expected an attention_mask of truth values or whole numbers, got {mask.dtype}")
    real = mask.bool()
    if not bool((mask == real).all()):
        low, high = (int(bound) for bound in mask.aminmax())
        raise TensorError(f"expected an attention_mask of zeros and ones, got {low} … {high}")
    if bool(real.all()):
        return Padding()
    tokens = real.sum(1)
    if int(tokens.min()) < at_least:
        raise TensorError("expected at least one token in each row of attention_mask, got a row of padding")
    first = real.long().argmax(1)
    place = torch.arange(shape[1], device=mask.device)
    if not bool((real == ((place >= first[:, None]) & (place < (first + tokens)[:, None]))).all()):
        raise TensorError("expected padding at the ends of each row of attention_mask, got a mask with holes")
    if not bool(first.any()):
        return Padding(tokens)
    return Padding(tokens, (place + first[:, None]) % shape[1])


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index) if x.ndim == 2 else x.gather(1, index[..., None].expand_as(x))
