"""Attention of a decoder to what an encoder read; its keys and values are computed once and kept in the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.cache import CrossAttentionState
from bayes_dispatch.model.config import MambaFormerConfig
from bayes_dispatch.model.svd_linear import SVDLinear

__all__ = ["CrossAttention", "Memory"]


@dataclass(frozen=True, eq=False)
class Memory:
    """What an encoder read.

    Attributes:
        hidden: its last hidden states. visible: true at real tokens; ``None`` where all are.
        source: 32 bytes for each row that tell what it was made from; ``None`` where that is not known.
    """

    hidden: Float[Tensor, "B S D"]
    visible: Bool[Tensor, "B S"] | None = None
    source: UInt8[Tensor, "B 32"] | None = None

    def select(self, rows: Sequence[int]) -> "Memory":
        """Some rows, in that order."""
        index = torch.as_tensor(rows)
        parts = (self.hidden, self.visible, self.source)
        return Memory(*(None if part is None else part.index_select(0, index.to(part.device)) for part in parts))


class CrossAttention(nn.Module):
    """Each token of the decoder sees all real tokens of its row in the encoder."""

    def __init__(self, config: MambaFormerConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.kv_heads = config.kv_heads
        self.head_width = config.d_model // config.n_heads
        self.q_proj = SVDLinear(config.d_model, config.d_model)
        self.kv_proj = SVDLinear(config.d_model, 2 * self.kv_heads * self.head_width)
        self.out_proj = SVDLinear(config.d_model, config.d_model)

    def init_state(self, dtype: torch.dtype) -> CrossAttentionState:
        """A state that the first call fills with keys and values in this dtype."""
        return CrossAttentionState(dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        scales: Mapping[str, Tensor],
        memory: Memory | None,
        state: CrossAttentionState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend to ``memory``, or to what ``state`` kept of it at the first call.

        Raises:
            TensorError: neither is there.
        """
        if state is None or not state.filled:
            if memory is None:
                raise TensorError("expected the encoder's output or a cache that has read it, got neither")
            pairs = self.kv_proj(memory.hidden, scales.get("kv_proj")).unflatten(-1, (-1, self.head_width))
            k, v = pairs.transpose(1, 2).chunk(2, dim=1)  # (B, kv_heads, S, W)
            visible = memory.visible
            if state is not None:
                state.fill(k, v, visible, memory.source)
        if state is not None:
            (k, v), visible = state.read(x.dtype), state.visible
        q = self.q_proj(x, scales.get("q_proj")).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        mask = None if visible is None else visible[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.kv_heads != self.n_heads)
        return self.out_proj(y.transpose(1, 2).reshape(x.shape), scales.get("out_proj"))
