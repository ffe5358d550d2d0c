"""A residual block: a normalisation and one of the mixers."""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from bayes_dispatch.model.adaptation import Scales
from bayes_dispatch.model.mambaformer.cache import State
from bayes_dispatch.model.mambaformer.config import BlockKind, MambaFormerConfig
from bayes_dispatch.model.mambaformer.mixers import (
    CrossAttention,
    FeedForward,
    Mamba1Mixer,
    Mamba2Mixer,
    Memory,
    SelfAttention,
    Span,
)
from bayes_dispatch.model.mambaformer.normalisation import RMSNorm

__all__ = ["Block", "build_mixer"]


def build_mixer(kind: BlockKind, config: MambaFormerConfig) -> nn.Module:
    """A new mixer of this kind."""
    mixers: dict[BlockKind, Callable[[MambaFormerConfig], nn.Module]] = {
        "mamba1": Mamba1Mixer,
        "mamba2": Mamba2Mixer,
        "attention": SelfAttention,
        "cross_attention": CrossAttention,
        "feed_forward": FeedForward,
    }
    return mixers[kind](config)


class Block(nn.Module):
    """A residual block: ``x + residual * mixer(norm(x))``."""

    def __init__(self, mixer: nn.Module, config: MambaFormerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer
        self.residual = config.residual_multiplier

    def forward(
        self,
        x: Tensor,
        span: Span,
        scales: Mapping[str, Scales],
        state: State | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        if isinstance(self.mixer, CrossAttention):
            y = self.mixer(self.norm(x), scales, memory, state)
        elif isinstance(self.mixer, FeedForward):
            y = self.mixer(self.norm(x), scales)
        else:
            y = self.mixer(self.norm(x), span, scales, state)
        return x + (y if self.residual == 1 else y * self.residual)

    def init_state(self, batch_size: int, capacity: int | None, dtype: torch.dtype, kv_dtype: torch.dtype) -> State:
        """An empty state; a block that needs none has one without tensors."""
        if isinstance(self.mixer, SelfAttention):
            return self.mixer.init_state(batch_size, capacity, kv_dtype)
        if isinstance(self.mixer, CrossAttention):
            return self.mixer.init_state(kv_dtype)
        if isinstance(self.mixer, FeedForward):
            return State()
        return cast(Mamba2Mixer, self.mixer).init_state(batch_size, dtype)
