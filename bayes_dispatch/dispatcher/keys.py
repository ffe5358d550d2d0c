"""Keys of the prompts' random generators, from seeds as users give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from bayes_dispatch.dispatcher.guide.importance_kernels import mix_bits
from bayes_dispatch.errors import ConfigError

__all__ = ["prompt_keys", "scramble"]


def prompt_keys(seed: int | Sequence[int], count: int) -> Shaped[np.ndarray, " prompt"]:
    """``(N,)`` keys of 32 bits, from one seed and the prompts' rows, or from one seed for each prompt.

    Raises:
        ConfigError: a negative seed, or another number of seeds than prompts.
    """
    given: Any = seed  # NumPy's integers and arrays serve too
    several = np.ndim(given) > 0
    seeds = [int(each) for each in given] if several else [int(given)]
    if several and len(seeds) != count:
        raise ConfigError(f"expected one seed, or one for each of {count} prompts, got {len(seeds)}")
    if seeds and min(seeds) < 0:
        raise ConfigError(f"expected seeds ≥ 0, got {min(seeds)}")
    words = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)  # a list would become floats beyond 2^63
    rows = np.zeros(count, np.uint64) if several else np.arange(1, count + 1, dtype=np.uint64)
    return scramble(scramble(words) + (rows << np.uint64(32)))


def scramble(keys: Shaped[np.ndarray, " prompt"]) -> Shaped[np.ndarray, " prompt"]:
    """32 well-mixed bits of 64-bit keys."""
    mixed = np.empty(len(keys), np.uint64)
    mix_bits(keys.astype(np.uint64), mixed)
    return mixed
