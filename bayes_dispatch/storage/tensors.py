"""Tensors in safetensors files, with a digest of everything in their header."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bayes_dispatch.errors import BundleError
from bayes_dispatch.storage.documents import digest, expect_digest
from bayes_dispatch.storage.files import read_bytes, replace_file

__all__ = ["check_tensors", "parse_tensors", "read_tensors", "tensors_as_bytes", "write_tensors"]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], check: Callable[[], object] | None = None
) -> None:
    """``replace_file`` for safetensors, with a digest of everything in their header."""
    replace_file(path, tensors_as_bytes(tensors, {**metadata, "digest": _of_tensors(tensors, metadata)}), check)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file.

    Raises:
        BundleError: the file is missing, truncated, no safetensors file, or has another digest than it states.
    """
    return parse_tensors(read_bytes(path), path)


def parse_tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``read_tensors`` of a file's bytes; ``path`` is for the error. A digest is checked where the header has one."""
    try:
        tensors = safetensors.torch.load(data)
        metadata = _header(data)[0].get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"expected a whole safetensors file {path}, got: {error}") from None
    if (expected := metadata.pop("digest", None)) is not None:
        expect_digest(path, expected, _of_tensors(tensors, metadata))
    return tensors, metadata


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Refuse tensors of a file that have other names, shapes or dtypes.

    Raises:
        BundleError: naming the first few.
    """
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise BundleError(f"expected {len(expected)} tensors in {path}, got others or fewer: {', '.join(odd[:4])}")
    for name, (shape, dtype) in expected.items():
        got = tensors[name]
        if tuple(got.shape) != shape or got.dtype != dtype:
            raise BundleError(
                f"expected {name} of shape {shape} and {dtype} in {path}, got {tuple(got.shape)} and {got.dtype}"
            )


def tensors_as_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: the same bytes for the same content, where its own writer shuffles metadata.

    Tensors that share memory are written each for itself, and will no longer share it.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in whole.items():
        if (place := tensor.untyped_storage().data_ptr()) in seen:
            whole[name] = tensor.clone()
        seen.add(place)
    data = safetensors.torch.save(whole, dict(metadata))
    described, end = _header(data)
    header = json.dumps(described, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(data)[end:]))


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where they begin: of bytes, its library gives no metadata."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), end


def _of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return digest(
        metadata,
        (
            b"".join(
                (
                    f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(),
                    tensor.detach().cpu().reshape(-1, 1).contiguous().view(torch.uint8).numpy().data,
                )
            )
            for name, tensor in sorted(tensors.items())
        ),
    )
