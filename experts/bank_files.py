"""An expert bank as a directory: ``bank.json``, and for each expert a file that is named by its content.

``bank.json`` alone decides what the bank holds: its base model, the adapted matrices, and name, file, digest and
metadata of each expert.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bayes_dispatch.errors import BayesDispatchError, BundleError, ConfigError, ForeignExpertError, TensorError
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.vectors import ExpertVector, check_file_name
from bayes_dispatch.storage import (
    keep_file,
    parse_tensors,
    read_bytes,
    read_json,
    read_saved,
    save_directory,
    tensors_as_bytes,
    write_json,
)

__all__ = [
    "ExpertCheck",
    "StoredBank",
    "StoredExpert",
    "read_bank",
    "verify_bank",
    "write_bank",
]

INDEX = "bank.json"
SVF, LORA = "svf", "lora"  # kinds of experts; an entry that names none is of the first
DOWN, UP = ".down", ".up"  # what a LoRA expert's tensors are called after their matrix
FORMAT = 2
DIGITS = 12  # of the digest, in a file's name


@dataclass(frozen=True, eq=False)
class StoredExpert:
    """An expert on disk, as ``bank.json`` tells of it; its file is read when ``vector`` is first asked for.

    Attributes:
        directory: of the bank. name: of the expert. digest: BLAKE2b of its file. metadata: of the expert.
        base: fingerprint of the base model. matrices: the matrices that it adapts, with their ranks.
        kind: ``SVF`` or ``LORA``.
    """

    directory: Path
    name: str
    digest: str
    metadata: Mapping[str, str]
    base: str
    matrices: Mapping[str, int]
    kind: str = SVF

    @property
    def file(self) -> str:
        """The name of its file."""
        return _file_name(self.name, self.digest)

    @cached_property
    def vector(self) -> ExpertVector | LoraExpert:
        """The expert.

        Raises:
            BundleError: its file is missing, truncated, edited, another expert's, or holds other matrices or values
                that are not finite. ForeignExpertError: it was made for another base model.
        """
        return read_saved(self.directory, INDEX, self._read)

    def _read(self, place: Path) -> ExpertVector | LoraExpert:
        path = place / self.file
        data = read_bytes(path)
        with torch.inference_mode(False):  # it stays, and blends of it may be differentiated later
            tensors, metadata = parse_tensors(data, path)
        if not {"name", "base"} <= metadata.keys():
            raise BundleError(f"expected the name and base model of an expert in {path}, got {metadata!r:.80}")
        name, base = metadata.pop("name"), metadata.pop("base")
        if name != self.name:
            raise BundleError(f"expected the expert {self.name!r} in {path}, got the expert {name!r}")
        if base != self.base:
            raise ForeignExpertError(
                f"expected expert {name} to be made for base model {self.base}, got one for {base}: {path}"
            )
        ends = [""] if self.kind == SVF else [DOWN, UP]
        if odd := sorted(tensors.keys() ^ {matrix + end for matrix in self.matrices for end in ends}):
            shown = ", ".join(odd[:4])
            raise BundleError(f"expected {len(self.matrices)} matrices in {path}, got others or fewer: {shown}")
        try:
            expert: ExpertVector | LoraExpert
            if self.kind == SVF:
                expert = ExpertVector(name, {matrix: tensors[matrix] for matrix in self.matrices}, base, metadata)
            else:
                factors = {matrix: (tensors[matrix + DOWN], tensors[matrix + UP]) for matrix in self.matrices}
                expert = LoraExpert(name, factors, base, metadata)
        except (ConfigError, TensorError) as error:
            raise BundleError(f"{path}: {error}") from None
        for matrix, rank in expert.matrices.items():
            if rank != self.matrices[matrix]:
                raise BundleError(f"expected {self.matrices[matrix]} scales of {matrix} in {path}, got {rank}")
        if (got := _digest(data)) != self.digest:
            raise BundleError(f"expected {path} with digest {self.digest[:12]}, got {got[:12]}: it was edited")
        if expert.metadata != self.metadata:
            raise BundleError(f"expected metadata of {name} as in {path}, got others in {INDEX}: it was edited")
        return expert


class StoredBank(NamedTuple):
    """What ``bank.json`` tells: the base model, its adapted matrices with their ranks, and the experts, in order."""

    base: str
    matrices: dict[str, int]
    experts: tuple[StoredExpert, ...]


@dataclass(frozen=True)
class ExpertCheck:
    """Whether an expert of a bank can be read.

    Attributes:
        name: of the expert. reason: why it is refused, in one line; ``None`` where it is whole.
    """

    name: str
    reason: str | None

    @property
    def ok(self) -> bool:
        """Whether it is whole."""
        return self.reason is None


def verify_bank(directory: str | Path) -> tuple[ExpertCheck, ...]:
    """Read every expert of a bank on disk, and tell of each whether it is whole.

    Raises:
        BundleError: ``bank.json`` itself is missing, damaged or of another format.
    """
    return read_saved(Path(directory), INDEX, _verify)


def write_bank(
    directory: Path, base: str, matrices: Mapping[str, int], experts: Sequence[ExpertVector | LoraExpert | StoredExpert]
) -> None:
    """Make ``directory`` hold this bank; experts that it holds already are neither read nor written.

    Raises:
        BundleError: ``directory`` is a file or a link, it holds anything but an earlier bank, or an expert of another
            directory cannot be read.
    """
    with save_directory(directory, INDEX) as new:
        entries = []
        for expert in experts:
            digest = _write_expert(directory.resolve(), new, expert)
            file, metadata = _file_name(expert.name, digest), dict(sorted(expert.metadata.items()))
            entry = {"name": expert.name, "file": file, "digest": digest, "metadata": metadata}
            if isinstance(expert, LoraExpert) or (isinstance(expert, StoredExpert) and expert.kind == LORA):
                entry |= {"kind": LORA, "matrices": dict(expert.matrices)}
            entries.append(entry)
        write_json(new / INDEX, {"format": FORMAT, "base": base, "matrices": dict(matrices), "experts": entries})


def read_bank(directory: Path) -> StoredBank:
    """Read ``bank.json``, and no expert.

    Raises:
        BundleError: it is missing, truncated, edited or of another format.
    """
    directory = directory.resolve()
    return read_saved(directory, INDEX, partial(_read, directory))


def _read(directory: Path, place: Path) -> StoredBank:
    path = place / INDEX
    index = read_json(path)
    if isinstance(index, dict) and "format" not in index and "experts" in index:
        raise BundleError(f"expected a bank of format {FORMAT} in {path}, got the older one: train its experts again")
    if not isinstance(index, dict) or type(index.get("format")) is not int or index["format"] != FORMAT:
        raise BundleError(f"expected a bank of format {FORMAT} in {path}, got {index!r:.80}")
    _expect(path, index.keys() == {"format", "base", "matrices", "experts"}, "base, matrices and experts", list(index))
    base, matrices, entries = index["base"], index["matrices"], index["experts"]
    _expect(path, isinstance(base, str) and base != "", "the fingerprint of a base model", base)
    _expect(path, isinstance(entries, list) and entries != [], "at least one expert", entries)
    scaled = any(isinstance(entry, dict) and "kind" not in entry for entry in entries)
    _expect_ranks(path, matrices, scaled)
    experts = tuple(_stored(directory, entry, base, matrices) for entry in entries)
    names = [expert.name for expert in experts]
    _expect(path, len(set(names)) == len(names), "experts of different names", names)
    return StoredBank(base, matrices, experts)


def _expect_ranks(path: Path, matrices: object, some: bool) -> None:
    _expect(path, isinstance(matrices, dict) and bool(matrices) >= some, "at least one matrix with its rank", matrices)
    assert isinstance(matrices, dict)
    _expect(path, all(type(rank) is int and rank > 0 for rank in matrices.values()), "ranks above 0", matrices)


def _stored(directory: Path, entry: Any, base: str, matrices: dict[str, int]) -> StoredExpert:
    path = directory / INDEX
    keys = {"name", "file", "digest", "metadata"}
    is_lora = isinstance(entry, dict) and entry.get("kind") == LORA
    if is_lora:
        keys |= {"kind", "matrices"}
    whole = isinstance(entry, dict) and entry.keys() == keys and isinstance(entry["metadata"], dict)
    _expect(path, whole, "name, file, digest and metadata of an expert", entry)
    name, file, digest, metadata = (entry[key] for key in ("name", "file", "digest", "metadata"))
    _expect(path, all(isinstance(text, str) for text in (name, file, digest, *metadata.values())), "text", entry)
    try:
        check_file_name(name)
    except ConfigError as error:
        raise BundleError(f"{path}: {error}") from None
    _expect(path, re.fullmatch("[0-9a-f]{32}", digest) is not None, "a digest of 32 hexadecimal digits", digest)
    _expect(path, file == _file_name(name, digest), _file_name(name, digest), file)
    if not is_lora:
        return StoredExpert(directory, name, digest, metadata, base, matrices)
    _expect_ranks(path, entry["matrices"], some=True)
    return StoredExpert(directory, name, digest, metadata, base, entry["matrices"], LORA)


def _expect(path: Path, holds: bool, what: str, got: object) -> None:
    if not holds:
        raise BundleError(f"expected {what} in {path}, got {got!r:.80}")


def _verify(place: Path) -> tuple[ExpertCheck, ...]:
    return tuple(ExpertCheck(expert.name, _reason(expert)) for expert in read_bank(place).experts)


def _reason(expert: StoredExpert) -> str | None:
    try:
        expert.vector  # noqa: B018
    except BayesDispatchError as error:
        return " ".join(str(error).split())
    return None


def expert_bytes(expert: ExpertVector | LoraExpert) -> bytes:
    """The file of an expert."""
    if isinstance(expert, LoraExpert):
        factors = expert.factors.items()
        tensors = {name: t for matrix, (down, up) in factors for name, t in ((matrix + DOWN, down), (matrix + UP, up))}
    else:
        tensors = dict(expert.scales)
    return tensors_as_bytes(tensors, {**expert.metadata, "name": expert.name, "base": expert.base})


def _write_expert(old: Path, new: Path, expert: ExpertVector | LoraExpert | StoredExpert) -> str:
    """Have ``new`` hold an expert's file, which ``old`` may have, and return its digest."""
    if isinstance(expert, StoredExpert):
        if expert.directory == old and (old / expert.file).is_file():
            keep_file(old / expert.file, new / expert.file)
            return expert.digest
        expert = expert.vector
    data = expert_bytes(expert)
    digest = _digest(data)
    name = _file_name(expert.name, digest)
    if (old / name).is_file() and (old / name).read_bytes() == data:
        keep_file(old / name, new / name)
    else:
        (new / name).write_bytes(data)
    return digest


def _file_name(name: str, digest: str) -> str:
    return f"{name}.{digest[:DIGITS]}.safetensors"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
