"""State-space mixing in both directions, for encoders: one mixer over each row, and another over the row reversed."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.model.adaptation import Scales
from bayes_dispatch.model.mambaformer.cache import MambaState
from bayes_dispatch.model.mambaformer.mixers.span import Span

__all__ = ["BidirectionalMixer"]


class BidirectionalMixer(nn.Module):
    """``forwards(x) + reverse(backwards(reverse(x)))``, where ``reverse`` turns round the real tokens of each row.

    Two scans with weights of their own, added, as in Vision Mamba (arXiv 2401.09417). Their matrices are adapted under
    the names ``forwards.in_proj``, ``backwards.in_proj``, ….
    """

    def __init__(self, forwards: nn.Module, backwards: nn.Module) -> None:
        super().__init__()
        self.forwards = forwards
        self.backwards = backwards

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        span: Span,
        scales: Mapping[str, Scales],
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens of each row with those before and after them; an encoder keeps no ``state``."""
        order = _reversal(x, span)
        ahead = self.forwards(x, span, _of("forwards.", scales))
        back = self.backwards(_reordered(x, order), span, _of("backwards.", scales))
        return ahead + _reordered(back, order)


def _reversal(x: Tensor, span: Span) -> Tensor | None:
    """(B, T) index that turns round the real tokens and leaves padding in place; ``None`` where all T are real."""
    if span.tokens is None:
        return None
    place = torch.arange(x.shape[1], device=x.device)
    tokens = span.tokens.to(x.device)[:, None]
    return torch.where(place < tokens, tokens - 1 - place, place)


def _reordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x.flip(1) if order is None else x.gather(1, order[..., None].expand_as(x))


def _of(prefix: str, scales: Mapping[str, Scales]) -> dict[str, Scales]:
    return {name.removeprefix(prefix): z for name, z in scales.items() if name.startswith(prefix)}
