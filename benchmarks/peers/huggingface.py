"""transformers' models as contestants: Bamba, Jamba, Mamba and Mamba-2, by their PyTorch paths.

Their fused kernels need a GPU. Attention runs through ``scaled_dot_product_attention`` as ours does, and the cache is
transformers' own ``DynamicCache``, which holds the states of all kinds of layers.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["HuggingFace", "bamba", "jamba", "mamba", "mamba2"]

transformers.logging.set_verbosity_error()  # it warns of every kernel that is not installed


@dataclass
class HuggingFace:
    """A model of transformers.

    Attributes:
        cache_argument: by which name its ``forward`` takes a cache.
        positions: whether ``forward`` must be told them. Bamba's counts from 0 in each call if it is not, so that its
            rotary attention is wrong after the first call; its ``generate`` tells it.
    """

    module: nn.Module
    cache_argument: str
    positions: bool = False

    def logits(self, ids: Tensor) -> Tensor:
        return self.module(ids, use_cache=False).logits

    def prefill(self, ids: Tensor) -> object:
        return self.extend(ids, self.start(ids.shape[1]))

    def start(self, room: int) -> dict[str, Any]:
        return {"cache": transformers.DynamicCache(config=self.module.config), "length": 0}

    def extend(self, ids: Tensor, state: dict[str, Any]) -> Tensor:
        end = state["length"] + ids.shape[1]
        more = {"position_ids": torch.arange(state["length"], end)[None]} if self.positions else {}
        state["length"] = end
        return self.module(ids, use_cache=True, **{self.cache_argument: state["cache"]}, **more).logits

    def clone(self, state: dict[str, Any]) -> dict[str, Any]:
        return copy.deepcopy(state)


def bamba(
    *, d_model: int, n_layers: int, d_ff: int, n_heads: int, d_state: int, head_dim: int, vocab_size: int, chunk: int
) -> HuggingFace:
    """Bamba: Mamba-2 and rotary attention by turns, a feed-forward network in each layer."""
    config = transformers.BambaConfig(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        attn_layer_indices=list(range(1, n_layers, 2)),
        mamba_n_heads=2 * d_model // head_dim,
        mamba_d_head=head_dim,
        mamba_d_state=d_state,
        mamba_chunk_size=chunk,
        attn_implementation="sdpa",
    )
    return HuggingFace(transformers.BambaForCausalLM(config), "past_key_values", positions=True)


def jamba(
    *, d_model: int, n_layers: int, d_ff: int, n_heads: int, d_state: int, vocab_size: int, mambapy: bool
) -> HuggingFace:
    """Jamba without experts: Mamba and attention by turns, a feed-forward network in each layer."""
    config = transformers.JambaConfig(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=d_state,
        use_mambapy=mambapy,
        attn_implementation="sdpa",
    )
    return HuggingFace(transformers.JambaForCausalLM(config), "past_key_values")


def mamba(*, d_model: int, n_layers: int, d_state: int, vocab_size: int, mambapy: bool) -> HuggingFace:
    """Mamba, nothing else."""
    config = transformers.MambaConfig(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        state_size=d_state,
        use_mambapy=mambapy,
    )
    return HuggingFace(transformers.MambaForCausalLM(config), "cache_params")


def mamba2(*, d_model: int, n_layers: int, d_state: int, head_dim: int, vocab_size: int, chunk: int) -> HuggingFace:
    """Mamba-2, nothing else."""
    config = transformers.Mamba2Config(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        state_size=d_state,
        num_heads=2 * d_model // head_dim,
        head_dim=head_dim,
        n_groups=1,
        chunk_size=chunk,
    )
    return HuggingFace(transformers.Mamba2ForCausalLM(config), "cache_params")
