"""What each kind of block keeps between calls. Every tensor has the batch first, so rows can be moved and copied."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.model.mambaformer.compiled.switch import Array, Views

__all__ = ["AttentionState", "CrossAttentionState", "MambaState", "State"]

LESS = {torch.bfloat16, torch.int8}  # than float32: what loops in float32 read and write, too


@dataclass(eq=False)
class State:
    """Base of all states."""

    views: Views = field(default_factory=Views, init=False, repr=False)

    def copy(self) -> "State":
        """An independent copy."""
        copy = type(self)(**{field.name: getattr(self, field.name) for field in fields(self) if field.init})
        copy.apply(torch.clone)
        return copy

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, batch first; those not made yet are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by ``change`` of it."""
        for name, tensor in self.tensors().items():
            setattr(self, name, change(tensor))

    def leave_inference_mode(self) -> None:
        """Make what was made in inference mode, and can be changed only there, anew."""
        self.apply(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    def clear(self) -> None:
        """Forget everything; the memory stays."""
        self.apply(lambda tensor: tensor.detach().zero_())


@dataclass(eq=False)
class MambaState(State):
    """``conv`` (B, taps − 1, C): the last inputs of the convolution; ``ssm`` (B, …): the scan's state.

    They may be stored in less precision than the model computes in.
    """

    conv: Tensor
    ssm: Tensor

    def arrays(self) -> tuple[Array, ...]:
        """``conv`` and ``ssm`` for a compiled loop that changes them in place."""
        return self.views.of(self.conv, self.ssm)

    def update(self, conv: Tensor, ssm: Tensor) -> None:
        """Take new values: in place, or, where a gradient flows through them, as new tensors."""
        if _records_gradients(conv, ssm, self.ssm):
            self.conv, self.ssm = conv.to(self.conv.dtype), ssm.to(self.ssm.dtype)
        else:
            self.conv.copy_(conv)
            self.ssm.copy_(ssm)


@dataclass(eq=False)
class AttentionState(State):
    """Keys and values of the tokens that later ones attend to.

    Attributes:
        keys, values: (B, kv_heads, slots, head width), in a float dtype, or int8 with a scale for each vector.
        key_scales, value_scales: (B, kv_heads, slots, 1) for int8, else ``None``.
        window: with a sliding window, token t lies in slot t modulo ``slots``, over the one that has left the window;
            without one (``None``), tokens lie in order.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    window: int | None = None

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def has_room_for(self, capacity: int | None) -> bool:
        """Whether it has the slots of a cache of this capacity."""
        bounds = [bound for bound in (self.window, capacity) if bound is not None]
        return bool(bounds) and self.slots == min(bounds)

    def arrays(self, dtype: torch.dtype) -> tuple[Array, ...] | None:
        """Keys, values and their scales for a compiled loop in this dtype that changes them in place, if it can."""
        if self.keys.dtype != dtype and (dtype != torch.float32 or self.keys.dtype not in LESS):
            return None
        return self.views.of(self.keys, self.values, self.key_scales, self.value_scales)

    def write(self, keys: Float[Tensor, "B H T W"], values: Float[Tensor, "B H T W"], start: int) -> None:
        """Store T tokens of every row in the slots from ``start`` on."""
        length = keys.shape[2]
        for name, stored in self._encoded(keys, values).items():
            self._writable(name, stored).narrow(2, start, length).copy_(stored)

    def scatter(
        self, keys: Float[Tensor, "B H T W"], values: Float[Tensor, "B H T W"], places: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Store single tokens: ``places`` are their rows, times and slots, each (N,)."""
        rows, times, slots = places
        for name, stored in self._encoded(keys, values).items():
            self._writable(name, stored)[rows, :, slots] = stored[rows, :, times].to(getattr(self, name).dtype)

    def read(self, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (B, kv_heads, end, W) of the first ``end`` slots."""
        keys, values = (t.narrow(2, 0, end).to(dtype) for t in (self.keys, self.values))
        if self.key_scales is None or self.value_scales is None:
            return keys, values
        key_scales, value_scales = (t.narrow(2, 0, end).to(dtype) for t in (self.key_scales, self.value_scales))
        return keys * key_scales, values * value_scales

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they will be read again: so a token sees the same, stored or not."""
        if self.keys.dtype == keys.dtype:
            return keys, values
        if self.keys.dtype != torch.int8:
            return keys.to(self.keys.dtype).to(keys.dtype), values.to(self.keys.dtype).to(values.dtype)
        stored = self._encoded(keys, values)
        scales = stored.get("key_scales"), stored.get("value_scales")
        return AttentionState(stored["keys"], stored["values"], *scales).read(keys.shape[2], keys.dtype)

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` tokens, or those in the window; a ring is made larger only before it is full."""
        if self.window is not None:
            slots = min(slots, self.window)
        self.apply(lambda tensor: F.pad(tensor, (0, 0, 0, slots - tensor.shape[2])))

    def gather(self, index: Tensor) -> None:
        """Move what slot ``index[b, s]`` of row b holds to slot s, for index (B, s); later slots keep theirs."""
        for name, tensor in self.tensors().items():
            moved = tensor.gather(2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
            self._writable(name, moved)[:, :, : index.shape[1]] = moved

    def _encoded(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        if self.keys.dtype != torch.int8:
            return {"keys": keys, "values": values}  # converted when they are copied
        encoded = {}
        for name, tensor in (("key", keys), ("value", values)):
            scales = tensor.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127
            # by scales that are not rounded: half precision would make 128 of 127, and that is −128 in int8
            encoded[f"{name}s"] = (tensor / scales).round().to(torch.int8)
            encoded[f"{name}_scales"] = scales
        return encoded

    def _writable(self, name: str, stored: Tensor) -> Tensor:
        """The tensor to write to: where a gradient flows, a copy, since earlier calls have kept the former one."""
        tensor: Tensor = getattr(self, name)
        if _records_gradients(tensor, stored):
            tensor = tensor.clone()
            setattr(self, name, tensor)
        return tensor


@dataclass(eq=False)
class CrossAttentionState(State):
    """Keys and values of an encoder's output, computed by the first call and read by all later ones.

    Attributes:
        keys, values: (B, kv_heads, S, head width), ``None`` until they are computed.
        key_scales, value_scales: (B, kv_heads, S, 1) for int8, else ``None``.
        visible: (B, S), true where the encoder read a token; ``None`` where it read all S.
        source: (B, 32) bytes that tell what the encoder's output was made from; ``None`` where that is not known.
        dtype: in which keys and values are kept.
    """

    dtype: torch.dtype
    keys: Tensor | None = None
    values: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    visible: Tensor | None = None
    source: Tensor | None = None

    @property
    def filled(self) -> bool:
        """Whether it holds an encoder's output."""
        return self.keys is not None

    def fill(
        self,
        keys: Float[Tensor, "B H S W"],
        values: Float[Tensor, "B H S W"],
        visible: Tensor | None,
        source: Tensor | None,
    ) -> None:
        """Keep the keys and values of all S tokens."""
        empty = keys.new_empty(0, dtype=self.dtype)
        for name, stored in AttentionState(empty, empty)._encoded(keys, values).items():
            dtype = torch.float32 if name.endswith("scales") else self.dtype
            setattr(self, name, stored.to(dtype).contiguous())
        self.visible, self.source = visible, source

    def unchanged_by(self, index: Tensor) -> bool:
        """Whether each row ``index[b]`` was made from what row b was made from, as beams of one prompt are."""
        source = self.source
        return source is not None and len(index) == len(source) and torch.equal(source[index.to(source.device)], source)

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values (B, kv_heads, S, W) of a filled state."""
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        return AttentionState(keys, values, self.key_scales, self.value_scales).read(keys.shape[2], dtype)

    def arrays(self, dtype: torch.dtype) -> tuple[Array, ...] | None:
        """As those of ``AttentionState``, once it is filled."""
        if self.keys is None:
            return None
        kept = self.keys, self.values, self.key_scales, self.value_scales
        # nothing is written, so autograd is not told
        keys, values, *scales = (None if tensor is None else tensor.data.contiguous() for tensor in kept)
        return AttentionState(cast(Tensor, keys), cast(Tensor, values), scales[0], scales[1]).arrays(dtype)

    def clear(self) -> None:
        self.keys = self.values = self.key_scales = self.value_scales = self.visible = self.source = None


def _records_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
