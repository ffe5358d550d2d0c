"""Our models as contestants."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

__all__ = ["Ours", "language_model"]


@dataclass
class Ours:
    """A ``MambaFormerForCausalLM``."""

    module: MambaFormerForCausalLM

    def logits(self, ids: Tensor) -> Tensor:
        return self.module(ids).logits

    def prefill(self, ids: Tensor) -> object:
        return self.extend(ids, self.start(ids.shape[1]))

    def start(self, room: int) -> Cache:
        return self.module.init_cache(1, room)

    def extend(self, ids: Tensor, state: Cache) -> Tensor:
        return self.module(ids, cache=state).logits

    def clone(self, state: Cache) -> Cache:
        return state.clone()

    def matrices(self) -> list[Tensor]:
        """All weight matrices that the model multiplies by, the head's last."""
        model = self.module
        linear = [m for m in model.modules() if isinstance(m, SVDLinear | nn.Linear) and m is not model.head]
        return [m.weight for m in linear] + [model.embedding.weight if model.head is None else model.head.weight]


def language_model(backbone: MambaFormerConfig, vocab_size: int) -> Ours:
    """Our model over ``vocab_size`` tokens, with tied embeddings and random weights."""
    model = MambaFormerForCausalLM(LanguageModelConfig(backbone=backbone, vocab_size=vocab_size))
    model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=2)  # compiles its loops, where that was not done
    return Ours(model)
