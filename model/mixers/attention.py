"""Attention: causal self-attention with grouped key/value heads and an optional sliding window."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.model.cache import AttentionState
from bayes_dispatch.model.config import MambaFormerConfig
from bayes_dispatch.model.mixers.span import Span
from bayes_dispatch.model.svd_linear import SVDLinear

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Causal attention with grouped key/value heads and an optional sliding window; no positions are encoded."""

    def __init__(self, config: MambaFormerConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.kv_heads = config.kv_heads
        self.head_width = config.d_model // config.n_heads
        self.window = config.attention_window
        self.qkv = SVDLinear(config.d_model, (self.n_heads + 2 * self.kv_heads) * self.head_width)
        self.out_proj = SVDLinear(config.d_model, config.d_model)

    def init_state(self, batch_size: int, capacity: int) -> AttentionState:
        """Room for the keys and values of ``capacity`` tokens."""
        shape = (batch_size, self.kv_heads, capacity, self.head_width)
        new = self.qkv.weight.detach().new_zeros
        return AttentionState(keys=new(shape), values=new(shape))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        span: Span,
        scales: Mapping[str, Tensor],
        state: AttentionState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Let each token attend to itself and those before it; keys and values are appended to ``state`` in place."""
        batch, length, width = x.shape
        heads = self.qkv(x, scales.get("qkv")).view(batch, length, -1, self.head_width).transpose(1, 2)
        q, k, v = heads.split([self.n_heads, self.kv_heads, self.kv_heads], dim=1)  # (B, heads, T, width)
        if state is None:
            before = torch.zeros(1, dtype=torch.long)
        else:
            before = span.before[:1] if span.aligned else span.before
            k, v = self._append(k, v, span, state)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self._visible(length, k.shape[2], before), enable_gqa=self.kv_heads != self.n_heads
        )
        return self.out_proj(y.transpose(1, 2).reshape(batch, length, width), scales.get("out_proj"))

    @staticmethod
    def _append(k: Tensor, v: Tensor, span: Span, state: AttentionState) -> tuple[Tensor, Tensor]:
        length = k.shape[2]
        if span.aligned:
            start = int(span.before[0])
            state.keys[:, :, start : start + length] = k
            state.values[:, :, start : start + length] = v
            end = start + length
        else:
            mask = span.mask(length)
            real = torch.ones(k.shape[0], length, dtype=torch.bool) if mask is None else mask
            rows, times = real.nonzero(as_tuple=True)
            places = span.before[rows] + times
            state.keys[rows, :, places] = k[rows, :, times]
            state.values[rows, :, places] = v[rows, :, times]
            end = max(1, int((span.before + real.sum(1)).max()))  # a row without new tokens sees its old ones
        return state.keys[:, :, :end], state.values[:, :, :end]

    def _visible(self, queries: int, keys: int, before: Tensor) -> Tensor | None:
        """(1 or B, 1, T, keys), true where a query may look; ``None`` where it may look at all keys."""
        if queries == 1 and before.shape[0] == 1 and self.window is None:
            return None
        place = (before[:, None] + torch.arange(queries))[:, None, :, None]
        key = torch.arange(keys)
        visible = key <= place
        return visible if self.window is None else visible & (key > place - self.window)
