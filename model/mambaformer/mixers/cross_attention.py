"""Attention of a decoder to what an encoder read; its keys and values are computed once and kept in the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.adaptation import Scales
from bayes_dispatch.model.mambaformer.cache import CrossAttentionState
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

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

    def check(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Raise ``TensorError`` unless it is of ``rows`` rows, each with a real token, and of this width and dtype."""
        shape = tuple(self.hidden.shape)
        if len(shape) != 3 or shape[1] < 1 or (shape[0], shape[2]) != (rows, width):
            raise TensorError(f"expected a memory of shape ({rows}, S, {width}) with S >= 1, got {shape}")
        if self.hidden.dtype != dtype:
            raise TensorError(f"expected a memory of {dtype}, got {self.hidden.dtype}")
        if self.visible is not None and self.visible.shape != shape[:2]:
            got = tuple(self.visible.shape)
            raise TensorError(f"expected visible tokens of a memory of shape {shape[:2]}, got {got}")
        if self.visible is not None and not bool(self.visible.any(1).all()):
            raise TensorError("expected at least one visible token in each row of a memory, got a row of padding")

    def select(self, rows: Sequence[int]) -> "Memory":
        """Some rows, in that order."""
        index = torch.as_tensor(rows, device=self.hidden.device)
        visible = None if self.visible is None else self.visible[index]
        return Memory(self.hidden[index], visible, None if self.source is None else self.source[index.cpu()])


class CrossAttention(nn.Module):
    """Each token of the decoder sees all real tokens of its row in the encoder."""

    def __init__(self, config: MambaFormerConfig) -> None:
        super().__init__()
        self.kv_heads = config.kv_heads
        self.head_width = config.head_width
        self.scale = config.attention_scale
        width, biased = config.n_heads * self.head_width, "cross_attention" in config.biased
        self.q_proj = SVDLinear(config.d_model, width, biased)
        self.kv_proj = SVDLinear(config.d_model, 2 * self.kv_heads * self.head_width, biased)
        self.out_proj = SVDLinear(width, config.d_model, biased)

    def init_state(self, dtype: torch.dtype) -> CrossAttentionState:
        """A state that the first call fills with keys and values in this dtype."""
        return CrossAttentionState(dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        scales: Mapping[str, Scales],
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
        q = self.q_proj(x, scales.get("q_proj")).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        if state is not None:
            (k, v), visible = state.read(q.dtype), state.visible
        mask = None if visible is None else visible[:, None, None]
        shared = q.reshape(q.shape[0], self.kv_heads, -1, self.head_width)  # as if a group's heads were queries
        y = F.scaled_dot_product_attention(shared, k, v, attn_mask=mask, scale=self.scale).reshape(q.shape)
        return self.out_proj(y.transpose(1, 2).flatten(2), scales.get("out_proj"))
