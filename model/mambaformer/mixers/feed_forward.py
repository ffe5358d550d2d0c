"""The feed-forward block of a Transformer, gated (SwiGLU, arXiv 2002.05202)."""

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.model.adaptation import Scales
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """``out_proj(silu(gate) * up)``, token by token: it needs no state."""

    def __init__(self, config: MambaFormerConfig) -> None:
        super().__init__()
        biased = "feed_forward" in config.biased
        self.in_proj = SVDLinear(config.d_model, 2 * config.feed_forward_width, biased)
        self.out_proj = SVDLinear(config.feed_forward_width, config.d_model, biased)

    def forward(self, x: Float[Tensor, "B T D"], scales: Mapping[str, Scales]) -> Float[Tensor, "B T D"]:
        gate, up = self.in_proj(x, scales.get("in_proj")).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * up, scales.get("out_proj"))
