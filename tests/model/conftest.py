"""Shared by the tests of ``model``: a small sequence-to-sequence model with weights that are not trivial."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from bayes_dispatch.model.seq2seq.model import MambaFormerForSeq2Seq

SMALL: dict[str, Any] = {"d_model": 16, "n_pairs": 1, "n_heads": 2, "d_state": 4, "head_dim": 8, "chunk_size": 4}


@pytest.fixture(scope="session")
def make_seq2seq() -> Callable[..., MambaFormerForSeq2Seq]:
    """A model of 40 tokens, in float64, that starts with token 1: nothing at its initial value, logits of some units.

    Further arguments are sizes of its backbone.
    """
    from bayes_dispatch.model.mambaformer.config import MambaFormerConfig, Seq2SeqConfig
    from bayes_dispatch.model.seq2seq.model import MambaFormerForSeq2Seq

    def make(
        seed: int = 0, *, dtype: torch.dtype = torch.float64, tie_embeddings: bool = True, **sizes: Any
    ) -> MambaFormerForSeq2Seq:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = Seq2SeqConfig.symmetric(
                MambaFormerConfig(**SMALL | sizes), vocab_size=40, start_token_id=1, tie_embeddings=tie_embeddings
            )
            model = MambaFormerForSeq2Seq(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.3 * torch.randn_like(parameter))
                    if name.endswith("out_proj.weight"):
                        parameter.mul_(2)
                model.embedding.weight.mul_(20)
        return model.to(dtype).eval()

    return make
