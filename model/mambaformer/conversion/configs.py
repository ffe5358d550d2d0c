"""What a configuration of the transformers library says, as one of ours.

Each key is read, or known to change no result, or refused by name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.config import BlockKind, LanguageModelConfig, MambaFormerConfig

__all__ = ["Described", "read_config"]

# What tells of training, generation, tokens, or how a result is computed, not what it is.
WITHOUT_EFFECT = set(
    """
    _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout attn_implementation
    bos_token_id chunk_size chunk_size_feed_forward dtype eos_token_id id2label init_method initializer_range
    is_decoder is_encoder_decoder label2id logits_to_keep mamba_chunk_size model_type num_experts_per_tok
    num_logits_to_keep output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp
    problem_type rescale_prenorm_residual residual_in_fp32 return_dict router_aux_loss_coef sep_token_id
    time_step_floor time_step_init_scheme time_step_max time_step_min time_step_scale torch_dtype
    transformers_version use_associative_scan use_cache use_mambapy z_loss_coefficient
""".split()  # noqa: SIM905
)
LAYERS: dict[str, BlockKind] = {
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
}
NUMBER = int | float
LARGEST, MOST_LAYERS = 2**26, 4096  # sizes beyond these are no model's: memory would be asked for first


class Described(NamedTuple):
    """A checkpoint: our configuration, its ``model_type``, and whether its convolutions have a bias."""

    config: LanguageModelConfig
    kind: str
    conv_bias: bool = True


class Keys:
    """The keys of a configuration, and which of them have been read."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.kind = data.get("model_type")
        self._data, self._unread = data, set(data) - WITHOUT_EFFECT

    def get(self, name: str, default: Any, kinds: Any = int) -> Any:
        """A value of this type; ``default`` where there is none, or null."""
        self._unread.discard(name)
        value = self._data.get(name)
        return default if value is None else self.checked(name, value, kinds)

    def checked(self, name: str, value: Any, kinds: Any) -> Any:
        """A value of this type; a number as a float, a whole one as a size."""
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            wanted = getattr(kinds, "__name__", "number")
            raise ConfigError(f"expected {name} of a {self.kind} config to be of type {wanted}, got {value!r:.80}")
        if kinds is NUMBER:
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(f"expected {name} of a {self.kind} config to be a number, got a huge one") from None
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= LARGEST:
            raise ConfigError(f"expected {name} of a {self.kind} config from 1 to {LARGEST}, got {value!r:.80}")
        return value

    def layers(self, default: int) -> int:
        """How many there are."""
        count = int(self.get("num_hidden_layers", default))
        if count > MOST_LAYERS:
            raise ConfigError(f"expected num_hidden_layers of a {self.kind} config up to {MOST_LAYERS}, got {count}")
        return count

    def needed(self, name: str) -> int:
        """A whole number that has to be there."""
        if (value := self.get(name, None)) is None:
            raise ConfigError(f"expected {name} in a {self.kind} config, got none")
        return int(value)

    def expect(self, name: str, default: Any, *allowed: Any) -> Any:
        """A value that is one of those that are known here."""
        self._unread.discard(name)
        value = default if self._data.get(name) is None else self._data[name]
        if value not in allowed or isinstance(value, bool) is not isinstance(allowed[0], bool):
            raise ConfigError(f"expected {name} of a {self.kind} config to be {_listed(allowed)}, got {value!r}")
        return value

    def check_read(self) -> None:
        """Raise unless all keys that have a value are known here."""
        for name in sorted(self._unread):
            if self._data[name] is not None:
                raise ConfigError(f"expected keys of a {self.kind} config that are known here, got {name}")


def read_config(data: Any) -> Described:
    """Our configuration of what a config.json of that library describes.

    Raises:
        ConfigError: another kind of model, or a key whose value changes results and is not covered, by name.
    """
    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in READERS:
        raise ConfigError(f"expected a config whose model_type is {_listed(READERS)}, got {kind!r}")
    keys = Keys(data)
    keys.expect("hidden_act", "silu", "silu", "swish")
    sizes = READERS[kind](keys)
    tied = keys.get("tie_word_embeddings", kind == "mamba", bool)
    head = {"vocab_size": keys.needed("vocab_size"), "tie_embeddings": tied}
    if kind.startswith("granite"):
        head["logits_scaling"] = keys.get("logits_scaling", 1.0, NUMBER)
    if (longest := keys.get("max_position_embeddings", None)) is not None:
        head["longest"] = longest
    conv_bias = keys.get("use_conv_bias" if kind in ("mamba", "mamba2") else "mamba_conv_bias", True, bool)
    keys.check_read()
    return Described(LanguageModelConfig(backbone=MambaFormerConfig(**sizes), **head), kind, conv_bias)


