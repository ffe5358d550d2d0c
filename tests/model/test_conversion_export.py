"""Laws: what ``export_to_transformers`` writes is what ``from_transformers`` reads, and what transformers reads."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.conversion.configs import KINDS, meaning, read_config, write_config
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.subwords import train_subwords
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from tests.convertible import CONFIGS, close, every_config, in_float64, make, tokens
from tests.tiny import tiny_tokenizer

# what a configuration tells of computing, training and tokens, which ours do not keep
ELSE = {
    "chunk_size",
    "mamba_chunk_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "exported_by",
    "architectures",
}
ELSE |= {"_name_or_path", "dtype"}
SAME = {  # said, where it was left out; of experts, which there are not
    "head_dim": (None, 8),
    "max_position_embeddings": (None, 32_768),
    "position_embedding_type": (None, "nope"),
    "normalization_function": (None, "rmsnorm"),
    "intermediate_size": (48, 11_008),
}
SIZES: dict[str, Any] = {"d_model": 32, "n_heads": 2, "d_state": 8, "head_dim": 16}
OWN: dict[str, MambaFormerConfig] = {
    "mamba": MambaFormerConfig(**SIZES, blocks=("mamba1",) * 2, dt_rank=3, biased=("mamba1", "attention")),
    "mamba2": MambaFormerConfig(**SIZES, blocks=("mamba2",) * 2, dt_limit=(0.1, None)),
    "llama": MambaFormerConfig(**SIZES, blocks=("attention", "feed_forward") * 2, positions="rotary", n_kv_heads=1),
    "granite": MambaFormerConfig(
        **SIZES, blocks=("attention", "feed_forward"), positions="rotary", attention_multiplier=0.3
    ),
    "bamba": MambaFormerConfig(
        **SIZES, blocks=("mamba2", "feed_forward", "attention", "feed_forward"), positions="rotary", rotary_width=6
    ),
    "granitemoehybrid": MambaFormerConfig(**SIZES, blocks=("mamba2", "feed_forward", "attention", "feed_forward")),
    "bamba, attention alone": MambaFormerConfig(
        **SIZES, blocks=("attention", "feed_forward") * 2, positions="rotary", rotary_width=8
    ),
    "granitemoehybrid, attention alone": MambaFormerConfig(**SIZES, blocks=("attention", "feed_forward") * 2),
}


def exported(model: MambaFormerForCausalLM, directory: Path, model_type: str | None = None) -> Any:
    """A model of that library that reads it, without a warning."""
    model.export_to_transformers(directory, model_type=model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(told.values())
    return theirs


def check_same(one: MambaFormerForCausalLM, other: MambaFormerForCausalLM) -> None:
    assert meaning(one.config) == meaning(other.config)
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in mine.items()
    )


@every_config
def test_theirs_is_ours_is_theirs(tmp_path: Path, kind: str) -> None:
    """All numbers and settings, bit for bit, in both directions."""
    theirs = make(kind, torch.float32)
    ours = MambaFormerForCausalLM.from_transformers(theirs, tokenizer=ByteTokenizer())
    again = exported(ours, tmp_path / "x", theirs.config.model_type)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    was, now = theirs.config.to_dict(), again.config.to_dict()
    odd = {name: (was.get(name), now.get(name)) for name in was.keys() | now.keys() if was.get(name) != now.get(name)}
    assert {name: pair for name, pair in odd.items() if name not in ELSE and SAME.get(name) != pair} == {}
    read = MambaFormerForCausalLM.from_transformers(tmp_path / "x", tokenizer=ByteTokenizer())
    assert read.config == ours.config
    check_same(read, ours)


@every_config
def test_some_kind_says_each(kind: str) -> None:
    """Without one being named, too: perhaps another that means the same."""
    read = read_config(CONFIGS[kind]().to_dict())
    described, keys = write_config(read.config, read.conv_bias, None)
    assert described.kind == keys["model_type"] == OTHERWISE.get(kind, read.kind)
    assert meaning(described.config) == meaning(read.config)


OTHERWISE = {"granite-hybrid-mamba-alone": "bamba"}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_model_of_ours_is_theirs(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """One that was never theirs: logits are equal, and it is the same when it is read again."""
    torch.manual_seed(0)
    config = LanguageModelConfig(backbone=replace(OWN[kind], norm_eps=2.0**-17), vocab_size=270, tie_embeddings=False)
    ours = MambaFormerForCausalLM(config, train_subwords(["the other", "another"], 262)).to(dtype).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ours.export_to_transformers(tmp_path / "x")
        again = MambaFormerForCausalLM.from_transformers(tmp_path / "x")
        check_same(again, ours)
        assert again.tokenizer.settings == ours.tokenizer.settings
        ids = tokens(2, 20)
        if dtype == torch.float64:
            with in_float64():
                theirs = exported(ours, tmp_path / "x")
                close(ours(ids).logits, theirs(ids, use_cache=False).logits)
        else:
            theirs = exported(ours, tmp_path / "x")
            close(ours(ids).logits, theirs(ids, use_cache=False).logits)
    assert theirs.config.model_type == kind.partition(",")[0]
    assert theirs.dtype == dtype


CONVERSION = "bayes_dispatch.model.mambaformer.conversion.checkpoint"
READERS: dict[str, tuple[Callable[[Path], Backbone], str]] = {
    "ours": (MambaFormerForCausalLM.from_transformers, f"{CONVERSION}.opened"),
    "theirs": (TransformersBackbone.load, "transformers.AutoModelForCausalLM.from_pretrained"),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_exported_anew_while_it_is_read_is_the_new_one(
    tmp_path: Path, meanwhile: Callable[..., None], reader: str
) -> None:
    """Configuration and weights are of one export."""
    read, between = READERS[reader]
    backbones = (OWN["llama"], replace(OWN["llama"], d_model=16))
    configs = [LanguageModelConfig(backbone=each, vocab_size=270) for each in backbones]
    old, new = (MambaFormerForCausalLM(each, train_subwords(["the other"], 258)) for each in configs)
    new.export_to_transformers(tmp_path / "new")
    old.export_to_transformers(tmp_path / "x")
    meanwhile(between, lambda: new.export_to_transformers(tmp_path / "x"))
    assert read(tmp_path / "x").fingerprint() == read(tmp_path / "new").fingerprint()


@pytest.mark.parametrize("trained", [True, False])
def test_its_tokenizer_is_theirs(tmp_path: Path, trained: bool) -> None:
    """Ids, beginning, ends and special tokens; of one that was read, and of one that was trained here."""
    if trained:
        config = LanguageModelConfig(backbone=OWN["mamba"], vocab_size=270)
        model = MambaFormerForCausalLM(config, train_subwords(["the other", "another"], 262))
    else:
        make("mamba", torch.float32).save_pretrained(tmp_path / "theirs")
        tiny_tokenizer().save_pretrained(tmp_path / "theirs")
        edit(tmp_path / "theirs", "config.json", eos_token_id=[2, 5])
        # known as special from here alone
        edit(tmp_path / "theirs", "tokenizer_config.json", additional_special_tokens=["Ġa"], unk_token="!")
        model = MambaFormerForCausalLM.from_transformers(tmp_path / "theirs")
        assert model.tokenizer.settings["special"] == [0, 1, 2, 3, 261]
    model.export_to_transformers(tmp_path / "x")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "x")
    again = MambaFormerForCausalLM.from_transformers(tmp_path / "x").tokenizer
    text = "the other, é"
    assert tuple(theirs(text).input_ids) == model.tokenizer.tokenize(text).ids == again.tokenize(text).ids
    assert again.settings == model.tokenizer.settings
    assert theirs.pad_token_id == model.tokenizer.pad_token_id
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "x").generation_config.eos_token_id
    assert ends == (None if trained else sorted(model.tokenizer.ends))


def edit(directory: Path, file: str, **keys: Any) -> None:
    (directory / file).write_text(json.dumps(json.loads((directory / file).read_text()) | keys))


WITHOUT: dict[str, tuple[dict[str, Any], str]] = {
    "pairs": ({"n_pairs": 1}, r"blocks that a mamba or .* model can have, got \('mamba2', 'attention', 'mamba2'\)"),
    "mixed": (
        {"blocks": ("mamba1", "feed_forward", "attention", "feed_forward")},
        r"blocks that a mamba or .*, got \('mamba1'",
    ),
    "window": ({"blocks": ("attention", "feed_forward"), "attention_window": 4}, "attention_window .* got 4"),
    "width": (
        {"blocks": ("mamba2", "feed_forward", "attention", "feed_forward"), "positions": "rotary", "rotary_width": 4}
        | {"embedding_multiplier": 2.0},
        "rotary_width that a granitemoehybrid model can have, got 4",
    ),
    "scaled": ({"blocks": ("mamba2",), "residual_multiplier": 0.5}, "residual_multiplier that a mamba2 .* got 0.5"),
    "norms": ({"blocks": ("mamba2",), "norm_groups": 2}, "norm_groups that a mamba2 model can have, got 2"),
    "biases": (
        {"blocks": ("attention", "feed_forward"), "biased": ("feed_forward",)},
        r"biased .*, got \('feed_forward',\)",
    ),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_what_they_cannot_say_is_refused_by_name(tmp_path: Path, case: str) -> None:
    settings, message = WITHOUT[case]
    config = LanguageModelConfig(backbone=MambaFormerConfig(**SIZES, **settings), vocab_size=258)
    with pytest.raises(ConfigError, match=f"^expected {message}") as error:
        MambaFormerForCausalLM(config).export_to_transformers(tmp_path / "x")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()


def test_a_kind_that_is_named_has_to_do(tmp_path: Path) -> None:
    model = MambaFormerForCausalLM(LanguageModelConfig(backbone=OWN["llama"], vocab_size=258))
    with pytest.raises(ConfigError, match=f"expected a model_type of {' or '.join(KINDS)}, got 'gpt2'"):
        model.export_to_transformers(tmp_path / "x", model_type="gpt2")
    with pytest.raises(ConfigError, match=r"^expected blocks that a mamba model can have, got \('attention"):
        model.export_to_transformers(tmp_path / "x", model_type="mamba")
    assert exported(model, tmp_path / "x", "granite").config.model_type == "granite"


def test_it_takes_the_place_of_its_own_files_alone(tmp_path: Path) -> None:
    """Neither a checkpoint that was downloaded nor a file of somebody else is touched."""
    model = MambaFormerForCausalLM(LanguageModelConfig(backbone=OWN["mamba"], vocab_size=258))
    model.export_to_transformers(tmp_path / "x")
    model.export_to_transformers(tmp_path / "x")
    model.save_pretrained(tmp_path / "x")
    model.export_to_transformers(tmp_path / "x")
    (tmp_path / "x" / "README.md").write_text("mine")
    make("mamba", torch.float32).save_pretrained(tmp_path / "theirs")
    for directory in (tmp_path / "x", tmp_path / "theirs"):
        before = {file: file.read_bytes() for file in directory.iterdir()}
        with pytest.raises(BundleError, match="to be new, empty or an earlier save"):
            model.export_to_transformers(directory)
        assert {file: file.read_bytes() for file in directory.iterdir()} == before
