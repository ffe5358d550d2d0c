"""Rotary positions (RoFormer, arXiv 2104.09864): queries and keys turned by angles that grow with their position."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["rotate"]


def rotate(x: Float[Tensor, "B H T W"], before: int | Tensor, base: float, turned: int) -> Float[Tensor, "B H T W"]:
    """Turn each pair (x[i], x[i + turned/2]) of a token by position * base^(−2i/turned).

    Args:
        x: queries or keys. before: position of their first token, one for all rows or one per row (B,).
        base: longest wavelength over 2π. turned: an even number of at most W: those after them stay as they are.
    """
    half = turned // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    start = torch.as_tensor(before, device=x.device).reshape(-1, 1)
    position = start + torch.arange(x.shape[2], device=x.device)  # (1 or B, T)
    angle = position[:, None, :, None] * frequency  # in double: positions may be large
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:turned]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., turned:]], dim=-1)
