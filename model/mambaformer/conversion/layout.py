"""Where the tensors of a checkpoint of the transformers library are in a model of ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayes_dispatch.model.mambaformer.config import LanguageModelConfig
from bayes_dispatch.model.mambaformer.conversion.configs import Described

__all__ = ["Origin", "origins"]

View = Literal["same", "taps", "turned"]


@dataclass(frozen=True)
class Origin:
    """Tensors of theirs that are one of ours, one below the other.

    Attributes:
        names: theirs; none for zeros. rows: of each, where there are several. view: ``"taps"`` for a convolution's,
            which have one more dimension in theirs, ``"turned"`` for a matrix that is transposed.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    view: View = "same"

    def shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """Of theirs, where ours has this one."""
        if self.view == "taps":
            return [(shape[0], 1, shape[1])]
        if self.view == "turned":
            return [(shape[1], shape[0])]
        return [(rows, *shape[1:]) for rows in self.rows or (shape[0],)]

    def ours(self, theirs: Tensor) -> Tensor:
        """One of theirs as it stands in ours."""
        return theirs.squeeze(1) if self.view == "taps" else theirs.T if self.view == "turned" else theirs

    def theirs(self, ours: Tensor) -> dict[str, Tensor]:
        """One of ours as it stands in theirs."""
        ours = ours.unsqueeze(1) if self.view == "taps" else ours.T if self.view == "turned" else ours
        parts = ours.split(self.rows or len(ours))
        return {name: part.contiguous() for name, part in zip(self.names, parts, strict=False)}


@dataclass(frozen=True)
class Names:
    """What one kind of model calls its parts: before the last dot, of tensors ``weight`` and ``bias``."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    mixer_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mamba: str = "mamba"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"


STATE_SPACE = Names("backbone.embeddings", "backbone.layers", "backbone.norm_f", "norm", mamba="mixer")
BAMBA_MLP = ("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward.down_proj"
NAMES = {
    "bamba": Names(
        "model.embed_tokens",
        "model.layers",
        "model.final_layernorm",
        "input_layernorm",
        "pre_ff_layernorm",
        "mamba",
        *BAMBA_MLP,
    ),
    "granite": Names(),
    "granitemoehybrid": Names(mlp_in=("shared_mlp.input_linear",), mlp_out="shared_mlp.output_linear"),
    "llama": Names(),
    "mamba": STATE_SPACE,
    "mamba2": STATE_SPACE,
}


def origins(described: Described) -> dict[str, Origin]:
    """The origin of each tensor of a model of ours, and of biases that it may not have."""
    config, kind, conv_bias = described
    names, backbone = NAMES[kind], config.backbone
    found = {"embedding.weight": Origin((f"{names.embedding}.weight",))}
    layer = -1
    for place, block in enumerate(backbone.block_kinds):
        mlp = block == "feed_forward"
        layer += not mlp  # an MLP belongs to the mixer before it
        ours, theirs = f"blocks.{place}", f"{names.layers}.{layer}"
        norm = names.mlp_norm if mlp else names.mixer_norm
        found[f"{ours}.norm.weight"] = Origin((f"{theirs}.{norm}.weight",))
        parts = _attention(config) if block == "attention" else _mlp(names, config) if mlp else _mamba(names, block)
        for name, origin in parts.items():
            own = tuple(f"{theirs}.{each}" for each in origin.names)
            absent = name == "conv_bias" and not conv_bias
            found[f"{ours}.mixer.{name}"] = Origin(() if absent else own, origin.rows, origin.view)
    found["norm.weight"] = Origin((f"{names.norm}.weight",))
    if not config.tie_embeddings:
        found["head.weight"] = Origin(("lm_head.weight",))
    return found


def _attention(config: LanguageModelConfig) -> Mapping[str, Origin]:
    backbone = config.backbone
    rows = tuple(heads * backbone.head_width for heads in (backbone.n_heads, backbone.kv_heads, backbone.kv_heads))
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return _linear("qkv", *names, rows=rows) | _linear("out_proj", "self_attn.o_proj")


def _mlp(names: Names, config: LanguageModelConfig) -> Mapping[str, Origin]:
    rows = (config.backbone.feed_forward_width,) * 2 if len(names.mlp_in) > 1 else ()
    return _linear("in_proj", *names.mlp_in, rows=rows) | _linear("out_proj", names.mlp_out)


def _mamba(names: Names, block: str) -> Mapping[str, Origin]:
    mixer = names.mamba
    parts = {
        **_linear("in_proj", f"{mixer}.in_proj"),
        **_linear("out_proj", f"{mixer}.out_proj"),
        "conv_weight": Origin((f"{mixer}.conv1d.weight",), view="taps"),
        "conv_bias": Origin((f"{mixer}.conv1d.bias",)),
        "D": Origin((f"{mixer}.D",)),
    }
    if block == "mamba1":
        return parts | {
            "x_proj.weight": Origin((f"{mixer}.x_proj.weight",)),
            "dt_proj.weight": Origin((f"{mixer}.dt_proj.weight",)),
            "dt_bias": Origin((f"{mixer}.dt_proj.bias",)),
            "A_log": Origin((f"{mixer}.A_log",), view="turned"),
        }
    return parts | {
        "dt_bias": Origin((f"{mixer}.dt_bias",)),
        "A_log": Origin((f"{mixer}.A_log",)),
        "norm.weight": Origin((f"{mixer}.norm.weight",)),
    }


def _linear(ours: str, *theirs: str, rows: tuple[int, ...] = ()) -> dict[str, Origin]:
    """Weight and bias; which of the two there are is told by our model."""
    return {f"{ours}.{part}": Origin(tuple(f"{each}.{part}" for each in theirs), rows) for part in ("weight", "bias")}
