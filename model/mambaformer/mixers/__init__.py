"""Token mixers of a block.

All take right-padded rows and a ``Span`` that tells how many tokens of each row are real and how many came before; all
fill their cached state in place. Matrices that can be adapted are ``SVDLinear``.
"""

from bayes_dispatch.model.mambaformer.mixers.attention import BidirectionalAttention, SelfAttention
from bayes_dispatch.model.mambaformer.mixers.cross_attention import CrossAttention, Memory
from bayes_dispatch.model.mambaformer.mixers.feed_forward import FeedForward
from bayes_dispatch.model.mambaformer.mixers.mamba1 import Mamba1Mixer
from bayes_dispatch.model.mambaformer.mixers.mamba2 import Mamba2Mixer
from bayes_dispatch.model.mambaformer.mixers.span import Span

__all__ = [
    "BidirectionalAttention",
    "CrossAttention",
    "FeedForward",
    "Mamba1Mixer",
    "Mamba2Mixer",
    "Memory",
    "SelfAttention",
    "Span",
]
