"""What a configuration of the transformers library says, as one of ours, and the other way round.

Each key is read, or known to change no result, or refused by name.
"""

from dataclasses import fields
from typing import Any, NamedTuple

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.config import BlockKind, LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.conversion.blocks import Layers, Places, Repeated
from bayes_dispatch.model.mambaformer.conversion.keys import AUTO, NUMBER, Keys, listed
from bayes_dispatch.model.mambaformer.conversion.parts import (
    Alias,
    Biases,
    Fixed,
    Ignored,
    Key,
    Limits,
    Part,
    Positions,
    Rotary,
    Settings,
    StateHeads,
    Unused,
    translated,
)

__all__ = ["KINDS", "Described", "meaning", "read_config", "write_config"]


class Described(NamedTuple):
    """A checkpoint: our configuration, its ``model_type``, and whether its convolutions have a bias."""

    config: LanguageModelConfig
    kind: str
    conv_bias: bool = True


def _inner(found: Settings) -> int:
    return int(found["expand"] * found["d_model"])


def _turned(found: Settings) -> int:
    return int(found["rotary_width"])


ALL: tuple[Part, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "d_model"),
    Fixed("hidden_act", "silu", ("silu", "swish")),
)
BOUND = "max_position_embeddings", "longest"
UNTIED = Key("tie_word_embeddings", "tie_embeddings", False, bool)
STATE_SPACE: tuple[Part, ...] = (
    Key(*BOUND, LanguageModelConfig.longest),  # which transformers does not know of these
    Key("conv_kernel", "d_conv", 4),
    Key("layer_norm_epsilon", "norm_eps", 1e-5, NUMBER),
    Key("use_conv_bias", "conv_bias", True, bool),
    Alias("d_model", lambda found: found["d_model"]),  # of the library that the first were converted from, as are
    Alias("n_layer", lambda found: len(found["blocks"])),
    Alias("rms_norm", lambda found: True),
    Alias("ssm_cfg", lambda found: {}),
)
HEADS: tuple[Part, ...] = (
    Key("num_attention_heads", "n_heads", 32),
    Key("head_dim", "attention_head_dim", None),
)
SHARED_HEADS = Key("num_key_value_heads", "n_kv_heads", None)
PLAIN: tuple[Part, ...] = (
    *ALL,
    Key(*BOUND, 2048),
    UNTIED,
    *HEADS,
    SHARED_HEADS,
    Key("rms_norm_eps", "norm_eps", 1e-6, NUMBER),
    Repeated(("attention", "feed_forward"), 32),
    Key("intermediate_size", "d_ff", 11_008),
    Biases(attention_bias="attention", mlp_bias="feed_forward"),
    Rotary(),
    Unused(head_dim=1),
)
MULTIPLIED: tuple[Part, ...] = tuple(
    Key(name, name, 1.0, NUMBER)
    for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
)
HYBRID: tuple[Part, ...] = (
    *ALL,
    UNTIED,
    *HEADS,
    StateHeads("mamba_expand", "mamba_n_heads", "mamba_d_head", "mamba_n_groups", None, 1),
    Limits(),
    Key("mamba_d_state", "d_state", 256),
    Key("mamba_d_conv", "d_conv", 4),
    Key("mamba_conv_bias", "conv_bias", True, bool),
)
KINDS: dict[str, tuple[Part, ...]] = {
    "mamba": (
        *ALL,
        Key("tie_word_embeddings", "tie_embeddings", True, bool),
        Repeated(("mamba1",), 32),
        *STATE_SPACE,
        Key("state_size", "d_state", 16),
        Key("expand", "expand", 2),
        Key("time_step_rank", "dt_rank", None, AUTO),
        Biases(use_bias="mamba1"),
        Alias("intermediate_size", _inner),
        Alias("d_inner", _inner),
        Unused(n_heads=1, head_dim=1),
    ),
    "mamba2": (
        *ALL,
        UNTIED,
        Repeated(("mamba2",), 64),
        *STATE_SPACE,
        Key("state_size", "d_state", 128),
        StateHeads("expand", "num_heads", "head_dim", "n_groups", 64, 8),
        Limits(),
        Biases(use_bias="mamba2"),
        Alias("intermediate_size", _inner),
        Ignored("time_step_rank"),
        Unused(n_heads=1),
    ),
    "llama": PLAIN,
    "granite": PLAIN + MULTIPLIED,
    "bamba": (
        *HYBRID,
        Key(*BOUND, 262_144),
        Key("num_key_value_heads", "n_kv_heads", 8, null=None),
        Key("rms_norm_eps", "norm_eps", 1e-5, NUMBER),
        Places(),
        Key("intermediate_size", "d_ff", 14_336),
        Biases(attention_bias="attention", mlp_bias="feed_forward", mamba_proj_bias="mamba2"),
        Rotary(0.5, told=True),
        Alias("attn_rotary_emb", _turned),
    ),
    "granitemoehybrid": (
        *HYBRID,
        Key(*BOUND, 2048),
        SHARED_HEADS,
        Key("rms_norm_eps", "norm_eps", 1e-6, NUMBER),
        Layers(),
        Key("shared_intermediate_size", "d_ff", 1024),
        Biases(attention_bias="attention", mamba_proj_bias="mamba2"),
        Positions(),
        *MULTIPLIED,
        Fixed("num_local_experts", 8, (0,)),
        Fixed("normalization_function", "rmsnorm", ("rmsnorm",)),
        Alias("mlp_bias", lambda found: False),  # of checkpoints that others saved
        Ignored("intermediate_size"),  # of experts
    ),
}
# Settings that mean something where there are blocks of one of these kinds alone.
ONLY: dict[tuple[BlockKind, ...], tuple[str, ...]] = {
    ("mamba1", "mamba2"): ("d_state", "d_conv", "expand"),
    ("mamba1",): ("dt_rank",),
    ("mamba2",): ("head_dim", "n_groups", "norm_groups", "dt_limit"),
    ("attention",): (
        *("n_heads", "n_kv_heads", "attention_head_dim", "attention_multiplier", "attention_window"),
        *("positions", "rotary_base", "rotary_width"),
    ),
    ("feed_forward",): ("d_ff",),
    (): ("mixer", "n_pairs", "chunk_size"),  # told by the blocks, or no matter
}


