"""LoRA adapters of the PEFT library: directories of ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT itself is not needed. Nothing is unpickled, and nothing of a directory is executed.
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayes_dispatch.arguments import real
from bayes_dispatch.errors import BundleError, ConfigError, ForeignExpertError, TensorError
from bayes_dispatch.experts.lora import Factors, LoraExpert
from bayes_dispatch.experts.provenance import provenance
from bayes_dispatch.experts.vectors import DTYPES
from bayes_dispatch.model.adaptation import Delta
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.storage import read_json, read_saved, read_tensors, save_directory, tensors_as_bytes, write_json

__all__ = ["CONFIG", "WEIGHTS", "check_export", "read_peft", "write_peft"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OURS = "bayes_dispatch"  # in the header of the tensors of an adapter that was written here
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
    "arrow_config": "a choice among adapters",
    "ensure_weight_tying": "factors that tied layers share",
}
READ = set(  # and heeded here
    """
    alpha_pattern base_model_name_or_path bias init_lora_weights lora_alpha peft_type r rank_pattern use_rslora
""".split()  # noqa: SIM905
)
# What tells of training, of how factors began, or of where they are, which their names tell, too; the last line is of
# older versions and of ms-swift.
WITHOUT_EFFECT = set(
    """
    auto_mapping corda_config eva_config exclude_modules fan_in_fan_out inference_mode layers_pattern
    layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config megatron_core peft_version
    qalora_group_size revision runtime_config target_modules task_type
    lora_dtype lorap_emb_lr lorap_lr_ratio merge_weights
