"""Models of the transformers library, converted: logits are theirs, however they are read; what is not covered or does
not fit is refused by name.

That library computes norms, angles and states in float32 whatever the dtype of a model. Where it is the reference in
float64, all of that is done in float64 here (``in_float64``).
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from bayes_dispatch.errors import BayesDispatchError, ConfigError
from bayes_dispatch.model.backbone import padded
from bayes_dispatch.model.mambaformer.compiled.switch import tensors_only
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.mambaformer.svd.linear import matrices
from bayes_dispatch.model.tokenizer import ByteTokenizer
from tests.convertible import CONFIGS, WIDTH, close, every_config, in_float64, make, tokens
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def pairs() -> Callable[..., tuple[PreTrainedModel, MambaFormerForCausalLM]]:
    """A model of theirs and ours of it; in float64, theirs is to be run ``in_float64``."""
    made: dict[Any, Any] = {}

    def get(kind: str, dtype: torch.dtype = torch.float64) -> Any:
        if (kind, dtype) not in made:
            if dtype == torch.float64:
                with in_float64():
                    theirs = make(kind)
            else:
                theirs = make(kind, dtype)
            made[kind, dtype] = theirs, MambaFormerForCausalLM.from_transformers(theirs, tokenizer=ByteTokenizer())
        return made[kind, dtype]

    return get


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    with torch.no_grad():
        if request.param == torch.float64:
            with in_float64():
                yield request.param
        else:
            yield request.param


@every_config
def test_logits_are_theirs(pairs: Any, kind: str, dtype: torch.dtype) -> None:
    """At once, and in pieces from a cache, by compiled loops and by tensor operations."""
    theirs, ours = pairs(kind, dtype)
    ids = tokens(2, WIDTH)
    expected = theirs(ids, use_cache=False).logits
    assert ours.dtype == dtype
    close(ours(ids).logits, expected)
    for pieces in ((13, 1, 1, 5, 20), (WIDTH - 4, 1, 1, 1, 1)):
        cache = ours.init_cache(2, WIDTH)
        close(torch.cat([ours(piece, cache=cache).logits for piece in ids.split(pieces, 1)], 1), expected)
    with tensors_only():
        close(ours(ids).logits, expected)
        cache = ours.init_cache(2, WIDTH)
        close(torch.cat([ours(piece, cache=cache).logits for piece in ids.split((30, 1, 9), 1)], 1), expected)
    with torch.enable_grad():  # recorded, it goes another way
        close(ours(ids).logits.detach(), expected)


@every_config
@pytest.mark.parametrize("left", [True, False])
def test_ragged_rows_are_theirs(pairs: Any, kind: str, dtype: torch.dtype, left: bool) -> None:
    """Padded on either side, and gone on with one by one; each row is what it is alone."""
    theirs, ours = pairs(kind, dtype)
    rows, later = [tokens(n, seed=n).tolist() for n in (9, 17, 1)], tokens(3, 6, seed=5)
    ids, lengths = padded(rows, 0)
    mask = (torch.arange(17) < lengths[:, None]).long()
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
        for row, own in zip(ids, rows, strict=True):
            row[17 - len(own) :] = torch.tensor(own)
    cache = ours.init_cache(3, 30)
    first = ours(ids, attention_mask=mask, cache=cache).logits
    then = torch.cat([ours(piece, cache=cache).logits for piece in later.split((1, 1, 4), 1)], 1)
    for n, own in enumerate(rows):
        expected = theirs(torch.cat([torch.tensor(own), later[n]])[None], use_cache=False).logits[0]
        close(first[n][mask[n].bool()], expected[: len(own)])
        close(then[n], expected[len(own) :])


# theirs does not heed time_step_limit as it goes on from a cache: only a whole text says what it means
# and a GraniteMoeHybrid without attention cannot use one
@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"granite-hybrid-limits", "granite-hybrid-mamba-alone"}))
def test_texts_are_theirs_token_by_token(pairs: Any, kind: str) -> None:
    with torch.no_grad(), in_float64():
        theirs, ours = pairs(kind)
        ids, count = tokens(1, 7, seed=3), 80
        expected = theirs.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, min_new_tokens=count)
        assert torch.equal(ours.generate(ids, max_new_tokens=count), expected[:, 7:])
    assert len(expected[0].unique()) > 5


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_beams_are_theirs(pairs: Any, penalty: float) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "repetition_penalty": penalty, "eos_token_id": 5}
    with torch.no_grad(), in_float64():
        theirs, ours = pairs("llama")
        for seed in range(4):
            ids = tokens(1, 5, seed=seed)
            expected = theirs.generate(ids, do_sample=False, pad_token_id=0, **settings)[0, 5:]
            assert torch.equal(ours.generate(ids, **settings)[0], expected)


def test_what_a_converted_model_saves_it_is(pairs: Any, tmp_path: Path) -> None:
    _, ours = pairs("granite-hybrid-rope-groups")
    ours.save_pretrained(tmp_path / "ours")
    again = MambaFormerForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert again.fingerprint() == ours.fingerprint()
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 9)).logits, ours(tokens(1, 9)).logits)


def saved(kind: str, directory: Path, **options: Any) -> Path:
    make(kind, torch.float32).save_pretrained(directory, **options)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("shards", [False, True])
def test_files_are_read_in_the_dtype_wanted(tmp_path: Path, shards: bool) -> None:
    directory = saved("bamba", tmp_path, **({"max_shard_size": "40KB"} if shards else {}))
    assert (directory / "model.safetensors.index.json").exists() is shards
    own = MambaFormerForCausalLM.from_transformers(make("bamba", torch.float32), tokenizer=ByteTokenizer())
    ids = tokens(1, 9)
    for dtype in (None, torch.float64, torch.bfloat16, torch.float16):
        found = MambaFormerForCausalLM.from_transformers(directory, dtype=dtype)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        large = matrices(found)
        assert {weight.dtype for weight in large.values()} == {dtype or torch.float32}
        assert {weight.dtype for name, weight in found.state_dict().items() if name not in large} == {found.dtype}
        rounded = copy.deepcopy(own).to(found.dtype)
        for name, weight in matrices(rounded).items():
            weight.data = weight.data.to(large[name].dtype).to(found.dtype)
        assert found.fingerprint() == rounded.fingerprint()
        with torch.no_grad():
            torch.testing.assert_close(found(ids).logits, rounded(ids).logits, rtol=2e-5, atol=2e-5)


def test_its_tokenizer_is_that_of_its_directory(tmp_path: Path) -> None:
    """Beginning, ends and special tokens as transformers has them; saved and loaded, too."""
    from bayes_dispatch.model.transformers.tokenizer import TransformersTokenizer

    model = MambaFormerForCausalLM.from_transformers(saved("llama", tmp_path / "theirs"))
    theirs = TransformersTokenizer(tiny_tokenizer(), 270, [2])
    model.save_pretrained(tmp_path / "ours")
    for tokenizer in (model.tokenizer, MambaFormerForCausalLM.from_pretrained(tmp_path / "ours").tokenizer):
        assert tokenizer.tokenize("the other <s> é") == theirs.tokenize("the other <s> é")
        assert tokenizer.ends == theirs.ends
        assert torch.equal(tokenizer.continues, theirs.continues)


def changed(**keys: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def write(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors")

    return write


NORM = "model.layers.0.input_layernorm.weight"
WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "kind": ("llama", changed(model_type="qwen3"), "model_type .* got 'qwen3'"),
    "activation": ("llama", changed(hidden_act="gelu"), "hidden_act .* got 'gelu'"),
    "scaling": (
        "llama",
        changed(rope_parameters=None, rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        "rope_scaling .* got rope_type",
    ),
    "rope": ("llama", changed(rope_parameters={"rope_type": "linear"}), "rope_parameters .* got rope_type = 'linear'"),
    "partial": ("llama", changed(partial_rotary_factor=0.5), "partial_rotary_factor of a llama config to be 1.0"),
    "theta": ("llama", changed(rope_parameters={"rope_theta": "x"}), "rope_theta .* of type number, got 'x'"),
    "legacy": (
        "llama",
        changed(rope_parameters=None, rope_scaling={"type": "linear"}),
        "rope_scaling .* got type = 'linear'",
    ),
    "bounds": ("granite-hybrid", changed(time_step_limit=[0, "1"]), "time_step_limit .* of type number, got '1'"),
    "sliding": ("llama", changed(sliding_window=128), "known here, got sliding_window"),
    "quantised": ("llama", changed(quantization_config={"bits": 4}), "known here, got quantization_config"),
    "code": ("llama", changed(auto_map={"AutoModel": "code.py"}), "known here, got auto_map"),
    "type": ("llama", changed(num_hidden_layers="3"), "num_hidden_layers of a llama config .* got '3'"),
    "none": ("llama", changed(hidden_size=None), "expected hidden_size in a llama config, got none"),
    "layer": ("granite-hybrid", changed(layer_types=["mamba", "conv", "mamba"]), "layer_types .* got 'conv'"),
    "layers": ("granite-hybrid", changed(layer_types=["mamba"]), "layer_types of num_hidden_layers 3 layers, got 1"),
    "experts": ("granite-hybrid", changed(num_local_experts=8), "num_local_experts .* to be 0, got 8"),
    "positions": ("granite-hybrid", changed(position_embedding_type="alibi"), "position_embedding_type .* 'alibi'"),
    "limit": ("granite-hybrid", changed(time_step_limit=[0.5, 0.1]), "upper bound of time_step_limit .* got 0.1"),
    "heads": (
        "granite-hybrid",
        changed(mamba_n_heads=6),
        "heads of a granitemoehybrid config .* got mamba_n_heads 6 × mamba_d_head 8$",
    ),
    "indices": ("bamba", changed(attn_layer_indices=[7]), "attn_layer_indices below num_hidden_layers 3, got 7"),
    "bias": ("llama", changed(attention_bias=True), "expected the tensor model.layers.0.self_attn.q_proj.bias in"),
    "depth": ("llama", changed(num_hidden_layers=2), "its config speaks of .* got model.layers.2"),
    "sizes": ("llama", changed(intermediate_size=40), r"gate_proj.weight of floats in the shape \(40, 32\)"),
    "missing": ("llama", tensors(lambda t: t.pop(NORM)), f"expected the tensor {NORM} in"),
    "shape": ("llama", tensors(lambda t: t.update({NORM: torch.ones(33)})), rf"{NORM} .* \(32,\) .* got \(33,\)"),
    "integers": (
        "llama",
        tensors(lambda t: t.update({NORM: torch.ones(32).int()})),
        f"{NORM} of floats .* torch.int32$",
    ),
    "not numbers": (
        "llama",
        tensors(lambda t: t[NORM].__setitem__(3, torch.nan)),
        f"^expected finite numbers in {NORM} in .* as torch.float32, got NaN or infinite ones$",
    ),
    "infinite": (
        "bamba",
        tensors(lambda t: t["model.layers.1.self_attn.k_proj.weight"].__setitem__((0, 0), -torch.inf)),
        "q_proj.weight and .*k_proj.weight and .*v_proj.weight in .* got NaN or infinite ones$",
    ),
    "more": ("llama", tensors(lambda t: t.update(extra=torch.ones(1))), "got extra, too"),
    "head": (
        "llama",
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(270, 32)})),
        "an lm_head.weight that is the embedding",
    ),
    "damage": ("llama", lambda d: (d / "model.safetensors").write_bytes(b"\x08"), "whole safetensors file"),
    "pickle": (
        "llama",
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "expected model.safetensors or .* no pickle is read$",
    ),
    "tokenizer": ("llama", lambda d: (d / "tokenizer.json").unlink(), "expected a tokenizer.json in"),
    "no tokenizer": ("llama", lambda d: (d / "tokenizer.json").write_text("{}"), "of the tokenizers library in"),
    "json": ("llama", lambda d: (d / "config.json").write_text("{"), "expected JSON in"),
    "kinds": ("llama", changed(model_type=["llama"]), r"model_type .* got \['llama'\]"),
    "no heads": ("llama", changed(num_attention_heads=0), "num_attention_heads .* from 1 to 67108864, got 0"),
    "no state heads": ("bamba", changed(mamba_n_heads=0, mamba_d_head="auto"), "mamba_n_heads .* from 1 .* got 0"),
    "deep": (
        "llama",
        changed(num_hidden_layers=10**6),
        "num_hidden_layers of a llama config from 1 to 4096, got 1000000",
    ),
    "wide": ("llama", changed(intermediate_size=10**13), "intermediate_size .* from 1 to"),
    "words": ("llama", changed(vocab_size=10**30), "vocab_size .* from 1 to"),
    "large": ("llama", changed(rms_norm_eps=10**400), "rms_norm_eps of a llama config to be a number, got a huge one"),
    "logits": ("llama", changed(logits_scaling=4.0), "known here, got logits_scaling"),
    "turned": ("bamba", changed(partial_rotary_factor=0.25), "partial_rotary_factor of a bamba config to be 0.5"),
    "both": (
        "llama",
        changed(rope_scaling={"type": "default"}, rope_parameters={"rope_theta": 500.0}),
        "rope_parameters or rope_scaling in a llama config, got both",
    ),
    "below": (
        "granite-hybrid",
        changed(time_step_limit=[0, float("-inf")]),
        "upper bound of time_step_limit .* got -inf",
    ),
    "ends": ("llama", changed(eos_token_id=["2"]), "eos_token_id in .* got '2'"),
    "end": ("llama", changed(eos_token_id=True), "eos_token_id in .* got True"),
    "generation": (
        "llama",
        lambda d: (d / "generation_config.json").write_text("[]"),
        "expected an object in .*generation_config.json",
    ),
    "config": ("llama", lambda d: (d / "config.json").unlink(), "expected a model's directory with a config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    kind, change, message = WRONG[case]
    change(saved(kind, tmp_path))
    with pytest.raises(BayesDispatchError, match=message) as error:
        MambaFormerForCausalLM.from_transformers(tmp_path)
    assert str(error.value).startswith("expected ")
    assert "\n" not in str(error.value)


def test_missing_and_foreign_shards_are_refused(tmp_path: Path) -> None:
    directory = saved("llama", tmp_path, max_shard_size="40KB")
    index = directory / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    shard = sorted(set(names["weight_map"].values()))[0]
    (directory / shard).rename(directory / "elsewhere")
    with pytest.raises(BayesDispatchError, match=f"^expected the shard {shard} beside .*, got none$"):
        MambaFormerForCausalLM.from_transformers(directory)
    (directory / "elsewhere").rename(directory / shard)
    for shards in ({**names["weight_map"], NORM: "../elsewhere"}, {**names["weight_map"], "other": shard}, []):
        index.write_text(json.dumps({**names, "weight_map": shards}))
        with pytest.raises(BayesDispatchError, match=r"^expected (the shard|the tensors|a weight_map)"):
            MambaFormerForCausalLM.from_transformers(directory)


def test_of_two_copies_the_one_that_is_meant_is_read(tmp_path: Path) -> None:
    """Where there is a whole file, that; of a tensor in two shards, none."""
    directory = saved("llama", tmp_path, max_shard_size="40KB")
    model = MambaFormerForCausalLM.from_transformers(directory)
    names = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    embedding = "model.embed_tokens.weight"
    other = next(shard for shard in sorted(set(names.values()), reverse=True) if shard != names[embedding])
    both = load_file(directory / other) | {embedding: torch.ones(270, 32)}
    save_file(both, directory / other)
    with pytest.raises(BayesDispatchError, match=f"in {other}, got {embedding}, too$"):
        MambaFormerForCausalLM.from_transformers(directory)
    whole = {name: each for shard in sorted(set(names.values())) for name, each in load_file(directory / shard).items()}
    save_file(whole | {embedding: model.embedding.weight.detach() + 1}, directory / "model.safetensors")
    read = MambaFormerForCausalLM.from_transformers(directory).embedding.weight
    torch.testing.assert_close(read, model.embedding.weight + 1)


def test_one_of_ours_is_none_of_theirs(make_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"^expected a model of the transformers library, got a MambaFormer\w+$"):
        MambaFormerForCausalLM.from_transformers(make_model())


def test_pad_of_no_id_is_none(tmp_path: Path) -> None:
    directory = saved("llama", tmp_path)
    changed(pad_token_id=-1)(directory)
    assert MambaFormerForCausalLM.from_transformers(directory).tokenizer.pad_token_id == 0


def test_a_text_ends_where_its_checkpoint_says(tmp_path: Path) -> None:
    """Unless told otherwise; generation stops as that of transformers does."""
    directory, ids = saved("llama", tmp_path), tokens(1, 5)
    written = MambaFormerForCausalLM.from_transformers(directory).generate(ids, max_new_tokens=8, eos_token_id=())[0]
    end = next(token for token in written.tolist()[1:] if token != written[0])
    stop = written.tolist().index(end) + 1
    assert 1 < stop < 8
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    ours = MambaFormerForCausalLM.from_transformers(directory)
    theirs = LlamaForCausalLM.from_pretrained(directory)
    expected = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 5:]
    assert ours.generate(ids, max_new_tokens=8)[0].tolist() == expected.tolist() == written[:stop].tolist()
    assert len(list(ours.stream(ids, max_new_tokens=8))) == stop
    assert torch.equal(ours.generate(ids, max_new_tokens=8, eos_token_id=())[0], written)


def test_numbers_that_a_narrower_dtype_has_not_are_refused() -> None:
    theirs = make("mamba", torch.float32)
    with torch.no_grad():
        theirs.backbone.layers[0].mixer.out_proj.weight[0] = theirs.backbone.layers[0].mixer.D[0] = 1e6
    assert MambaFormerForCausalLM.from_transformers(theirs, tokenizer=ByteTokenizer(), dtype=torch.bfloat16)
    with pytest.raises(
        BayesDispatchError, match=r"finite numbers in backbone\.layers\.0\.mixer\.out_proj.* as torch\.float16, got"
    ):
        MambaFormerForCausalLM.from_transformers(theirs, tokenizer=ByteTokenizer(), dtype=torch.float16)


def test_a_model_without_its_tokenizer_is_refused() -> None:
    with pytest.raises(BayesDispatchError, match="expected a tokenizer for a MambaForCausalLM, got none"):
        MambaFormerForCausalLM.from_transformers(make("mamba"))
