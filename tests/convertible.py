"""Random models of transformers that convert, and its float32 as float64, for tests of conversion."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

EPS = 2.0**-17  # which float32 holds: ours rounds it, and in float64 that would tell
SIZES: dict[str, Any] = {"vocab_size": 270, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
STATE_SPACE: dict[str, Any] = {**SIZES, "layer_norm_epsilon": EPS}
ATTENTION: dict[str, Any] = {
    "rms_norm_eps": EPS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
HYBRID: dict[str, Any] = {
    **SIZES,
    **ATTENTION,
    **MAMBA,
    "layer_types": ["mamba", "attention", "mamba"],
    "num_local_experts": 0,
    "shared_intermediate_size": 40,
}
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 3,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.5,
}
BAMBA: dict[str, Any] = {**SIZES, **ATTENTION, **MAMBA, "attn_layer_indices": [1]}
MAMBA2: dict[str, Any] = {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}
LIMIT = (0.02, 0.5)
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, **ATTENTION, tie_word_embeddings=True),
    "llama-wide-biased": lambda: LlamaConfig(
        **SIZES, **ATTENTION | {"rms_norm_eps": 2**-10}, head_dim=12, attention_bias=True, mlp_bias=True
    ),
    "granite": lambda: GraniteConfig(**SIZES, **ATTENTION, **MULTIPLIERS, rope_parameters=theta(500.0)),
    "bamba": lambda: BambaConfig(**BAMBA, tie_word_embeddings=True),
    "bamba-groups-biased": lambda: BambaConfig(
        **BAMBA, mamba_n_groups=4, mamba_proj_bias=True, attention_bias=True, mlp_bias=True
    ),
    "bamba-quarter": lambda: BambaConfig(
        **BAMBA, rope_parameters={**theta(100.0), "partial_rotary_factor": 0.25}, mamba_conv_bias=False, mamba_d_conv=3
    ),
    "granite-hybrid": lambda: GraniteMoeHybridConfig(**HYBRID, **MULTIPLIERS, tie_word_embeddings=True),
    "granite-hybrid-rope-groups": lambda: GraniteMoeHybridConfig(
        **HYBRID, **MULTIPLIERS, position_embedding_type="rope", mamba_n_groups=2, attention_bias=True
    ),
    "granite-hybrid-limits": lambda: GraniteMoeHybridConfig(**HYBRID, time_step_limit=LIMIT, mamba_conv_bias=False),
    "granite-hybrid-mamba-alone": lambda: GraniteMoeHybridConfig(
        **HYBRID | {"layer_types": ["mamba"] * 3}, mamba_proj_bias=True
    ),
    "mamba": lambda: MambaConfig(**STATE_SPACE, state_size=4),
    "mamba-biased-untied": lambda: MambaConfig(
        **STATE_SPACE, state_size=3, use_bias=True, tie_word_embeddings=False, time_step_rank=5, conv_kernel=3
    ),
    "mamba-no-conv-bias": lambda: MambaConfig(**SIZES, use_conv_bias=False, expand=3, layer_norm_epsilon=2**-10),
    "mamba2": lambda: Mamba2Config(**MAMBA2, tie_word_embeddings=True),
    "mamba2-groups-biased": lambda: Mamba2Config(**MAMBA2 | {"n_groups": 4}, use_bias=True, use_conv_bias=False),
}
CLASSES: dict[str, Any] = {
    "llama": LlamaForCausalLM,
    "granite": GraniteForCausalLM,
    "bamba": BambaForCausalLM,
    "granitemoehybrid": GraniteMoeHybridForCausalLM,
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
}
WIDTH = 40
every_config = pytest.mark.parametrize("kind", CONFIGS)


def theta(base: float) -> dict[str, Any]:
    return {"rope_theta": base, "rope_type": "default"}


class _Wide:
    """``torch`` whose float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64() -> Iterator[None]:
    """That library's own float32 is float64: without this its float64 models are as exact as float32 is."""
    modules = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            if "torch" in vars(module) and ".modeling_" in module.__name__:
                patch.setattr(module, "torch", _Wide())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def make(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model, no vector of which is at its first value."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = CONFIGS[kind]()
        model = CLASSES[config.model_type](config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif parameter.ndim == 2:
                    parameter.copy_(torch.randn_like(parameter) * 0.5 * parameter.shape[1] ** -0.5)
    return model  # type: ignore[no-any-return]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(seed))


def close(one: Tensor, other: Tensor) -> None:
    assert one.abs().max() > 0.5
    bound = 1e-9 if one.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(one, other, rtol=0, atol=bound)
