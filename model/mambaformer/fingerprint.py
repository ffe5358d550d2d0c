"""A hash of a model's weights, kept until one of them changes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "contents", "part_count"]

LARGE = 2**26  # bytes of all tensors
FEW, MANY = 8, 64  # parts of each tensor


class Fingerprint:
    """The hash of all parameters and lasting buffers of a module, in float32, so that a float64 copy has the same.

    Whatever changed them, ``of`` sees it, since it sums all of their memory: 35 µs for half a million weights in
    float32, where a prompt of 64 tokens takes 1,400 and a decoded token 80. ``glance``, made for each of those, reads
    an eighth of each tensor in turn, of large models a 64th. What changes a whole tensor, as an optimiser does, it sees
    at once; what changes a few numbers of one, within eight tokens, or 64. Off the CPU both see version counters and
    places in memory alone.

    Args:
        settings: what else decides what the module computes, as JSON holds it: in no hash, but in ``maker``.
    """

    def __init__(self, *settings: Mapping[str, object]) -> None:
        self._settings = settings
        self._told = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest() if settings else ""
        self._kept: _Kept | None = None
        self._turn = 0

    def __reduce__(self) -> tuple[type["Fingerprint"], tuple[Mapping[str, object], ...]]:
        return Fingerprint, self._settings  # of another module

    @property
    def key(self) -> object:
        """What stands for the weights that were hashed last: the same object until they change."""
        return None if self._kept is None else self._kept.key

    def maker(self, module: nn.Module, dtype: torch.dtype, glance: bool = False) -> str:
        """What a cache remembers of the model that made it: the hash, by a glance or not, settings and dtype."""
        return f"{self.glance(module) if glance else self.of(module)}-{self._told} in {dtype}"

    def of(self, module: nn.Module) -> str:
        """The hash; always of the same module. Threads may compute it twice, and see it whole."""
        kept = self._kept
        found = None if kept is None else kept.tensors()
        if kept is None or found is None or contents(found) != kept.contents:
            kept = self._kept = _Kept.of(module)
        return kept.value

    def glance(self, module: nn.Module) -> str:
        """The hash, as ``of`` gives it, where only a part of the weights is looked at."""
        kept = self._kept
        if kept is None:
            return self.of(module)
        turn = self._turn % len(kept.contents)  # it may be of a model that was larger
        self._turn = turn + 1
        found = kept.tensors()
        if found is None or [tensor.data_ptr() for tensor in found] != kept.places:
            return self.of(module)
        if kept.memory is None:  # not all of it on the CPU
            same = contents(found, turn) == kept.contents[turn : turn + 1]
        else:
            sums = _sums(kept.memory, turn, 1, len(kept.contents))
            same = kept.contents[turn].startswith(sums.tobytes())
        return kept.value if same else self.of(module)


@dataclass(frozen=True, eq=False)
class _Kept:
    """What is known of a module: where its tensors are, what they were, and their hash."""

    parts: Sequence[tuple[Mapping[str, nn.Module | None], tuple[nn.Module | None, ...]]]
    slots: Sequence[tuple[Mapping[str, Tensor | None], str]]
    contents: Sequence[bytes]
    places: list[int]
    memory: np.ndarray | None
    value: str
    key: object = field(default_factory=object)  # that a copy of a model does not share

    @classmethod
    def of(cls, module: nn.Module) -> "_Kept":
        modules = list(module.modules())
        parts = [(part._modules, tuple(part._modules.values())) for part in modules if part._modules]
        slots: list[tuple[Mapping[str, Tensor | None], str]] = []
        for part in modules:
            slots += [(part._parameters, name) for name in part._parameters]
            slots += [(part._buffers, name) for name in part._buffers if name not in part._non_persistent_buffers_set]
        kept = [tensor for slot, name in slots if (tensor := slot[name]) is not None]
        plain = all(tensor.is_cpu and tensor.is_contiguous() for tensor in kept)
        places = [tensor.data_ptr() for tensor in kept]
        return cls(parts, slots, contents(kept), places, _memory(kept) if plain else None, _hash(module))

    def tensors(self) -> list[Tensor] | None:
        """The present ones, in the same places; ``None`` where modules or names are others."""
        # walking the modules would take longer than a cached step
        if any(tuple(present.values()) != kept for present, kept in self.parts):
            return None
        try:
            return [tensor for slot, name in self.slots if (tensor := slot[name]) is not None]
        except KeyError:
            return None


def contents(tensors: Sequence[Tensor], part: int | None = None) -> Sequence[bytes]:
    """What tells whether a number in one of these tensors has changed, or in one part of each: for each part."""
    parts = part_count(tensors)
    first, count = (0, parts) if part is None else (part, 1)
    near = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors if tensor.is_cpu]
    sums = _sums(_memory(near), first, count, parts)
    more = str(tensors[0].dtype)
    if len(near) < len(tensors):
        more += str([(-1 if t.is_inference() else t._version, t.data_ptr()) for t in tensors if not t.is_cpu])
    return [row.tobytes() + more.encode() for row in sums]


def _memory(tensors: Sequence[Tensor]) -> np.ndarray:
    """Where contiguous tensors are, and how many bytes they have."""
    return np.array([[tensor.data_ptr() for tensor in tensors], [tensor.nbytes for tensor in tensors]], np.int64)


def part_count(tensors: Sequence[Tensor]) -> int:
    """In how many parts they are looked at: of a large model a part takes a hundredth of a decoded token's time."""
    return MANY if sum(tensor.nbytes for tensor in tensors) > LARGE else FEW


def _sums(memory: np.ndarray, first: int, count: int, parts: int) -> np.ndarray:
    sums = np.empty((count, memory.shape[1]), np.uint64)
    _module().checksum(memory, first, parts, sums)
    return sums


@cache
def _module() -> ModuleType:
    from bayes_dispatch.model.mambaformer.compiled import checksum  # numba takes long to import

    return checksum


def _hash(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    lasting = module.state_dict(keep_vars=True).keys()
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if name in lasting]
    for name, tensor in [*module.named_parameters(), *buffers]:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
