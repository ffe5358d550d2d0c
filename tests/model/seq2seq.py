"""What tests of sequence-to-sequence models share: tokens of ``make_seq2seq``, in padded batches, and random scales."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayes_dispatch.model.adaptation import Adaptation

if TYPE_CHECKING:
    from bayes_dispatch.model.seq2seq.model import MambaFormerForSeq2Seq

__all__ = ["close", "pad", "scales", "tokens"]


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))


def scales(model: "MambaFormerForSeq2Seq", *lead: int, seed: int = 0, only: str = "") -> Adaptation:
    draw = torch.Generator().manual_seed(seed)
    drawn = {n: (1 + 0.4 * torch.randn(*lead, r, generator=draw)).to(model.dtype) for n, r in model.adaptable().items()}
    return Adaptation({name: z for name, z in drawn.items() if name.startswith(only)})


def pad(rows: list[Tensor], lefts: list[int]) -> tuple[Tensor, Tensor]:
    """Rows in one batch, each with up to ``lefts[b]`` of its padding on its left."""
    width = max(1, *(len(row) for row in rows))
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        left = min(lefts[b % len(lefts)], width - len(row))
        ids[b, left : left + len(row)] = row
        mask[b, left : left + len(row)] = 1
    return ids, mask


def close(got: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)
