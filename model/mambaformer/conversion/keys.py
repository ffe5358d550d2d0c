"""The keys of a configuration of the transformers library, read one by one and checked."""

from collections.abc import Mapping
from typing import Any

from bayes_dispatch.errors import ConfigError

__all__ = ["AUTO", "NEEDED", "NUMBER", "Keys", "listed", "without_effect"]

# What tells of training, generation, or how a result is computed, not what it is; and what publishers add, and
# transformers heeds nowhere (norm_before_gate: published as true and as false; the gate comes first).
WITHOUT_EFFECT = set(
    """
    architectures attention_dropout attn_implementation chunk_size chunk_size_feed_forward dtype exported_by
    fuse_cross_entropy fuse_norm fused_add_norm hidden_dropout id2label init_method initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id logits_to_keep mamba_chunk_size mamba_dt_rank model_name model_type
    norm_before_gate num_experts_per_tok num_logits_to_keep output_attentions output_hidden_states output_router_logits
    pad_vocab_size_multiple pretraining_tp problem_type rescale_prenorm_residual residual_in_fp32 return_dict
    rope_interleaved router_aux_loss_coef time_step_floor time_step_init_scheme time_step_max time_step_min
    time_step_scale torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version
    use_associative_scan use_cache use_mamba_kernels use_mambapy z_loss_coefficient
""".split()  # noqa: SIM905
)
NUMBER = int | float
AUTO = "a whole number or auto"  # a kind of value; auto is None
NEEDED = object()  # a default that there is not
LARGEST, MOST_LAYERS = 2**26, 4096  # sizes beyond these are no model's: memory would be asked for first


def without_effect(name: str) -> bool:
    """Whether a key changes no result: also names that tell where a model came from, and numbers of special tokens."""
    return name in WITHOUT_EFFECT or name.startswith("_") or name.endswith("_token_id")


class Keys:
    """The keys of a configuration, and which of them have been read."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.kind = data.get("model_type")
        self._data, self._unread = data, {name for name in data if not without_effect(name)}

    def get(self, name: str, default: Any, kinds: Any = int, null: Any = NEEDED) -> Any:
        """A value of this type; ``default`` where there is none, and ``null``, if given, where there is null."""
        self._unread.discard(name)
        value = self._data.get(name)
        if value is None:
            value = null if name in self._data and null is not NEEDED else default
            if value is NEEDED:
                raise ConfigError(f"expected {name} in a {self.kind} config, got none")
            return value
        return self.checked(name, value, kinds)

    def checked(self, name: str, value: Any, kinds: Any) -> Any:
        """A value of this type; a number as a float, a whole one as a size."""
        if kinds is AUTO:
            if value == "auto":
                return None
            kinds = int
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            wanted = getattr(kinds, "__name__", "number")
            raise ConfigError(f"expected {name} of a {self.kind} config to be of type {wanted}, got {value!r:.80}")
        if kinds is NUMBER:
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(f"expected {name} of a {self.kind} config to be a number, got a huge one") from None
        most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= most:
            raise ConfigError(f"expected {name} of a {self.kind} config from 1 to {most}, got {value!r:.80}")
        return value

    def expect(self, name: str, default: Any, *allowed: Any) -> Any:
        """A value that is one of those that are known here."""
        self._unread.discard(name)
        value = default if self._data.get(name) is None else self._data[name]
        if value not in allowed or isinstance(value, bool) is not isinstance(allowed[0], bool):
            raise ConfigError(f"expected {name} of a {self.kind} config to be {listed(allowed)}, got {value!r:.80}")
        return value

    def check_read(self) -> None:
        """Raise unless all keys that have a value are known here."""
        for name in sorted(self._unread):
            if self._data[name] is not None:
                known = f"expected keys of a {self.kind} config that are known here"
                raise ConfigError(f"{known}, got {name}: take it out if it changes no result")


def listed(values: Any) -> str:
    return " or ".join(map(str, values))
