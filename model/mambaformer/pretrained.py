"""Models on disk: ``config.json`` and ``model.safetensors`` in a directory."""

import json
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import safetensors.torch
from torch import nn

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.model.files import read_json, read_tensors, write_directory
from bayes_dispatch.model.mambaformer.svd.files import Fingerprinted, load_factors

__all__ = ["ModelConfig", "Pretrained"]

M = TypeVar("M", bound="Pretrained")


@runtime_checkable
class ModelConfig(Protocol):
    """A model's configuration, which JSON can hold."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, data: Any) -> Any: ...


class Pretrained(nn.Module):
    """A module made from ``config`` alone, of the class ``config_class``."""

    config_class: type[ModelConfig]
    config: Any

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; an existing directory is replaced once all is written."""
        with write_directory(Path(directory)) as target:
            (target / "config.json").write_text(json.dumps(self.config.to_json(), indent=2) + "\n")
            tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
            safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls: type[M], directory: str | Path) -> M:
        """Read what ``save_pretrained`` wrote, and factors that lie beside it; nothing is unpickled or executed.

        Raises:
            BundleError: a file is missing or truncated, or a tensor has another shape or dtype than the configuration
                says.
        """
        directory = Path(directory)
        try:
            config = cls.config_class.from_json(read_json(directory / "config.json"))
        except ConfigError as error:
            raise BundleError(f"{directory / 'config.json'}: {error}") from None
        model = cast(Any, cls)(config)
        expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
        model.load_state_dict(read_tensors(directory / "model.safetensors", expected))
        if isinstance(model, Fingerprinted):
            load_factors(model, directory)
        return cast(M, model.eval())
