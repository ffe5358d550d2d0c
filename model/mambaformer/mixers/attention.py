"""Self-attention with grouped key/value heads (arXiv 2305.13245) and an optional sliding window."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayes_dispatch.model.adaptation import Scales
from bayes_dispatch.model.mambaformer.cache import AttentionState
from bayes_dispatch.model.mambaformer.compiled.switch import Array, array, can_compile, kernels
from bayes_dispatch.model.mambaformer.compiled.threads import sharing
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.mixers.rotary import rotate
from bayes_dispatch.model.mambaformer.mixers.span import Span
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

__all__ = ["BidirectionalAttention", "SelfAttention"]


class SelfAttention(nn.Module):
    """Causal attention; positions are not encoded, or rotary."""

    def __init__(self, config: MambaFormerConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.kv_heads = config.kv_heads
        self.head_width = config.head_width
        self.scale = config.attention_scale
        self.window = config.attention_window
        self.base = config.rotary_base
        self.turned = config.turned
        biased = "attention" in config.biased
        self.qkv = SVDLinear(config.d_model, (self.n_heads + 2 * self.kv_heads) * self.head_width, biased)
        self.out_proj = SVDLinear(self.n_heads * self.head_width, config.d_model, biased)

    def init_state(self, batch_size: int, capacity: int | None, dtype: torch.dtype) -> AttentionState:
        """Room for the keys and values of ``capacity`` tokens, or of those in the window if they are fewer."""
        bounds = [bound for bound in (self.window, capacity) if bound is not None]
        shape = (batch_size, self.kv_heads, min(bounds), self.head_width)
        new = self.qkv.weight.detach().new_zeros
        keys, values = new(shape, dtype=dtype), new(shape, dtype=dtype)
        if dtype != torch.int8:
            return AttentionState(keys, values, window=self.window)
        key_scales, value_scales = (new((*shape[:3], 1), dtype=torch.float32) for _ in range(2))
        return AttentionState(keys, values, key_scales, value_scales, self.window)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        span: Span,
        scales: Mapping[str, Scales],
        state: AttentionState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Let each token attend to itself and those before it; keys and values are appended to ``state`` in place."""
        if state is not None and x.shape[1] == 1 and can_compile(x) and (kept := state.arrays(x.dtype)) is not None:
            return self._step_compiled(x, span, scales, kept)
        q, k, v = self._project(x, span, scales)
        if state is None:
            if self.window is None or self.window >= x.shape[1]:
                y = self._attend(q, k, v, None, is_causal=x.shape[1] > 1)
            else:
                y = self._attend_in_window(q, k, v, 0, None)
        elif self.window is not None:
            y = self._continue_ring(q, k, v, span, state)
        else:
            y = self._continue(q, k, v, span, state)
        return self._merge(y, x, scales)

    def _step_compiled(
        self, x: Float[Tensor, "B 1 D"], span: Span, scales: Mapping[str, Scales], kept: tuple[Array, ...]
    ) -> Float[Tensor, "B 1 D"]:
        """One token of each row, by the arrays of its state."""
        batch = x.shape[0]
        projected = array(self.qkv(x, scales.get("qkv"))).reshape(batch, -1)
        y = np.empty((batch, 1, self.n_heads * self.head_width), projected.dtype)
        with sharing() as threads:
            arguments = *span.places(batch), kept, *self.arguments()
            kernels().attend(projected, threads, *arguments, y.reshape(batch, -1))
        return self.out_proj(torch.from_numpy(y), scales.get("out_proj"))

    def arguments(self) -> tuple[bool, float, int, float]:
        """What compiled loops are told: whether states are rings, rotary base, numbers turned, scale of products."""
        return self.window is not None, self.base, self.turned, self.scale

    def _project(self, x: Tensor, span: Span, scales: Mapping[str, Scales]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, n_heads, T, W), keys and values (B, kv_heads, T, W)."""
        batch, length, _ = x.shape
        projected = self.qkv(x, scales.get("qkv"))
        if length == 1:
            heads = projected.view(batch, -1, 1, self.head_width)  # the same as below, in one call
        else:
            heads = projected.view(batch, length, -1, self.head_width).transpose(1, 2)
        q, k, v = heads.split((self.n_heads, self.kv_heads, self.kv_heads), dim=1)
        if self.turned:
            q, k = (rotate(heads, span.before, self.base, self.turned) for heads in (q, k))
        return q, k, v

    def _merge(self, y: Tensor, x: Tensor, scales: Mapping[str, Scales]) -> Tensor:
        """From (B, n_heads, T, W) to outputs of the shape of ``x``."""
        merged = y if x.shape[1] == 1 else y.transpose(1, 2)
        return self.out_proj(merged.reshape(*x.shape[:2], -1), scales.get("out_proj"))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool = False) -> Tensor:
        grouped = self.kv_heads != self.n_heads
        if grouped and q.shape[2] == 1 and visible is None:  # as if a group's heads were queries: half the time
            shared = q.reshape(q.shape[0], self.kv_heads, -1, self.head_width)
            return F.scaled_dot_product_attention(shared, k, v, scale=self.scale).reshape(q.shape)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=is_causal, enable_gqa=grouped, scale=self.scale
        )

    def _attend_in_parts(self, q: Tensor, k: Tensor, v: Tensor, filled: int) -> Tensor:
        """Attention of T queries to the ``filled`` tokens before them, and to the T of their own, causally.

        With one mask over both, most of which is true, each layer would make it and add it. Either part needs none;
        their outputs are joined by their normalisers, as those of blocks are in FlashAttention (arXiv 2205.14135).
        """
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which also tells the normalisers
        shared = q.reshape(q.shape[0], self.kv_heads, -1, self.head_width)  # as if a group's heads were queries
        past, seen = attend(shared, k[:, :, :filled], v[:, :, :filled], scale=self.scale)
        past, seen = past.reshape(q.shape), seen.reshape(q.shape[:3])
        k, v = (t[:, :, filled:] for t in (k, v))
        if self.kv_heads != self.n_heads:
            k, v = (t.repeat_interleave(self.n_heads // self.kv_heads, dim=1) for t in (k, v))
        own, said = attend(q, k, v, is_causal=True, scale=self.scale)
        return own.lerp_(past, torch.sigmoid(seen - said).unsqueeze(-1).to(own.dtype))

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, span: Span, state: AttentionState) -> Tensor:
        """Append to slots in order, and attend to all that are filled."""
        length = q.shape[2]
        filled = span.before - span.dropped
        if span.tokens is None and isinstance(filled, int):
            state.write(k, v, filled)
            keys, values = state.read(filled + length, k.dtype)
            if length == 1:
                return self._attend(q, keys, values, None)
            if filled == 0:
                return self._attend(q, keys, values, None, is_causal=True)
            if can_compile(q, keys, values):
                return self._attend_in_parts(q, keys, values, filled)
            first: Tensor = torch.tensor([filled], device=q.device)
        else:
            first = _per_row(filled, q)
            rows, times = _real_tokens(span, q)
            state.scatter(k, v, (rows, times, first[rows] + times))
            end = int((first + _new_tokens(span, q)).max())
            keys, values = state.read(max(1, end), k.dtype)  # a row without new tokens sees its old ones
        query = first[:, None, None, None] + torch.arange(length, device=q.device)[:, None]  # (1 or B, 1, T, 1)
        key = torch.arange(keys.shape[2], device=q.device)
        return self._attend(q, keys, values, key <= query)

    def _continue_ring(self, q: Tensor, k: Tensor, v: Tensor, span: Span, state: AttentionState) -> Tensor:
        """Attend to what the ring holds and to the new tokens, and keep the last of them in the ring."""
        length, slots = q.shape[2], state.slots
        if length == 1 and span.aligned and isinstance(span.before, int):
            state.write(k, v, span.before % slots)
            return self._attend(q, *state.read(min(slots, span.before + 1), k.dtype), None)
        before = _per_row(span.before, q)
        order = (before[:, None] + torch.arange(slots, device=q.device)) % slots  # slots from the oldest to the newest
        old = (
            t.gather(2, order[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_width))
            for t in state.read(slots, k.dtype)
        )
        new_k, new_v = state.rounded(k, v)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(old, (new_k, new_v), strict=True))
        y = self._attend_in_window(q, keys, values, slots, (slots - before).clamp(min=0))
        rows, times = _real_tokens(span, q)
        last = times >= _new_tokens(span, q)[rows] - slots
        rows, times = rows[last], times[last]
        state.scatter(k, v, (rows, times, (before[rows] + times) % slots))
        return y

    def _attend_in_window(self, q: Tensor, k: Tensor, v: Tensor, lead: int, empty: Tensor | None) -> Tensor:
        """Attention in pieces of the window's width, so that a long sequence costs length times window.

        Args:
            q: T queries. k, v: ``lead`` older keys and values, then those of the queries' own tokens.
            empty: how many of the oldest keys of each row (B,) hold nothing.
        """
        window = self.window or k.shape[2]
        piece = max(window, 64)
        outputs = []
        for start in range(0, q.shape[2], piece):
            stop = min(start + piece, q.shape[2])
            first = max(0, start + lead - window + 1)
            query = torch.arange(start + lead, stop + lead, device=q.device)[:, None]
            key = torch.arange(first, stop + lead, device=q.device)
            visible = (key <= query) & (key > query - window)  # (queries, keys)
            if empty is not None and first < lead:
                held = key >= empty[:, None]  # (B, keys); a query of a row sees at least itself
                visible = visible & held[:, None, None]
            span = slice(first, stop + lead)
            outputs.append(self._attend(q[:, :, start:stop], k[:, :, span], v[:, :, span], visible))
        return torch.cat(outputs, dim=2)


class BidirectionalAttention(SelfAttention):
    """Attention of an encoder: each token sees all tokens of its row."""

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        span: Span,
        scales: Mapping[str, Scales],
        state: AttentionState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Let each real token attend to all real ones; an encoder keeps no ``state``."""
        q, k, v = self._project(x, span, scales)
        mask = span.mask(x.shape[1])
        y = self._attend(q, k, v, None if mask is None else mask[:, None, None])
        return self._merge(y, x, scales)


def _per_row(number: int | Tensor, like: Tensor) -> Tensor:
    """One number per row (B,), on the device of ``like``."""
    if isinstance(number, Tensor):
        return number.to(like.device)
    return torch.full((like.shape[0],), number, device=like.device)


def _new_tokens(span: Span, like: Tensor) -> Tensor:
    return _per_row(like.shape[2] if span.tokens is None else span.tokens, like)


def _real_tokens(span: Span, like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and time of each real token, (N,) each."""
    mask = span.mask(like.shape[2])
    if mask is None:
        mask = torch.ones(like.shape[0], like.shape[2], dtype=torch.bool, device=like.device)
    rows, times = mask.to(like.device).nonzero(as_tuple=True)
    return rows, times