def _mamba(keys: Keys) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "d_model": keys.needed("hidden_size"),
        "blocks": ("mamba1",) * keys.layers(32),
        "d_state": keys.get("state_size", 16),
        "d_conv": keys.get("conv_kernel", 4),
        "expand": keys.get("expand", 2),
        "norm_eps": keys.get("layer_norm_epsilon", 1e-5, NUMBER),
        "biased": ("mamba1",) if keys.get("use_bias", False, bool) else (),
        "n_heads": 1,
        "head_dim": 1,
    }
    rank = keys.get("time_step_rank", "auto", int | str)
    if rank != "auto":
        sizes["dt_rank"] = rank
    inner = sizes["expand"] * sizes["d_model"]
    keys.expect("intermediate_size", inner, inner)
    return sizes


def _mamba2(keys: Keys) -> dict[str, Any]:
    keys.get("time_step_rank", "auto", int | str)  # not used by that library
    sizes: dict[str, Any] = {
        "d_model": keys.needed("hidden_size"),
        "blocks": ("mamba2",) * keys.layers(64),
        "n_heads": 1,
        "d_state": keys.get("state_size", 128),
        "d_conv": keys.get("conv_kernel", 4),
        "norm_eps": keys.get("layer_norm_epsilon", 1e-5, NUMBER),
        "biased": ("mamba2",) if keys.get("use_bias", False, bool) else (),
    }
    return sizes | _heads(keys, "", keys.get("head_dim", 64), keys.get("num_heads", 128), sizes["d_model"], 8)


def _heads(keys: Keys, prefix: str, width: int, heads: int, d_model: int, groups: int) -> dict[str, Any]:
    """Of Mamba-2, as two families of names have them."""
    expand = keys.get(f"{prefix}expand", 2)
    if width * heads != expand * d_model:
        named = f"{prefix}expand × hidden_size = {expand * d_model}"
        raise ConfigError(f"expected heads of a {keys.kind} config of {named} channels in all, got {heads} × {width}")
    n_groups = keys.get(f"{prefix}n_groups", groups)
    low, high = _bounds(keys)
    return {
        "expand": expand,
        "head_dim": width,
        "n_groups": n_groups,
        "norm_groups": n_groups,
        "dt_limit": (low, None if high == math.inf else high),
    }


def _bounds(keys: Keys) -> tuple[float, float]:
    given = keys.get("time_step_limit", (0.0, math.inf), list | tuple)
    # that library writes infinity as an object of its own
    bounds = [math.inf if bound == {"__float__": "Infinity"} else bound for bound in given]
    if len(bounds) != 2:
        raise ConfigError(f"expected time_step_limit of a {keys.kind} config to be two numbers, got {given!r}")
    low, high = (keys.checked("time_step_limit", bound, NUMBER) for bound in bounds)
    return low, high


def _attention(keys: Keys) -> dict[str, Any]:
    """What all models with attention have."""
    heads, d_model = keys.get("num_attention_heads", 32), keys.needed("hidden_size")
    width = keys.get("head_dim", None)
    if width is None and d_model % heads:
        raise ConfigError(f"expected num_attention_heads to divide hidden_size {d_model}, got {heads}")
    return {
        "d_model": d_model,
        "n_heads": heads,
        "n_kv_heads": keys.get("num_key_value_heads", heads),
        "attention_head_dim": None if width == d_model / heads else width,
        "norm_eps": keys.get("rms_norm_eps", 1e-6, NUMBER),
        "head_dim": 1,  # of Mamba-2: where there is none, it has no meaning
    }


def _rotary(keys: Keys, sizes: dict[str, Any], part: float = 1.0) -> dict[str, Any]:
    """Settings of rotary positions, of which only the first kind is known; ``part`` of each head is turned."""
    given = keys.get("rope_parameters", None, dict) or {}
    scaling = keys.get("rope_scaling", None, dict) or {}
    if given and scaling:
        raise ConfigError(f"expected rope_parameters or rope_scaling in a {keys.kind} config, got both")
    for where, values in (("rope_scaling", scaling), ("rope_parameters", given)):
        for name, value in values.items():
            plain = name in ("rope_type", "type") and value == "default"
            if not plain and not (where == "rope_parameters" and name in ("rope_theta", "partial_rotary_factor")):
                raise ConfigError(
                    f"expected {where} of a {keys.kind} config of the default kind, got {name} = {value!r}"
                )
    theta = keys.checked("rope_theta", given.get("rope_theta", keys.get("rope_theta", 10_000.0, NUMBER)), NUMBER)
    named = "partial_rotary_factor"  # that library reads it of one kind alone, and there in rope_parameters
    outside, factor = keys.get(named, part, NUMBER), keys.checked(named, given.get(named, part), NUMBER)
    if outside != part or (factor != part and keys.kind != "bamba"):
        got = factor if outside == part else outside
        raise ConfigError(f"expected {named} of a {keys.kind} config to be {part}, got {got}")
    width = sizes["attention_head_dim"] or sizes["d_model"] // sizes["n_heads"]
    turned = None if factor == 1 else int(width * factor)
    return {"positions": "rotary", "rotary_base": theta, "rotary_width": turned}


