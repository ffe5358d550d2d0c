"""The states that let a model continue a sequence: preallocated, explicit, and tied to what made them."""

from bayes_dispatch.model.mambaformer.cache.cache import Cache, CacheInfo, LayerInfo
from bayes_dispatch.model.mambaformer.cache.states import AttentionState, CrossAttentionState, MambaState, State

__all__ = ["AttentionState", "Cache", "CacheInfo", "CrossAttentionState", "LayerInfo", "MambaState", "State"]
