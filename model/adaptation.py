"""Scales for the adapted matrices of a model, as one immutable value that is passed to ``forward``."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from bayes_dispatch.errors import ConfigError, TensorError

__all__ = ["Adaptation", "block_of"]


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Singular-value scales ``z`` by matrix name: ``W(z) = U diag(s * z) Vᵀ`` (Transformer², arXiv 2501.06252).

    Attributes:
        scales: for each adapted matrix, its scales, shape (rank,) for one set that all rows share, or (B, rank) for one
            set per row of the batch; matrices that are not named keep their own weights.
        ahead: tokens that will be decoded one by one under these scales, as far as is known; 0 where nobody knows. It
            may decide how they are multiplied (``product_costs``), not what they mean.
        rows: B for per-row scales, ``None`` for shared ones.

    Raises:
        TensorError: scales of mixed kinds, of another number of rows, or not finite.
        ConfigError: fewer than 0 tokens ahead.
    """

    scales: Mapping[str, Tensor]
    ahead: int = 0
    rows: int | None = field(init=False)
    _digests: dict[tuple[str, ...], str | tuple[str, ...]] = field(init=False, repr=False, default_factory=dict)
    _parts: dict[str, "Adaptation"] = field(init=False, repr=False, default_factory=dict)
    _expected: dict[int, "Adaptation"] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.ahead < 0:
            raise ConfigError(f"expected at least 0 tokens ahead, got {self.ahead}")
        object.__setattr__(self, "scales", MappingProxyType(dict(self.scales)))
        kinds = {tuple(scales.shape[:-1]) for scales in self.scales.values()}
        if len(kinds) > 1 or any(not 1 <= scales.ndim <= 2 for scales in self.scales.values()):
            raise TensorError(
                "expected scales of shape (rank,) or all of shape (B, rank), got shapes "
                f"{sorted({tuple(scales.shape) for scales in self.scales.values()})}"
            )
        if self.scales and not torch.cat([z.flatten() for z in self.scales.values()]).isfinite().all():
            name = next(name for name, z in self.scales.items() if not z.isfinite().all())
            raise TensorError(f"expected finite scales for {name}, got NaN or infinite ones")
        (kind,) = kinds or {()}
        object.__setattr__(self, "rows", kind[0] if kind else None)

    def __reduce__(self) -> tuple[type["Adaptation"], tuple[dict[str, Tensor], int]]:
        return Adaptation, (dict(self.scales), self.ahead)  # a model that has been asked for one can be copied

    @classmethod
    def identity(cls) -> "Adaptation":
        """No adaptation: every matrix keeps its stored weights."""
        return cls({})

    @cached_property
    def lowest_block(self) -> float:
        """The first block that has a scaled matrix; infinity without any."""
        return float(min(map(block_of, self.scales), default=float("inf")))

    def expecting(self, tokens: int) -> "Adaptation":
        """The same scales, with so many tokens ahead.

        Raises:
            ConfigError: fewer than 0.
        """
        if tokens == self.ahead:
            return self
        latest = self._expected.get(tokens)
        if latest is None:  # once for calls that expect the same: matrices that were built for it are used again
            latest = Adaptation(self.scales, tokens)
            self._expected.clear()
            self._expected[tokens] = latest
        return latest

    def select(self, rows: Sequence[int] | Tensor) -> "Adaptation":
        """The scales of some rows, in that order; shared scales stay shared."""
        if self.rows is None:
            return self
        index = torch.as_tensor(rows)
        return Adaptation({name: scales[index] for name, scales in self.scales.items()}, self.ahead)

    def part(self, prefix: str) -> "Adaptation":
        """The scales whose matrix names begin with ``prefix``, under their names without it."""
        if prefix not in self._parts:  # once: every cached step asks
            named = {name: scales for name, scales in self.scales.items() if name.startswith(prefix)}
            self._parts[prefix] = Adaptation({name.removeprefix(prefix): scales for name, scales in named.items()})
        return self._parts[prefix]

    def digest(self, *prefixes: str) -> str | tuple[str, ...]:
        """A hash of the scales whose matrix names begin with one of ``prefixes``; empty where there are none.

        One for all rows, or one for each row; a row has the hash that its scales would have if they were shared.
        """
        if prefixes not in self._digests:  # once: every cached step asks
            self._digests[prefixes] = self._compute_digest(prefixes)
        return self._digests[prefixes]

    def _compute_digest(self, prefixes: tuple[str, ...]) -> str | tuple[str, ...]:
        named = {name: self.scales[name].detach().cpu() for name in sorted(self.scales) if name.startswith(prefixes)}
        if not named:
            return ""
        if self.rows is None:
            return _hash(named)
        return tuple(_hash({name: scales[row] for name, scales in named.items()}) for row in range(self.rows))


def block_of(matrix: str) -> int:
    """The block that an adaptable matrix belongs to: the first number in its name, 0 where there is none."""
    numbers = [int(part) for part in matrix.split(".") if part.isdigit()]
    return numbers[0] if numbers else 0


def _hash(named: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, scales in named.items():
        digest.update(f"{name}{tuple(scales.shape)}{scales.dtype}".encode())
        digest.update(scales.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