def read_config(data: Any) -> Described:
    """Our configuration of what a config.json of that library describes.

    Raises:
        ConfigError: another kind of model, or a key whose value changes results and is not covered, by name.
    """
    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"expected a config whose model_type is {listed(KINDS)}, got {kind!r:.80}")
    keys, found = Keys(data), dict[str, Any]()
    for part in KINDS[kind]:
        found |= part.read(keys, found)
    keys.check_read()
    conv_bias = found.pop("conv_bias", True)
    try:
        whole = settings_of(_made(found))
        return Described(_made(whole), kind, conv_bias)
    except ConfigError as error:
        raise translated(error, KINDS[kind]) from None


def write_config(
    config: LanguageModelConfig, conv_bias: bool, model_type: str | None
) -> tuple[Described, dict[str, Any]]:
    """The keys of a config.json of that library that mean a configuration of ours.

    Args:
        conv_bias: whether convolutions have one. model_type: ``None`` for the first that has all settings.

    Raises:
        ConfigError: there is none; a setting is named that it has not.
    """
    if model_type is not None and model_type not in KINDS:
        raise ConfigError(f"expected a model_type of {listed(KINDS)}, got {model_type!r:.80}")
    said, meant = settings_of(config), meaning(config)
    reasons, tried = list[ConfigError](), [*KINDS] if model_type is None else [model_type]
    for kind in tried:
        keys = {"model_type": kind}
        for part in KINDS[kind]:
            keys |= part.write(said | {"conv_bias": conv_bias})
        layers = next(part for part in KINDS[kind] if "blocks" in part.names())
        if layers.read(Keys(keys), {})["blocks"] != said["blocks"]:
            continue
        try:
            described = read_config(keys)
        except ConfigError as error:
            reasons.append(error)
            continue
        again = meaning(described.config)
        if (name := next((name for name in meant if meant[name] != again[name]), None)) is None:
            return described, keys
        reasons.append(ConfigError(f"expected {name} that a {kind} model can have, got {said[name]!r:.80}"))
    if reasons:  # of the last one that has such blocks
        raise reasons[-1]
    raise ConfigError(f"expected blocks that a {listed(tried)} model can have, got {said['blocks']!r:.80}")


def settings_of(config: LanguageModelConfig) -> Settings:
    """What a configuration says, with nothing left open."""
    backbone = config.backbone
    kinds = backbone.block_kinds
    return {
        **{field.name: getattr(backbone, field.name) for field in fields(MambaFormerConfig)},
        **{name: value for name, value in vars(config).items() if name != "backbone"},
        "blocks": kinds,
        "n_kv_heads": backbone.kv_heads,
        "attention_head_dim": backbone.head_width,
        "attention_multiplier": backbone.attention_scale,
        "dt_rank": backbone.step_rank,
        "d_ff": backbone.feed_forward_width,
        "rotary_width": backbone.turned or None,
        "biased": tuple(sorted(set(backbone.biased) & set(kinds))),
    }


def meaning(config: LanguageModelConfig) -> Settings:
    """Those of its settings that mean something for the blocks that it has."""
    said = settings_of(config)
    without = {name for kinds, names in ONLY.items() if not {*kinds} & {*said["blocks"]} for name in names}
    return {name: value for name, value in said.items() if name not in without}


def _made(settings: Settings) -> LanguageModelConfig:
    names = {field.name for field in fields(MambaFormerConfig)}
    backbone = MambaFormerConfig(**{name: value for name, value in settings.items() if name in names})
    return LanguageModelConfig(
        backbone=backbone, **{name: value for name, value in settings.items() if name not in names}
    )