def _multipliers(keys: Keys) -> dict[str, Any]:
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    return {name: keys.get(name, 1.0, NUMBER) for name in names}


def _biased(keys: Keys, **kinds: BlockKind) -> tuple[BlockKind, ...]:
    return tuple(kind for name, kind in kinds.items() if keys.get(name, False, bool))


def _llama(keys: Keys) -> dict[str, Any]:
    sizes = _attention(keys)
    return (
        sizes
        | _rotary(keys, sizes)
        | {
            "blocks": ("attention", "feed_forward") * keys.layers(32),
            "d_ff": keys.get("intermediate_size", 11_008),
            "biased": _biased(keys, attention_bias="attention", mlp_bias="feed_forward"),
        }
    )


def _granite(keys: Keys) -> dict[str, Any]:
    return _llama(keys) | _multipliers(keys)


def _hybrid(keys: Keys) -> dict[str, Any]:
    """What models of Mamba-2 and attention have that name these sizes ``mamba_…``."""
    sizes = _attention(keys)
    heads, d_model = keys.get("mamba_n_heads", 128), sizes["d_model"]
    width = keys.get("mamba_d_head", "auto", int | str)
    width = keys.get("mamba_expand", 2) * d_model // heads if width == "auto" else width
    return (
        sizes
        | _heads(keys, "mamba_", width, heads, d_model, 1)
        | {"d_state": keys.get("mamba_d_state", 256), "d_conv": keys.get("mamba_d_conv", 4)}
    )


def _bamba(keys: Keys) -> dict[str, Any]:
    sizes, layers = _hybrid(keys), keys.layers(32)
    at = keys.get("attn_layer_indices", [], list)
    if outside := [place for place in at if place not in range(layers)]:
        raise ConfigError(f"expected attn_layer_indices below num_hidden_layers {layers}, got {outside[0]!r}")
    kinds: list[BlockKind] = ["attention" if place in at else "mamba2" for place in range(layers)]
    named = keys.get("layers_block_type", None, list)
    if named is not None and _kinds(keys, "layers_block_type", named) != kinds:
        raise ConfigError(f"expected layers_block_type of a bamba config to agree with attn_layer_indices, got {named}")
    biased = _biased(keys, attention_bias="attention", mlp_bias="feed_forward", mamba_proj_bias="mamba2")
    return (
        sizes
        | _rotary(keys, sizes, 0.5)
        | {"blocks": _with_mlp(kinds), "d_ff": keys.get("intermediate_size", 14_336), "biased": biased}
        | {"norm_eps": keys.get("rms_norm_eps", 1e-5, NUMBER)}
    )


def _granite_hybrid(keys: Keys) -> dict[str, Any]:
    sizes, layers = _hybrid(keys), keys.layers(32)
    keys.expect("num_local_experts", 8, 0)
    keys.expect("normalization_function", "rmsnorm", "rmsnorm")
    keys.get("intermediate_size", None, object)  # of experts
    every = ["mamba"] * layers
    kinds = _kinds(keys, "layer_types", keys.get("layer_types", keys.get("layers_block_type", every, list), list))
    if len(kinds) != layers:
        raise ConfigError(f"expected layer_types of num_hidden_layers {layers} layers, got {len(kinds)}")
    rotary = _rotary(keys, sizes)
    return (
        sizes
        | _multipliers(keys)
        | (rotary if keys.expect("position_embedding_type", "nope", "nope", "rope") == "rope" else {})
        | {"blocks": _with_mlp(kinds), "d_ff": keys.get("shared_intermediate_size", 1024)}
        | {"biased": _biased(keys, attention_bias="attention", mamba_proj_bias="mamba2")}
    )


def _kinds(keys: Keys, name: str, layers: list[Any]) -> list[BlockKind]:
    for layer in layers:
        if not isinstance(layer, str) or layer not in LAYERS:
            raise ConfigError(f"expected {name} of a {keys.kind} config to be {_listed(LAYERS)} each, got {layer!r}")
    return [LAYERS[layer] for layer in layers]


def _with_mlp(kinds: list[BlockKind]) -> tuple[BlockKind, ...]:
    """Each layer is a mixer and a gated MLP."""
    return tuple(block for kind in kinds for block in (kind, "feed_forward"))


def _listed(values: Any) -> str:
    return " or ".join(map(str, values))


READERS: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "bamba": _bamba,
    "granite": _granite,
    "granitemoehybrid": _granite_hybrid,
    "llama": _llama,
    "mamba": _mamba,
    "mamba2": _mamba2,
}