""".split()  # noqa: SIM905
)
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft(backbone: Backbone, base: str, name: str, directory: str | Path) -> LoraExpert:
    """The adapter in a directory, as an expert; one that changes nothing is read with a warning.

    Args:
        backbone: its base model. base: that one's fingerprint. name: of the expert.
        directory: as PEFT's ``save_pretrained`` wrote it.

    Raises:
        BundleError: a file is missing, damaged, or a pickle.
        ConfigError: an adapter of another kind, or of layers that the model does not have or cannot adapt.
        ForeignExpertError: it was made for another base model. TensorError: values that are not finite.
    """
    factors = read_saved(Path(directory), CONFIG, partial(_read, backbone))
    if not any(bool(down.any() and up.any()) for down, up in factors.values()):
        warnings.warn(f"{directory} adds zeros alone, as before training: expert {name} is base", stacklevel=2)
    adapter = os.fsencode(Path(directory).resolve().name).decode(errors="replace")
    return LoraExpert(name, factors, base, {"adapter": adapter, **provenance()})


def write_peft(directory: Path, deltas: Mapping[str, Delta], base: str, embeddings: Collection[str]) -> None:
    """Write one adapter that adds these deltas, shared by all rows.

    Args:
        directory: in the place of an earlier adapter that was written here. base: path or name of the base model.
        embeddings: those of the matrices that are some.

    Raises:
        BundleError: the directory is a link, or holds anything else, an adapter from elsewhere included.
        TensorError: nothing to add.
    """
    if not deltas:
        raise TensorError("expected a blend that adapts a matrix, got base alone, which needs no adapter")
    tensors, ranks = {}, {}
    for matrix, delta in deltas.items():
        ranks[matrix] = len(delta.c)
        down, up = ("embedding_A", "embedding_B") if matrix in embeddings else ("A.weight", "B.weight")
        tensors[f"{PREFIX}{matrix}.lora_{down}"] = delta.down
        tensors[f"{PREFIX}{matrix}.lora_{up}"] = delta.up * delta.c
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
    check_export(directory)
    with save_directory(directory, CONFIG) as target:
        (target / WEIGHTS).write_bytes(tensors_as_bytes(tensors, {"format": "pt", OURS: provenance()[OURS]}))
        write_json(target / CONFIG, config)


def check_export(directory: Path) -> None:
    """Raise ``BundleError`` where an adapter is that was not written here."""

    def is_ours(place: Path) -> bool:
        return not (place / WEIGHTS).exists() or OURS in read_tensors(place / WEIGHTS)[1]

    if not read_saved(directory, CONFIG, is_ours):
        raise BundleError(f"expected {directory} to be new, empty or an earlier export, got an adapter from elsewhere")


def _read(backbone: Backbone, directory: Path) -> dict[str, Factors]:
    if not (directory / CONFIG).is_file():
        named = sorted(directory.glob(f"*/{CONFIG}"))  # PEFT keeps one that has a name in a directory of that name
        got = f"none; there is one in {named[0].parent}" if named else "none"
        raise BundleError(f"expected a LoRA adapter with an {CONFIG} in {directory}, got {got}")
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict):
        raise BundleError(f"expected the settings of an adapter in {directory / CONFIG}, got {config!r:.60}")
    _check_kind(directory, config)
    _check_base(backbone, directory, config)
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / "adapter_model.bin").exists()
        got = "adapter_model.bin, a pickle, which is never read: save it with safe_serialization" if pickled else "none"
        raise BundleError(f"expected {WEIGHTS} in {directory}, got {got}")
    return _factors(backbone, directory, config, read_tensors(directory / WEIGHTS)[0])


def _check_kind(directory: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"expected a LoRA adapter in {directory}, got one of type {config.get('peft_type')!r}")
    for setting, what in OTHER_KINDS.items():
        if config.get(setting):
            raise ConfigError(f"expected updates of low rank alone in {directory}, got {setting}: {what}")
    for setting in sorted(config.keys() - READ - WITHOUT_EFFECT):
        if config[setting]:
            known = f"expected settings of LoRA that are known here in {directory / CONFIG}"
            raise ConfigError(f"{known}, got {setting}: take it out if it changes no result")
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
        name for name in (theirs, ours) if isinstance(name, str) and hub.fullmatch(name) and not os.path.exists(name)
    ]
    if len(names) == 2 and theirs != ours:
        raise ForeignExpertError(f"expected an adapter of {ours} in {directory}, got one of {theirs}")


def _factors(
    backbone: Backbone, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Factors]:
    shapes, parameter = backbone.linears(), getattr(backbone, "parameter", lambda name: None)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_(?:embedding_)?(A|B)(?:\.weight)?", key)
        if found is not None:
            parts.setdefault(found[1], {})[found[2]] = tensor
        elif not _is_the_base(key, tensor, parameter):
            raise ConfigError(f"expected factors of LoRA alone in {directory / WEIGHTS}, got {key}")
    if not parts:
        raise BundleError(f"expected factors in {directory / WEIGHTS}, got none")
    if unknown := sorted(parts.keys() - shapes.keys()):
        why = "the model does not have" if parameter(f"{unknown[0]}.weight") is None else "a row's delta cannot reach"
        raise ConfigError(f"expected matrices that can be adapted in {directory}, got {unknown[0]}, which {why}")
    factors: dict[str, Factors] = {}
    for matrix, (out, width) in shapes.items():
        if (own := parts.get(matrix)) is None:
            continue
        if own.keys() != {"A", "B"}:
            raise BundleError(f"expected both factors of {matrix} in {directory / WEIGHTS}, got {''.join(own)} alone")
        down, up = own["A"], own["B"]
        if down.dtype not in DTYPES or up.dtype not in DTYPES:
            got = f"{down.dtype} and {up.dtype}"
            raise ConfigError(f"expected factors of {matrix} in numbers of 16 to 64 bits, got {got}: {directory}")
        rank = down.shape[0] if down.ndim == 2 else 0
        if down.shape != (rank, width) or up.shape != (out, rank):
            expected = f"expected factors (r, {width}) and ({out}, r) of {matrix} in {directory}"
            got = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise ForeignExpertError(f"{expected}, got {got}: it is of another base model")
        if not rank:
            raise BundleError(f"expected factors of rank 1 or more of {matrix} in {directory / WEIGHTS}, got rank 0")
        if (stated := _setting(directory, config, "r", "rank_pattern", matrix)) != rank:
            raise BundleError(
                f"expected factors of rank {stated:g} of {matrix}, as {CONFIG} in {directory} says, got {rank}"
            )
        alpha = _setting(directory, config, "lora_alpha", "alpha_pattern", matrix)
        down, up = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (down, up))
        factors[matrix] = down, up * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return factors


def _is_the_base(key: str, tensor: Tensor, parameter: Callable[[str], Tensor | None]) -> bool:
    """Whether a tensor is the base model's: PEFT adds those of embeddings and of a head to an adapter of them."""
    found = re.fullmatch(rf"{re.escape(PREFIX)}(.+?)(?:\.base_layer)?\.(weight|bias)", key)
    own = parameter(f"{found[1]}.{found[2]}") if found else None
    if own is None or own.shape != tensor.shape:
        return False
    coarse = min(own.dtype, tensor.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(own.detach().cpu().to(coarse), tensor.to(coarse))


def _setting(directory: Path, config: Mapping[str, Any], name: str, pattern: str, matrix: str) -> float:
    """A number of PEFT's, or that of the first pattern that fits the matrix; 8 is PEFT's own default."""
    patterns = config.get(pattern) or {}
    try:
        fitting = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", matrix))
        where, own = next(((pattern, value) for value in fitting), (name, config.get(name, 8)))
    except (AttributeError, re.error):
        raise ConfigError(
            f"expected {pattern} in {directory / CONFIG} to map names to numbers, got {patterns!r:.60}"
        ) from None
    return real(f"{where} in {directory / CONFIG}", own)
