"""Rotary positions (RoFormer, arXiv 2104.09864): queries and keys turned by angles that grow with their position."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["BASE", "rotate"]

BASE = 10_000.0  # longest wavelength over 2π


def rotate(x: Float[Tensor, "B H T W"], before: int | Tensor, base: float = BASE) -> Float[Tensor, "B H T W"]:
    """Turn each pair (x[i], x[i + W/2]) of a token by position * base^(−2i/W).

    Args:
        x: queries or keys of even width W. before: position of their first token, one for all rows or one per row (B,).
        base: see ``BASE``.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    start = torch.as_tensor(before, device=x.device).reshape(-1, 1)
    position = start + torch.arange(x.shape[2], device=x.device)  # (1 or B, T)
    angle = position[:, None, :, None] * frequency  # in double: positions may be large
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
