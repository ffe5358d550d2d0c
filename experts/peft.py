"""LoRA adapters of the PEFT library: directories of ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT itself is not needed. Nothing is unpickled, and nothing of a directory is executed.
"""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayes_dispatch.errors import BundleError, ConfigError, ForeignExpertError, TensorError
from bayes_dispatch.experts.lora import Factors, LoraExpert
from bayes_dispatch.experts.provenance import provenance
from bayes_dispatch.model.adaptation import Delta
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.storage import parse_tensors, read_bytes, read_json, save_directory, tensors_as_bytes, write_json

__all__ = ["CONFIG", "WEIGHTS", "read_peft", "write_peft"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# settings of PEFT under which an update is no product of two factors, or is added to other weights than the base's
OTHER_KINDS = {
    "use_dora": "DoRA, which also scales the columns of the matrix",
    "lora_bias": "a bias in its factors",
    "modules_to_save": "whole modules of its own",
    "trainable_token_indices": "tokens of its own",
    "target_parameters": "parameters that are no layer's",
    "layer_replication": "layers that the base has not",
    "alora_invocation_tokens": "an activation that depends on the text",
    "use_qalora": "quantisation-aware factors",
    "use_bdlora": "block-diagonal factors",
    "monteclora_config": "random factors",
    "kasa_config": "a base whose weights it changes",
    "velora_config": "compressed gradients",
}
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft(backbone: Backbone, name: str, directory: str | Path) -> LoraExpert:
    """The adapter in a directory, as an expert.

    Args:
        backbone: its base model. name: of the expert. directory: as PEFT's ``save_pretrained`` wrote it.

    Raises:
        BundleError: a file is missing, damaged, or a pickle.
        ConfigError: an adapter of another kind, or of layers that the model does not have or cannot adapt.
        ForeignExpertError: it was made for another base model. TensorError: values that are not finite.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise BundleError(f"expected a LoRA adapter with an {CONFIG} in {directory}, got none")
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict):
        raise BundleError(f"expected the settings of an adapter in {directory / CONFIG}, got {config!r:.60}")
    _check_kind(directory, config)
    _check_base(backbone, directory, config)
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / "adapter_model.bin").exists()
        got = "adapter_model.bin, a pickle, which is never read: save it with safe_serialization" if pickled else "none"
        raise BundleError(f"expected {WEIGHTS} in {directory}, got {got}")
    tensors, _ = parse_tensors(read_bytes(directory / WEIGHTS), directory / WEIGHTS)
    factors = _factors(backbone, directory, config, tensors)
    return LoraExpert(name, factors, backbone.fingerprint(), {"adapter": directory.name, **provenance()})


def write_peft(directory: str | Path, deltas: Mapping[str, Delta], base: str, embeddings: Collection[str] = ()) -> None:
    """Write one adapter that adds these deltas, shared by all rows.

    Args:
        directory: in the place of an earlier adapter that was written here. base: path or name of the base model.
        embeddings: which of the matrices are embeddings; PEFT calls their factors otherwise.

    Raises:
        BundleError: the directory is a link, or holds anything else. TensorError: nothing to add, or deltas of rows.
    """
    if not deltas:
        raise TensorError("expected a blend that adapts a matrix, got base alone, which needs no adapter")
    tensors, ranks = {}, {}
    for matrix, delta in deltas.items():
        if delta.c.ndim != 1:
            raise TensorError(f"expected a delta that all rows share, got one of {len(delta.c)} rows")
        ranks[matrix] = len(delta.c)
        kind, end = ("lora_embedding", "") if matrix in embeddings else ("lora", ".weight")
        tensors[f"{PREFIX}{matrix}.{kind}_A{end}"] = delta.down
        tensors[f"{PREFIX}{matrix}.{kind}_B{end}"] = delta.up * delta.c
    most = max(ranks.values())
    others = {re.escape(matrix): rank for matrix, rank in ranks.items() if rank != most}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(deltas),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }
    with save_directory(Path(directory), CONFIG) as target:
        (target / WEIGHTS).write_bytes(tensors_as_bytes(tensors, {"format": "pt"}))
        write_json(target / CONFIG, config)


def _check_kind(directory: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"expected a LoRA adapter in {directory}, got one of type {config.get('peft_type')!r}")
    for setting, what in OTHER_KINDS.items():
        if config.get(setting):
            raise ConfigError(f"expected updates of low rank alone in {directory}, got {setting}: {what}")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"expected an adapter without biases in {directory}, got bias={config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
        raise ConfigError(f"expected an adapter of an unchanged base in {directory}, got {start}, which changes it")


def _check_base(backbone: Backbone, directory: Path, config: Mapping[str, Any]) -> None:
    """Two names on the hub tell two models; a path may have moved."""
    theirs, ours = config.get("base_model_name_or_path"), getattr(backbone, "name", "")
    hub = re.compile(r"[\w.-]+/[\w.-]+")
    names = [
        name for name in (theirs, ours) if isinstance(name, str) and hub.fullmatch(name) and not Path(name).exists()
    ]
    if len(names) == 2 and theirs != ours:
        raise ForeignExpertError(f"expected an adapter of {ours} in {directory}, got one of {theirs}")


def _factors(
    backbone: Backbone, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Factors]:
    shapes = backbone.linears()
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora|lora_embedding)_(A|B)(?:\.weight)?", key)
        if found is None:
            raise ConfigError(f"expected factors of LoRA alone in {directory / WEIGHTS}, got {key}")
        parts.setdefault(found[1], {})[found[3]] = tensor
    factors: dict[str, Factors] = {}
    for matrix in sorted(parts, key=lambda name: (list(shapes).index(name) if name in shapes else -1, name)):
        own = parts[matrix]
        if own.keys() != {"A", "B"}:
            raise BundleError(f"expected both factors of {matrix} in {directory / WEIGHTS}, got {''.join(own)} alone")
        if matrix not in shapes:
            raise ConfigError(
                f"expected layers that the model has, and that deltas reach, in {directory}, got {matrix}"
            )
        down, up = own["A"], own["B"]
        out, width = shapes[matrix]
        rank = down.shape[0] if down.ndim == 2 else 0
        if down.shape != (rank, width) or up.shape != (out, rank):
            expected = f"expected factors (r, {width}) and ({out}, r) of {matrix} in {directory}"
            got = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise ForeignExpertError(f"{expected}, got {got}: it is of another base model")
        scaling = _scaling(config, matrix, rank)
        wide = torch.promote_types(up.dtype, torch.float32)
        factors[matrix] = down.to(wide), up.to(wide) * scaling
    if not factors:
        raise BundleError(f"expected factors in {directory / WEIGHTS}, got none")
    return factors


def _scaling(config: Mapping[str, Any], matrix: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", matrix):
            alpha = own
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
