"""MiniMamba (package ``minimamba``) as a contestant."""

import copy
from dataclasses import dataclass

from minimamba import InferenceParams, MambaForCausalLM, MambaLMConfig
from torch import Tensor

__all__ = ["MiniMamba", "mamba"]


@dataclass
class MiniMamba:
    """A model of MiniMamba, which pads its vocabulary to a multiple of eight.

    Version 1.0.1 fails in the first cached step (``Tensor`` has no ``roll_``), and reading a prompt leaves the cached
    scan state at zero. It is asked for its cache all the same, so that a version that has one counts.
    """

    module: MambaForCausalLM

    def logits(self, ids: Tensor) -> Tensor:
        return self.module(ids)

    def prefill(self, ids: Tensor) -> object:
        return self.extend(ids, self.start(ids.shape[1]))

    def start(self, room: int) -> InferenceParams:
        return InferenceParams(max_sequence_len=room)

    def extend(self, ids: Tensor, state: InferenceParams) -> Tensor:
        logits = self.module(ids, state)
        state.seqlen_offset += ids.shape[1]
        return logits

    def clone(self, state: InferenceParams) -> InferenceParams:
        return copy.deepcopy(state)


def mamba(*, d_model: int, n_layers: int, d_state: int, vocab_size: int) -> MiniMamba:
    """Mamba, nothing else."""
    config = MambaLMConfig(d_model=d_model, n_layer=n_layers, d_state=d_state, vocab_size=vocab_size)
    return MiniMamba(MambaForCausalLM(config))
