"""Token mixers of a block.

All take right-padded rows and a ``Span`` that tells how many tokens of each row are real and how many came before; all
fill their cached state in place. Matrices that can be adapted are ``SVDLinear``.
"""

from bayes_dispatch.model.mixers.attention import SelfAttention
from bayes_dispatch.model.mixers.mamba2 import Mamba2Mixer
from bayes_dispatch.model.mixers.span import Span

__all__ = ["Mamba2Mixer", "SelfAttention", "Span"]
