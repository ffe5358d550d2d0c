"""Configurations are checked once, each bad value by name, and JSON gives them back; what an older file lacks has its
default."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig

TINY = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)


@settings(max_examples=50, deadline=None)
@given(
    width=st.sampled_from([8, 24, 64]),
    heads=st.sampled_from([(1, None), (4, 2), (8, 1)]),
    pairs=st.integers(0, 5),
    window=st.none() | st.integers(1, 50),
    vocab=st.integers(2, 10_000),
    tied=st.booleans(),
)
def test_json_round_trip(
    width: int, heads: tuple[int, int | None], pairs: int, window: int | None, vocab: int, tied: bool
) -> None:
    backbone = MambaFormerConfig(
        d_model=width, n_heads=heads[0], n_kv_heads=heads[1], n_pairs=pairs, head_dim=4, attention_window=window
    )
    config = LanguageModelConfig(backbone=backbone, vocab_size=vocab, tie_embeddings=tied)
    assert LanguageModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert backbone.n_blocks == 1 + 2 * pairs
    assert backbone.kv_heads == (heads[1] or heads[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 0),
        ("d_model", 32.0),
        ("d_model", True),
        ("d_model", "32"),
        ("n_pairs", -1),
        ("n_heads", 3),  # does not divide 32
        ("n_kv_heads", 3),
        ("n_kv_heads", 0),
        ("d_state", -1),
        ("d_conv", 1),
        ("expand", None),
        ("head_dim", 48),
        ("mixer", "mamba3"),
        ("mixer", ["mamba2"]),
        ("chunk_size", 0),
        ("attention_window", 0),
        ("blocks", "attention"),
        ("n_groups", 3),
        ("dt_rank", 0),
        ("d_ff", 0),
        ("positions", "learned"),
        ("attention_head_dim", 0),
        ("attention_multiplier", float("inf")),
        ("attention_multiplier", 0.0),  # softmax would be of no order, and attention that is not causal would be NaN
        ("attention_multiplier", -0.5),
        ("embedding_multiplier", "12"),
        ("residual_multiplier", None),
        ("norm_eps", -1e-5),
        ("norm_groups", 3),
        ("rotary_base", 0),
        ("dt_limit", 0.1),
        ("biased", "attention"),
    ],
)
def test_a_bad_size_is_named(field: str, value: Any) -> None:
    data = TINY.to_json()
    data["backbone"][field] = value
    with pytest.raises(ConfigError, match=field) as error:
        LanguageModelConfig.from_json(data)
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("field", "value"), [("vocab_size", 1), ("vocab_size", 2.5), ("tie_embeddings", "no")])
def test_a_bad_head_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        LanguageModelConfig.from_json(TINY.to_json() | {field: value})


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "text",
        {},
        TINY.to_json() | {"extra": 1},
        {"backbone": TINY.to_json()["backbone"]},
        TINY.to_json() | {"backbone": None},
        TINY.to_json() | {"backbone": {"d_model": 32, "width": 3}},
    ],
)
def test_other_names_are_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="expected the names"):
        LanguageModelConfig.from_json(data)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("field", "value", "got"),
    [
        ("dt_limit", [0.1], r"\(0.1,\)"),
        ("dt_limit", [-0.5, 1], "-0.5"),
        ("dt_limit", [1, 0.5], "0.5"),
        ("biased", ["attention", "conv"], "'conv'"),
    ],
)
def test_a_bad_part_is_named(field: str, value: list[Any], got: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} .* got {got}$"):
        MambaFormerConfig.from_json({field: value})


@pytest.mark.parametrize("width", [3, 10])
def test_numbers_of_a_head_that_are_turned(width: int) -> None:
    with pytest.raises(ConfigError, match=f"rotary_width to be even and at most 8, got {width}"):
        MambaFormerConfig(d_model=32, n_heads=4, positions="rotary", rotary_width=width)


def test_settings_are_written_where_they_are_not_their_defaults() -> None:
    """So that files of models without them stay what they were."""
    backbone = replace(MambaFormerConfig.tiny(), dt_limit=(0.1, None), biased=("mamba2",), norm_eps=1e-6)
    config = LanguageModelConfig(backbone=backbone, vocab_size=258, logits_scaling=3.0, longest=64)
    data = json.loads(json.dumps(config.to_json()))
    assert LanguageModelConfig.from_json(data) == config
    assert data.keys() - TINY.to_json().keys() == {"logits_scaling", "longest"}
    assert data["backbone"].keys() - TINY.to_json()["backbone"].keys() == {"dt_limit", "biased", "norm_eps"}


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_numbers() -> None:
    """And kept as those that JSON can hold."""
    one, half = np.int64(1), np.float32(0.5)
    backbone = replace(
        TINY.backbone, d_model=32 * one, d_ff=9 * one, residual_multiplier=half, dt_limit=(half, 2 * half)
    )
    config = LanguageModelConfig(backbone=backbone, vocab_size=258 * one, logits_scaling=half, tie_embeddings=np.True_)
    assert LanguageModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    plain = replace(TINY.backbone, d_ff=9, residual_multiplier=0.5, dt_limit=(0.5, 1.0))
    assert config == LanguageModelConfig(backbone=plain, vocab_size=258, logits_scaling=0.5)


def test_names_that_an_older_file_lacks_have_their_defaults() -> None:
    older = {name: value for name, value in TINY.to_json()["backbone"].items() if name not in ("blocks", "positions")}
    assert LanguageModelConfig.from_json({"backbone": older, "vocab_size": 258}) == TINY


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("blocks", "text"), [([], "at least one kind, got ()"), (["mamba3"], "got 'mamba3'")])
def test_bad_blocks_are_named(blocks: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match="blocks") as error:
        MambaFormerConfig.from_json({"blocks": blocks})
    assert text in str(error.value)


def test_block_kinds() -> None:
    mamba1 = MambaFormerConfig(mixer="mamba1", n_pairs=2)
    assert mamba1.block_kinds == ("mamba1", "attention", "mamba1", "attention", "mamba1")
    transformer = MambaFormerConfig(blocks=("attention", "feed_forward"), positions="rotary")
    assert transformer.n_blocks == 2
    config = LanguageModelConfig(backbone=transformer, vocab_size=3)
    assert LanguageModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
