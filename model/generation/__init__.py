"""Generation: greedy, sampled and beam search over any model that continues sequences."""

from bayes_dispatch.model.generation.continuation import (
    Beginning,
    CachedContinuation,
    Continuation,
    UncachedContinuation,
)
from bayes_dispatch.model.generation.decoding import Generated, Step
from bayes_dispatch.model.generation.mixin import GenerationMixin

__all__ = [
    "CachedContinuation",
    "Continuation",
    "Generated",
    "GenerationMixin",
    "Beginning",
    "Step",
    "UncachedContinuation",
]
