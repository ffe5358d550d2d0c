"""mamba.py (package ``mambapy``) as a contestant: Mamba with a parallel scan, and its Jamba.

It reads a prompt either in parallel, which leaves no cache, or token by token. Prefill is measured by the first, and
caches for decoding are filled by the second, which is not timed. Its own language model around Mamba cannot be imported
without the GPU kernels of Mamba-2, so the same embedding, normalisation and head stand here.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mambapy.jamba import JambaLM, JambaLMConfig
from mambapy.mamba import Mamba, MambaConfig, RMSNorm
from torch import Tensor, nn

__all__ = ["MambaPy", "jamba", "mamba"]


class _LanguageModel(nn.Module):
    def __init__(self, config: MambaConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.base_std)
        self.mamba = Mamba(config)
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.norm(self.mamba(self.embedding(ids))), self.embedding.weight)

    def step(self, ids: Tensor, caches: list[Any]) -> tuple[Tensor, list[Any]]:
        x, caches = self.mamba.step(self.embedding(ids[:, 0]), caches)
        return F.linear(self.norm(x), self.embedding.weight)[:, None], caches

    def empty(self) -> list[Any]:
        inputs = torch.zeros(1, self.config.d_inner, self.config.d_conv - 1)
        return [(None, inputs) for _ in range(self.config.n_layers)]


class _Jamba(JambaLM):
    def empty(self) -> list[Any]:
        return [layer.get_empty_cache(1, torch.device("cpu")) for layer in self.jamba.layers]


@dataclass
class MambaPy:
    """A model of mamba.py; a state is the list of its layers' caches."""

    module: _LanguageModel | _Jamba

    def logits(self, ids: Tensor) -> Tensor:
        return self.module(ids)

    def prefill(self, ids: Tensor) -> object:
        return self.module(ids)

    def start(self, room: int) -> list[Any]:
        return self.module.empty()

    def extend(self, ids: Tensor, state: list[Any]) -> Tensor:
        outputs = []
        for token in ids.split(1, dim=1):
            logits, state[:] = self.module.step(token, state)
            outputs.append(logits)
        return torch.cat(outputs, dim=1)

    def clone(self, state: list[Any]) -> list[Any]:
        return copy.deepcopy(state)


def mamba(*, d_model: int, n_layers: int, d_state: int, vocab_size: int) -> MambaPy:
    """Mamba, nothing else."""
    return MambaPy(_LanguageModel(MambaConfig(d_model=d_model, n_layers=n_layers, d_state=d_state), vocab_size))


def jamba(*, d_model: int, n_layers: int, d_ff: int, n_heads: int, d_state: int, vocab_size: int) -> MambaPy:
    """Jamba without experts: Mamba and attention by turns, a feed-forward network in each layer."""
    config = JambaLMConfig(
        d_model=d_model,
        n_layers=n_layers,
        mlp_size=d_ff,
        d_state=d_state,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_offset=1,
        attn_layer_period=2,
        vocab_size=vocab_size,
    )
    return MambaPy(_Jamba(config))
