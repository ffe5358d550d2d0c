"""Configurations of transformers as they are published, and as they should not be: each key in their own words."""

import re
from dataclasses import fields
from typing import Any

import pytest

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.conversion.configs import KINDS, meaning, read_config, write_config
from bayes_dispatch.model.mambaformer.conversion.keys import without_effect
from tests.convertible import CONFIGS, every_config

INFINITY = float("inf")
# huggingface.co/state-spaces/mamba-130m-hf, whose keys are those of two libraries
MAMBA_130M: dict[str, Any] = {
    **{"architectures": ["MambaForCausalLM"], "model_type": "mamba", "torch_dtype": "float32", "use_cache": True},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "transformers_version": "4.39.0.dev0"},
    **{"conv_kernel": 4, "d_inner": 1536, "d_model": 768, "expand": 2, "fused_add_norm": True, "hidden_act": "silu"},
    **{"hidden_size": 768, "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05},
    **{"n_layer": 24, "num_hidden_layers": 24, "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False},
    **{"residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001},
    **{"time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 48},
    **{"time_step_scale": 1.0, "use_bias": False, "use_conv_bias": True, "vocab_size": 50_280},
}
# huggingface.co/mistralai/Mamba-Codestral-7B-v0.1, as transformers 4.44 wrote it
CODESTRAL: dict[str, Any] = {
    **{"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "torch_dtype": "bfloat16", "use_cache": True},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "transformers_version": "4.44.0.dev0"},
    **{"chunk_size": 256, "conv_kernel": 4, "expand": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096},
    **{"initializer_range": 0.1, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "n_groups": 8},
    **{"norm_before_gate": True, "num_heads": 128, "num_hidden_layers": 64, "rescale_prenorm_residual": False},
    **{"residual_in_fp32": True, "rms_norm": True, "state_size": 128, "tie_word_embeddings": False},
    **{"time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_limit": [0.0, INFINITY]},
    **{"time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "time_step_scale": 1.0},
    **{"use_bias": False, "use_conv_bias": True, "vocab_size": 32_768},
}
# huggingface.co/ibm-fms/Bamba-9B, which tells neither biases, nor rotary positions but for their width
BAMBA_9B: dict[str, Any] = {
    **{"architectures": ["BambaForCausalLM"], "model_type": "bamba", "use_cache": True, "use_mamba_kernels": True},
    **{"bos_token_id": 128_000, "eos_token_id": 128_001, "pad_token_id": 0, "transformers_version": "4.47.0.dev0"},
    **{"attention_dropout": 0.0, "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64},
    **{"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14_336},
    **{"mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128},
    **{"mamba_dt_rank": 256, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": False},
    **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_logits_to_keep": 1},
    **{"rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": 128_256},
}
# huggingface.co/yujiepan/bamba-tiny-random: the same keys as transformers 4.48 wrote them, with its own beside
BAMBA_TINY: dict[str, Any] = BAMBA_9B | {
    **{"_name_or_path": "ibm-fms/Bamba-9B", "torch_dtype": "bfloat16", "transformers_version": "4.48.0"},
    **{"attention_bias": False, "attn_layer_indices": [1], "attn_rotary_emb": 4, "hidden_size": 16},
    **{"intermediate_size": 32, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 4, "mamba_n_heads": 8},
    **{"max_position_embeddings": 262_144, "mlp_bias": False, "num_attention_heads": 2, "num_hidden_layers": 2},
    **{"num_key_value_heads": 1, "partial_rotary_factor": 0.5, "rope_scaling": None, "rope_theta": 10_000.0},
}
# huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
SMOLLM2: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "use_cache": True},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "transformers_version": "4.48.3"},
    **{"attention_bias": False, "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu", "hidden_size": 576},
    **{"initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True},
    **{"max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30},
    **{"num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False},
    **{"rope_scaling": None, "rope_theta": 100_000, "tie_word_embeddings": True, "vocab_size": 49_152},
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
}
# huggingface.co/ibm-granite/granite-4.0-h-350m and granite-4.0-h-1b: whole numbers as multipliers, keys of experts
GRANITE: dict[str, Any] = {
    **{"architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "torch_dtype": "bfloat16"},
    **{"bos_token_id": 100_257, "eos_token_id": 100_257, "pad_token_id": 100_256, "transformers_version": "4.56.0"},
    **{"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "init_method": "mup"},
    **{"initializer_range": 0.1, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4},
    **{"mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 48, "mamba_proj_bias": False},
    **{"max_position_embeddings": 32_768, "normalization_function": "rmsnorm", "num_attention_heads": 12},
    **{"num_experts_per_tok": 0, "num_key_value_heads": 4, "num_local_experts": 0, "output_router_logits": False},
    **{"position_embedding_type": "nope", "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10_000},
    **{"router_aux_loss_coef": 0.01, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 100_352},
    **{"shared_intermediate_size": 2048, "intermediate_size": 2048, "embedding_multiplier": 12},
}
GRANITE_350M = GRANITE | {
    **{"hidden_size": 768, "num_hidden_layers": 8, "mamba_d_head": 32, "attention_multiplier": 0.015625},
    **{"layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 2, "residual_multiplier": 0.246},
    **{"logits_scaling": 3},
}
GRANITE_1B = GRANITE | {
    **{"hidden_size": 1536, "num_hidden_layers": 40, "mamba_d_head": 64, "attention_multiplier": 0.0078125},
    **{"layer_types": ["attention" if n in (5, 15, 25, 35) else "mamba" for n in range(40)]},
    **{"residual_multiplier": 0.22, "logits_scaling": 6, "max_position_embeddings": 131_072},
}
# huggingface.co/unsloth/granite-4.0-micro: attention alone, as a hybrid
GRANITE_MICRO = GRANITE | {
    **{"hidden_size": 2560, "num_hidden_layers": 40, "mamba_d_head": 40, "attention_multiplier": 0.015625},
    **{"layer_types": ["attention"] * 40, "mamba_d_state": 256, "mamba_n_heads": 128, "num_attention_heads": 40},
    **{"num_key_value_heads": 8, "position_embedding_type": "rope", "residual_multiplier": 0.22, "logits_scaling": 10},
    **{"shared_intermediate_size": 8192, "intermediate_size": 8192, "max_position_embeddings": 131_072},
    **{"model_name": "unsloth/granite-4.0-micro", "unsloth_fixed": True, "mlp_bias": False, "dtype": "bfloat16"},
}
PUBLISHED = {
    "mamba-130m": MAMBA_130M,
    "codestral": CODESTRAL,
    "bamba-9b": BAMBA_9B,
    "bamba-tiny": BAMBA_TINY,
    "smollm2": SMOLLM2,
    "granite-350m": GRANITE_350M,
    "granite-1b": GRANITE_1B,
    "granite-micro": GRANITE_MICRO,
}


def test_published_ones_say_what_they_mean() -> None:
    configs = {name: read_config(data).config for name, data in PUBLISHED.items()}
    backbones = {name: config.backbone for name, config in configs.items()}
    assert backbones["mamba-130m"].block_kinds == ("mamba1",) * 24
    assert (backbones["mamba-130m"].step_rank, configs["mamba-130m"].tie_embeddings) == (48, True)
    assert (backbones["codestral"].n_groups, backbones["codestral"].dt_bounds) == (8, (0.0, INFINITY))
    assert [n for n, kind in enumerate(backbones["bamba-9b"].block_kinds) if kind == "attention"] == [18, 36, 54]
    assert (backbones["bamba-9b"].turned, backbones["bamba-tiny"].turned) == (64, 4)
    assert configs["bamba-tiny"].longest == 262_144
    granite = backbones["granite-350m"]
    assert granite.block_kinds == (
        *("mamba2", "feed_forward") * 5,
        "attention",
        *("feed_forward", "mamba2") * 2,
        "feed_forward",
    )
    assert (granite.positions, granite.attention_scale, configs["granite-350m"].logits_scaling) == ("none", 1 / 64, 3.0)
    assert len(backbones["granite-1b"].block_kinds) == 80
    assert backbones["granite-micro"].block_kinds == ("attention", "feed_forward") * 40
    assert backbones["smollm2"].rotary_base == 100_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ones_are_written_as_they_were(name: str) -> None:
    """But for what changes no result, and what is said twice."""
    read = read_config(PUBLISHED[name])
    _, keys = write_config(read.config, True, read.kind)
    told = {key: value for key, value in PUBLISHED[name].items() if key in keys}
    assert {key: value for key, value in keys.items() if key in told} == told
    twice = {"d_model", "d_inner", "n_layer", "rms_norm", "ssm_cfg", "intermediate_size", "attn_rotary_emb"}
    older = {"mlp_bias", "rope_scaling", "rope_theta", "partial_rotary_factor", "time_step_limit", "time_step_rank"}
    left = {key for key in PUBLISHED[name].keys() - keys.keys() if not without_effect(key)}
    assert left <= twice | older


SAID_OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "d_inner of a mamba config to be 1536, got 1024": ("mamba-130m", {"d_inner": 1024}),
    "d_model of a mamba config to be 768, got 512": ("mamba-130m", {"d_model": 512}),
    "n_layer of a mamba config to be 24, got 12": ("mamba-130m", {"n_layer": 12}),
    "rms_norm of a mamba config to be True, got False": ("mamba-130m", {"rms_norm": False}),
    "ssm_cfg of a mamba config to be {}, got {'layer': 'Mamba2'}": ("mamba-130m", {"ssm_cfg": {"layer": "Mamba2"}}),
    "rms_norm of a mamba2 config to be True, got False": ("codestral", {"rms_norm": False}),
    "intermediate_size of a mamba2 config to be 8192, got 1": ("codestral", {"intermediate_size": 1}),
    "attn_rotary_emb of a bamba config to be 64, got 128": ("bamba-9b", {"attn_rotary_emb": 128}),
}


@pytest.mark.parametrize("message", SAID_OTHERWISE)
def test_an_older_key_that_says_otherwise_is_refused(message: str) -> None:
    name, keys = SAID_OTHERWISE[message]
    with pytest.raises(ConfigError, match=f"^expected {re.escape(message)}$"):
        read_config(PUBLISHED[name] | keys)


@every_config
def test_a_key_that_is_not_told_means_what_it_means_to_transformers(kind: str) -> None:
    """Where it is not needed here."""
    made, seen = CONFIGS[kind](), 0
    keys = made.to_dict()
    for name in sorted(key for key in keys if not without_effect(key)):
        untold = {key: value for key, value in keys.items() if key != name}
        try:
            ours = read_config(untold)
        except ConfigError:
            continue
        theirs = read_config(type(made).from_dict(untold).to_dict())
        assert meaning(ours.config) == meaning(theirs.config), name
        assert ours.conv_bias == theirs.conv_bias
        seen += 1
    assert seen > 5


def test_of_heads_that_are_not_told_there_are_theirs() -> None:
    """Bamba has eight of keys and values where a configuration tells of none, and as many as of queries for null."""
    data = {name: value for name, value in BAMBA_9B.items() if name != "num_key_value_heads"}
    assert read_config(data).config.backbone.kv_heads == 8
    assert read_config(data | {"num_key_value_heads": None}).config.backbone.kv_heads == 32


VALUES = (
    0,
    1,
    -1,
    3,
    7,
    10**9,
    0.5,
    -1.0,
    float("nan"),
    INFINITY,
    10**400,
    "x",
    True,
    [],
    [0.5, 0.1],
    [-1, 2],
    {},
    [["x"]],
)
OURS = {field.name for config in (MambaFormerConfig, LanguageModelConfig) for field in fields(config)}


@every_config
def test_errors_are_in_their_words(kind: str) -> None:
    """Whatever is wrong with whichever key: a key of theirs is named, and no setting of ours."""
    read = read_config(CONFIGS[kind]().to_dict())
    _, keys = write_config(read.config, read.conv_bias, read.kind)
    keys |= {"time_step_limit": [0.0, 1.0]} if "mamba_expand" in keys or read.kind == "mamba2" else {}
    wrong = [(name, value) for name in keys.keys() - {"model_type"} for value in VALUES]
    wrong += [
        ("rope_parameters", {"rope_theta": v, "partial_rotary_factor": v}) for v in VALUES if "rope_parameters" in keys
    ]
    known = {*keys, "rope_theta", "partial_rotary_factor", "rope_scaling"}
    refused = set()
    for name, value in wrong:
        try:
            read_config(keys | {name: value})
        except ConfigError as error:
            message = str(error)
            words = set(re.findall(r"\w+", message.partition(", got ")[0]))
            assert message.startswith("expected ")
            assert "\n" not in message
            assert len(message) < 300
            assert words & known, message
            assert not words & OURS - known, message
            refused.add(name)
    assert refused >= keys.keys() - {"model_type", "rope_parameters" if read.kind == "granitemoehybrid" else ""}


def test_errors_of_our_own_checks_are_translated() -> None:
    """Settings of which each is well alone, and not with the others."""
    wrong: dict[str, tuple[str, dict[str, Any]]] = {
        "num_key_value_heads to divide num_attention_heads 12, got 5": ("granite-350m", {"num_key_value_heads": 5}),
        "num_attention_heads to divide hidden_size 768, got": ("granite-350m", {"num_attention_heads": 7}),
        "mamba_n_groups to divide the 48 Mamba-2 heads, got 5": ("granite-350m", {"mamba_n_groups": 5}),
        "mamba_d_conv to be a whole number from 2 to 2147483648, got 1": ("granite-350m", {"mamba_d_conv": 1}),
        "the upper bound of time_step_limit to be": ("granite-350m", {"time_step_limit": [0.5, 0.1]}),
        "rope_theta to be a finite number > 0": ("bamba-9b", {"rope_theta": 0}),
        "layer_norm_epsilon to be a finite number": ("codestral", {"layer_norm_epsilon": float("nan")}),
        "partial_rotary_factor of a bamba config to turn an even number of each head's 128, got 0.305 of": (
            "bamba-9b",
            {"rope_parameters": {"partial_rotary_factor": 0.305}, "rope_theta": None},
        ),
    }
    for message, (name, keys) in wrong.items():
        with pytest.raises(ConfigError, match=f"^expected {re.escape(message)}"):
            read_config(PUBLISHED[name] | keys)


def test_all_kinds_are_covered() -> None:
    assert {make().model_type for make in CONFIGS.values()} == KINDS.keys()
