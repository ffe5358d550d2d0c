"""Models on disk: ``config.json``, ``model.safetensors``, and ``tokenizer.json`` unless tokens are bytes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import nn

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.model.mambaformer.products import HALVES
from bayes_dispatch.model.mambaformer.svd.files import Fingerprinted, load_factors
from bayes_dispatch.model.mambaformer.svd.linear import matrices
from bayes_dispatch.model.subwords import SubwordTokenizer
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.storage import (
    check_tensors,
    parse_json,
    read_bytes,
    read_saved,
    read_tensors,
    save_directory,
    write_json,
    write_output,
    write_tensors,
)

__all__ = ["ModelConfig", "Pretrained"]

M = TypeVar("M", bound="Pretrained")
DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


@runtime_checkable
class ModelConfig(Protocol):
    """A model's configuration, which JSON can hold."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, data: Any) -> Any: ...


class Pretrained(nn.Module):
    """A module made from ``config`` alone, of the class ``config_class``.

    Attributes:
        tokenizer: what its ids are of; bytes, where none was given.
    """

    config_class: type[ModelConfig]
    config: Any
    tokenizer: ByteTokenizer | SubwordTokenizer = ByteTokenizer()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model and its tokenizer, in the place of an earlier save in that directory.

        Weights in float32 that bfloat16 holds without loss, all of them, take half the bytes.

        Raises:
            BundleError: the directory is a link, or holds anything else.
        """
        with save_directory(Path(directory), "config.json") as new:
            write_json(new / "config.json", self.config.to_json())
            header = {"format": "pt", "config": _digest(read_bytes(new / "config.json"))}
            if isinstance(self.tokenizer, SubwordTokenizer):
                data = self.tokenizer.to_json()
                write_output(new / "tokenizer.json", data)
                header["tokenizer"] = _digest(data)
                if not self.tokenizer.trained:
                    header["tokenizer_settings"] = json.dumps(self.tokenizer.settings)
            tensors = self.state_dict()
            if all(t.dtype == torch.float32 and torch.equal(t, t.bfloat16().float()) for t in tensors.values()):
                tensors = {name: t.bfloat16() for name, t in tensors.items()}
                header["dtype"] = "float32"
            write_tensors(new / "model.safetensors", tensors, header)

    @classmethod
    def from_pretrained(cls: type[M], directory: str | Path) -> M:
        """Read what ``save_pretrained`` wrote, and factors that lie beside it; nothing is unpickled or executed.

        The model has the dtype that it was saved in, whatever PyTorch's default is; its matrices may have another.

        Raises:
            BundleError: a file is missing, truncated or edited, a tensor has another shape than the configuration says,
                or another dtype than the rest, or a tokenizer that has more tokens than the model.
        """
        return read_saved(Path(directory), "config.json", cls._read)

    @classmethod
    def _read(cls: type[M], directory: Path) -> M:
        file, weights = directory / "config.json", directory / "model.safetensors"
        data = read_bytes(file)
        try:
            config = cls.config_class.from_json(parse_json(data, file))
        except ConfigError as error:
            raise BundleError(f"{file}: {error}") from None
        tensors, header = read_tensors(weights)
        if header.get("dtype") == "float32" and all(t.dtype == torch.bfloat16 for t in tensors.values()):
            tensors = {name: t.float() for name, t in tensors.items()}
        try:
            with torch.device("meta"):  # no memory before the file is found to fill it
                model = cast(Any, cls)(config)
        except (OverflowError, RuntimeError) as error:
            raise BundleError(f"expected sizes of a model in {file}, got: {error}") from None
        large = matrices(model).keys()
        dtype = _most(tensor.dtype for name, tensor in tensors.items() if name not in large)
        model = model.to(dtype)
        if dtype == torch.float32 and (kept := _most(tensors[name].dtype for name in large & tensors.keys())) in HALVES:
            for name in large:
                parameter = model.get_parameter(name)
                parameter.data = parameter.data.to(kept)
        check_tensors(weights, tensors, {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()})
        if header.get("config", got := _digest(data)) != got:
            raise BundleError(f"expected in {file} what {weights} was saved with, got another: it was edited")
        # copies, one by one: what was read lies anywhere, and products of aligned matrices are faster
        model.load_state_dict({name: tensors.pop(name).clone() for name in list(tensors)}, assign=True)
        if "tokenizer" in header:
            model.tokenizer = _tokenizer(directory / "tokenizer.json", config.vocab_size, header, weights)
        if isinstance(model, Fingerprinted):
            load_factors(model, directory)
        return cast(M, model.eval())


def _most(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """That of most tensors: safetensors gives them in no order."""
    known = Counter(dtype for dtype in dtypes if dtype in DTYPES)
    return known.most_common(1)[0][0] if known else torch.float32


def _tokenizer(file: Path, vocab_size: int, header: Mapping[str, str], weights: Path) -> SubwordTokenizer:
    data = read_bytes(file)
    if header["tokenizer"] != _digest(data):
        raise BundleError(f"expected in {file} what {weights} was saved with, got another: it was edited")
    try:
        settings = json.loads(header["tokenizer_settings"]) if "tokenizer_settings" in header else None
        return SubwordTokenizer.from_json(data, vocab_size, settings)
    except (ConfigError, ValueError) as error:
        raise BundleError(f"{file}: {error}") from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
