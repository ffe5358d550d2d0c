"""Checkpoints of pre-training: weights, moments of AdamW, and the number of steps done, written whole or not at all."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig
from bayes_dispatch.model.pretraining.recipe import Precision, PretrainingSettings
from bayes_dispatch.storage import check_tensors, parse_json, read_json, read_tensors, write_tensors

__all__ = ["FILE", "Identity", "load_checkpoint", "save_checkpoint"]

FILE = "pretraining.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Identity(NamedTuple):
    """All that decides, but for rounding, what a run makes of its texts; ``tokenizer`` is a digest, or bytes."""

    config: LanguageModelConfig
    settings: PretrainingSettings
    precision: Precision
    tokenizer: str = "bytes"

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"config": self.config.to_json(), "settings": asdict(self.settings)}

    @classmethod
    def from_json(cls, data: Any) -> "Identity":
        """Inverse of ``to_json``; what a file of an earlier version lacks has its default.

        Raises:
            ConfigError: a name is missing or unknown, or a value is out of range.
        """
        try:
            settings = PretrainingSettings(**data["settings"])
            config, precision = LanguageModelConfig.from_json(data["config"]), data.get("precision", "float32")
            return cls(config, settings, precision, data.get("tokenizer", "bytes"))
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"expected the configuration and the settings of a run, got: {error!r}") from None


def save_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity, step: int
) -> None:
    """Tensors, their step and what run they are of in one file, so that no crash can part them."""
    tensors = _named_state(model, optimizer) | {"step": torch.tensor(float(step))}
    write_tensors(directory / FILE, tensors, {"run": json.dumps(identity.to_json())})


def load_checkpoint(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity) -> int:
    """Restore model and optimiser, on the device of the model.

    Returns:
        The number of steps done; 0 where there is no checkpoint.

    Raises:
        ConfigError: the checkpoint is of another run.
        BundleError: it is damaged.
    """
    file = directory / FILE
    if not file.exists():
        return 0
    tensors, header = read_tensors(file)
    earlier = "run" not in header  # a checkpoint of an earlier version
    run = read_json(directory / "pretraining.json") if earlier else parse_json(header["run"].encode(), file)
    if not _is_of(identity, run):
        raise ConfigError(
            f"expected a checkpoint of these settings in {directory}, got one of others: use a new directory"
        )
    expected = {name: (tuple(t.shape), t.dtype) for name, t in _named_state(model, optimizer).items()}
    check_tensors(file, tensors, expected | {"step": ((), torch.float32)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            state = {"step": tensors["step"].clone(), **{key: tensors[f"{key}.{name}"] for key in MOMENTS}}
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    return int(tensors["step"])


def _is_of(identity: Identity, data: Any) -> bool:
    try:
        return Identity.from_json(data) == identity
    except ConfigError:
        return False


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key in MOMENTS:
            tensors[f"{key}.{name}"] = optimizer.state[parameter].get(key, torch.zeros_like(parameter))
    return tensors
