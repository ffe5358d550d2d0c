"""Keys of prompts: one for each, by its own seed or by its row, whatever the other seeds are."""

import numpy as np
import pytest

from bayes_dispatch.dispatcher.keys import prompt_keys
from bayes_dispatch.errors import ConfigError


def test_a_key_depends_on_its_own_seed_alone() -> None:
    """Also among seeds that fit into no signed integer, which NumPy would join to floats."""
    seeds = [3, 2**63 + 5, 2**64 - 1, 0, 2**63 + 4]
    keys = prompt_keys(seeds, 5)
    assert len(set(keys.tolist())) == 5
    for seed, key in zip(seeds, keys, strict=True):
        assert prompt_keys([seed], 1)[0] == key
    assert keys.max() < 2**32


def test_one_seed_gives_each_row_its_own() -> None:
    keys = prompt_keys(7, 1_000)
    assert len(set(keys.tolist())) == 1_000
    np.testing.assert_array_equal(prompt_keys(7, 10), keys[:10])
    assert not set(keys.tolist()) & set(prompt_keys(8, 1_000).tolist())
    assert len(prompt_keys(7, 0)) == 0


def test_bad_seeds() -> None:
    for seed, count in ((-1, 3), ([1, -2], 2), ([1], 2)):
        with pytest.raises(ConfigError, match=r"^expected [^\n]*got [^\n]+$"):
            prompt_keys(seed, count)
