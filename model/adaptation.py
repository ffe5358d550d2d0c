"""Scales for the adapted matrices of a model, as one immutable value that is passed to ``forward``."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.factors import Factor, hashed, looked_at

__all__ = ["Adaptation", "Delta", "MatrixScales", "Scales", "Tensors", "block_of", "rows_of_deltas", "rows_of_ones"]

Digest = str | tuple[str, ...]  # of scales: one for all rows, or one for each; empty where there are none
FACTORS = ("up", "down")  # of a delta, which all rows share


class Tensors(Mapping[str, Tensor]):
    """Tensors by name that nobody can change: copies go in and come out. Gradients flow through both."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False):
            self.own = {name: tensor.clone() for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.own[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(z, other[name]) for name, z in self.own.items())

    __hash__ = None  # type: ignore[assignment]


class Delta(NamedTuple):
    """What is added to a matrix: ``y = W x + up (c * (down x))``, a diagonal between two factors.

    Attributes:
        up: (out, r). down: (r, in). c: (r,) for all rows, or (B, r) for each row of the batch.
    """

    up: Float[Tensor, "out r"]
    down: Float[Tensor, "r in"]
    c: Float[Tensor, "*B r"]

    def __call__(self, x: Tensor) -> Tensor:
        """What is added for inputs (B, …, in), or for tokens (B, …) of an embedding."""
        inner = F.linear(x, self.down) if x.is_floating_point() else self.down.T[x]
        c = self.c if self.c.ndim == 1 else self.c.reshape(len(self.c), *[1] * (inner.ndim - 2), -1)
        return F.linear(inner * c, self.up)

    def to(self, like: Tensor) -> "Delta":
        """On the device and in the dtype of a tensor."""
        same = all(each.dtype == like.dtype and each.device == like.device for each in self)
        return self if same else Delta(*(each.to(like) for each in self))

    def select(self, rows: Sequence[int] | Tensor) -> "Delta":
        """That of some rows; shared ones stay shared."""
        return self if self.c.ndim == 1 else self._replace(c=self.c[torch.as_tensor(rows, device=self.c.device)])

    def followed_by(self, other: "Delta | None", own: int, others: int) -> "Delta":
        """That of ``own`` rows, then of ``others``; ``None`` adds nothing.

        Raises:
            TensorError: other factors.
        """
        c = self.c.expand(own, -1)
        if other is None:
            return self._replace(c=torch.cat([c, c.new_zeros(others, c.shape[1])]))
        for mine, theirs in ((self.up, other.up), (self.down, other.down)):
            if mine is not theirs and not (mine.shape == theirs.shape and torch.equal(mine, theirs)):
                raise TensorError("expected rows whose deltas have the same factors, got others")
        return self._replace(c=torch.cat([c, other.c.expand(others, -1)]))

    @classmethod
    def joined(cls, deltas: Sequence["Delta"]) -> "Delta":
        """Their sum."""
        rows = max((delta.c.shape[:-1] for delta in deltas), key=len)
        c = torch.cat([delta.c.expand(*rows, delta.c.shape[-1]) for delta in deltas], -1)
        return cls(torch.cat([delta.up for delta in deltas], 1), torch.cat([delta.down for delta in deltas]), c)


class MatrixScales(NamedTuple):
    """Scales of one matrix, and what is known already when it is used.

    Attributes:
        z: (r,) for all rows, or (B, r); ``None`` where nothing is scaled.
        ones: as ``rows_of_ones`` says; ``None`` where nobody has looked.
        weights: the same object for as long as no weight of the model changes; ``None`` where nobody has looked.
        delta: what is added; ``None`` for nothing.
    """

    z: Tensor | None
    ones: bool | Tensor | None = None
    weights: object = None
    delta: Delta | None = None


Scales = Tensor | MatrixScales


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Singular-value scales ``z`` by matrix name: ``W(z) = U diag(s * z) Vᵀ`` (Transformer², arXiv 2501.06252).

    It has copies of the scales: what an optimiser does to them afterwards is seen by a new adaptation alone. Gradients
    flow through the copies.

    Attributes:
        deltas: what is added to matrices; their factors are shared, not copied, and not to be changed. A new adaptation
            sees it where they were (through ``.data`` it does not).
        scales: for each adapted matrix, its scales, shape (rank,) for one set that all rows share, or (B, rank) for one
            set per row of the batch; matrices that are not named keep their own weights.
        rows: B for per-row scales, ``None`` for shared ones.

    Raises:
        TensorError: scales of mixed kinds, of another number of rows, or not finite; factors that are not finite.
    """

    scales: Mapping[str, Tensor]  # ``Tensors``, once it is made
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    rows: int | None = field(init=False)
    _factors: Mapping[str, Factor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kinds = {tuple(scales.shape[:-1]) for scales in self.scales.values()}
        kinds |= {tuple(delta.c.shape[:-1]) for delta in self.deltas.values()}
        if len(kinds) > 1 or any(not 1 <= scales.ndim <= 2 for scales in self.scales.values()):
            raise TensorError(
                "expected scales of shape (rank,) or all of shape (B, rank), got shapes "
                f"{sorted({tuple(scales.shape) for scales in self.scales.values()})}"
            )
        numbers = [*self.scales.items(), *((name, delta.c) for name, delta in self.deltas.items())]
        if numbers and not torch.cat([z.flatten() for _, z in numbers]).isfinite().all():
            name = next(name for name, z in numbers if not z.isfinite().all())
            raise TensorError(f"expected finite scales for {name}, got NaN or infinite ones")
        parts = {_part(name, part): getattr(delta, part) for name, delta in self.deltas.items() for part in FACTORS}
        object.__setattr__(self, "_factors", looked_at(parts))
        (kind,) = kinds or {()}
        object.__setattr__(self, "rows", kind[0] if kind else None)
        if not isinstance(self.scales, Tensors):
            object.__setattr__(self, "scales", Tensors(self.scales))
        object.__setattr__(self, "deltas", MappingProxyType(dict(self.deltas)))

    def __reduce__(self) -> tuple[type["Adaptation"], tuple[dict[str, Tensor], dict[str, Delta]]]:
        own = self.detached()
        return Adaptation, (dict(own.scales), dict(own.deltas))

    @staticmethod
    def identity() -> "Adaptation":
        """No adaptation: every matrix keeps its stored weights."""
        return _IDENTITY

    @cached_property
    def lowest_block(self) -> float:
        """The first block that has an adapted matrix; infinity without any."""
        return float(min(map(block_of, [*self.scales, *self.deltas]), default=float("inf")))

    def matrices(self, weights: object = None) -> dict[str, MatrixScales]:
        """Scales and deltas by matrix, not copied: nobody may change them. ``weights`` as in ``MatrixScales``."""
        own = cast(Tensors, self.scales).own
        known = {} if weights is None or torch.compiler.is_compiling() else self._ones
        found = {name: MatrixScales(z, known.get(name), weights, self.deltas.get(name)) for name, z in own.items()}
        for name in self.deltas.keys() - own.keys():
            found[name] = MatrixScales(None, delta=self.deltas[name])
        return found

    def of(self, matrix: str, weights: object = None) -> MatrixScales | None:
        """``matrices`` of one name, or ``None``."""
        return self.matrices(weights).get(matrix) if matrix in self.scales or matrix in self.deltas else None

    def select(self, rows: Sequence[int] | Tensor) -> "Adaptation":
        """The scales of some rows, in that order; shared scales stay shared."""
        if self.rows is None:
            return self
        index = torch.as_tensor(rows)
        deltas = {name: delta.select(index) for name, delta in self.deltas.items()}
        return Adaptation({name: scales[index] for name, scales in self.scales.items()}, deltas)

    def followed_by(self, other: "Adaptation", own: int, others: int) -> "Adaptation":
        """That of ``own`` rows, then of ``others``.

        Raises:
            TensorError: scales of other ranks, or deltas of other factors.
        """
        scales: dict[str, Tensor] = {}
        for name in {**self.scales, **other.scales}:
            parts = [(each.scales.get(name), rows) for each, rows in ((self, own), (other, others))]
            known = next(z for z, _ in parts if z is not None)
            filled = [(known.new_ones(known.shape[-1]) if z is None else z).expand(rows, -1) for z, rows in parts]
            if filled[0].shape[1] != filled[1].shape[1]:
                raise TensorError(f"expected scales of one rank for {name}, got {[z.shape[1] for z in filled]}")
            scales[name] = torch.cat(filled)
        return Adaptation(scales, rows_of_deltas(self.deltas, other.deltas, own, others))

    def detached(self) -> "Adaptation":
        """The same without gradients."""
        # the same tensors where there are no gradients: they are known
        deltas = {
            name: Delta(*(each.detach() if each.requires_grad else each for each in delta))
            for name, delta in self.deltas.items()
        }
        return Adaptation({name: z.detach() for name, z in self.scales.items()}, deltas)

    def to(self, device: torch.device) -> "Adaptation":
        """The same on a device: what is used again and again is moved there once. Itself, where all of it is there."""
        own = [*cast(Tensors, self.scales).own.values(), *(each for delta in self.deltas.values() for each in delta)]
        if all(each.device == device for each in own):
            return self
        with torch.inference_mode(False):  # what is moved stays, and is known
            scales = {name: z.to(device) for name, z in cast(Tensors, self.scales).own.items()}
            moved = Adaptation(scales, {n: Delta(*(e.to(device) for e in delta)) for n, delta in self.deltas.items()})
        for name, factor in moved._factors.items():  # hashed once, on whatever device they are
            factor.digest = self._factors[name].digest
        return moved

    def part(self, name: str) -> "Adaptation":
        """What it does to the matrices in one part of a model, ``name.…``, under their names within it."""
        return self._parts.get(name, _IDENTITY)

    def digest(self, block: int | None = None) -> Digest:
        """A hash of what adapts one block (``block_of``), or all; empty where nothing does, as scales of 1.

        One for all rows, or one for each row; a row has the hash that its scales would have if they were shared.
        """
        return self._whole if block is None else self._digests.get(block, "")

    @cached_property
    def _ones(self) -> Mapping[str, bool | Tensor]:  # once: every matrix of every prompt asks
        with torch.inference_mode(False):
            return {name: rows_of_ones(z) for name, z in cast(Tensors, self.scales).own.items()}

    @cached_property
    def _parts(self) -> Mapping[str, "Adaptation"]:  # once: every cached step asks
        def within(part: str, named: Mapping[str, Any]) -> dict[str, Any]:
            return {name.removeprefix(part): each for name, each in named.items() if name.startswith(part)}

        parts = {name.partition(".")[0] for name in [*self.scales, *self.deltas]}
        return {part: Adaptation(within(f"{part}.", self.scales), within(f"{part}.", self.deltas)) for part in parts}

    @cached_property
    def _digests(self) -> Mapping[int, Digest]:  # once: every cached step asks
        blocks: dict[int, list[str]] = {}
        for name in {**self.scales, **self.deltas}:
            blocks.setdefault(block_of(name), []).append(name)
        return {block: self._digest(names) for block, names in blocks.items()}

    @cached_property
    def _whole(self) -> Digest:
        return self._digest([*self.scales, *self.deltas]) if self.scales or self.deltas else ""

    def _digest(self, names: Sequence[str]) -> Digest:
        """Of some matrices: what is for each row, and then what all share.

        What changes nothing is left out: a row has the same hash alone and beside rows that adapt more matrices.
        """
        rows = 1 if self.rows is None else self.rows
        near = {
            name: self.scales[name].detach().cpu().expand(rows, -1) for name in sorted(names) if name in self.scales
        }
        adapts = {name: (each != 1).any(1).tolist() for name, each in near.items()}
        deltas = {f"{name} c": name for name in sorted(names) if name in self.deltas}
        near |= {key: self.deltas[name].c.detach().cpu().expand(rows, -1) for key, name in deltas.items()}
        adapts |= {key: (near[key] != 0).any(1).tolist() for key in deltas}

        @cache  # most rows have deltas of the same matrices
        def of_factors(names: tuple[str, ...]) -> str:
            parts = [_part(name, part) for name in names for part in FACTORS]
            told = " ".join(f"{part} {self._factors[part].digest}" for part in parts)
            return hashlib.blake2b(told.encode(), digest_size=16).hexdigest() if told else ""

        def of(row: int) -> str:
            own = {name: each[row] for name, each in near.items() if adapts[name][row]}
            return hashed(own) + of_factors(tuple(deltas[key] for key in own if key in deltas)) if own else ""

        return of(0) if self.rows is None else tuple(of(row) for row in range(rows))


def rows_of_deltas(mine: Mapping[str, Delta], theirs: Mapping[str, Delta], own: int, others: int) -> dict[str, Delta]:
    """What is added to each matrix for ``own`` rows, then for ``others``.

    Raises:
        TensorError: deltas of a matrix have other factors.
    """
    found = {name: delta.followed_by(theirs.get(name), own, others) for name, delta in mine.items()}
    for name in theirs.keys() - mine.keys():
        delta = theirs[name]
        nothing = delta._replace(c=delta.c.new_zeros(own, delta.c.shape[-1]))
        found[name] = nothing.followed_by(delta, own, others)
    return found


def rows_of_ones(z: Tensor) -> bool | Tensor:
    """Whether scales (r,) or (B, r) are all 1: true or false for all rows, or (B,) for each."""
    ones = (z == 1).all(dim=-1)
    return bool(ones.all()) or (bool(ones.any()) and ones)


def block_of(matrix: str) -> int:
    """The block that an adaptable matrix belongs to: the first number in its name, 0 where there is none."""
    numbers = [int(part) for part in matrix.split(".") if part.isdigit()]
    return numbers[0] if numbers else 0


def _part(matrix: str, part: str) -> str:
    return f"{part} of the delta of {matrix}"


_IDENTITY = Adaptation({})  # it is asked for at every step
