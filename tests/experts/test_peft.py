"""LoRA banks: a vertex is PEFT's model with that adapter, a blend its `cat` merge, also row by row and from files."""

import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bayes_dispatch.errors import BundleError, ConfigError, ForeignExpertError, TensorError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.peft import OTHER_KINDS, READ, WEIGHTS, WITHOUT_EFFECT
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from tests.tiny import SIZES, tiny_adapter, tiny_backbone, tiny_model, tiny_tokenizer

LLAMA = {
    "plain": {},
    "ranks": {"r": 8, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 3}},
    "mlp": {
        "targets": ("gate_proj", "down_proj"),
        "alpha_pattern": {"down_proj": 11, r"layers\.\d\.mlp\..*": 3},
        "layers_to_transform": [1, 3],
    },
    "ends": {"targets": ("embed_tokens", "o_proj", "lm_head"), "r": 2},
}
OTHER_LAYERS = {"mlp", "ends", "attention", "tokens"}  # PEFT merges adapters of the same layers alone
GRANITE = {
    "mixers": {"targets": ("in_proj", "out_proj")},
    "ranks": {"targets": ("in_proj", "out_proj"), "r": 2},
    "attention": {"targets": ("q_proj", "o_proj"), "r": 3},
}
GPT2 = {
    "conv1d": {"targets": ("c_attn", "c_proj"), "r": 3},
    "ranks": {"targets": ("c_attn", "c_proj"), "rank_pattern": {r"h\.[01]\..*": 2}},
    "tokens": {"targets": ("wte", "c_fc")},
}
ADAPTERS = {"llama": LLAMA, "granite": GRANITE, "gpt2": GPT2}
IDS = torch.tensor([[1, 20, 70, 33, 90, 101, 55], [1, 64, 65, 66, 200, 3, 9]])


def of(session_rows: int, backbone: TransformersBackbone, adaptation: object) -> torch.Tensor:
    """Log-probabilities after each token of the prompt, read at once, and of two more, read one by one."""
    session = backbone.open(session_rows, 7, adaptation)  # type: ignore[arg-type]
    ids = IDS[:1].expand(session_rows, -1)
    parts = [session.read(ids[:, :5], tail=5).after, session.read(ids[:, 5:6]).after, session.read(ids[:, 6:]).after]
    return torch.cat([part for part in parts if part is not None], 1)


@pytest.fixture(scope="module", params=["llama", "granite", "gpt2"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    kinds, root = ADAPTERS[request.param], tmp_path_factory.mktemp(request.param)
    for seed, (name, settings) in enumerate(kinds.items()):
        tiny_adapter(root / name, request.param, seed, **settings)  # type: ignore[arg-type]
    return request.param, {name: root / name for name in kinds}


@pytest.fixture(scope="module")
def llama() -> TransformersBackbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def whole_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_adapter(directory := tmp_path_factory.mktemp("adapter") / "a")
    return directory


@pytest.fixture
def adapter(whole_adapter: Path, tmp_path: Path) -> Path:
    """A plain adapter of the tiny Llama, to be spoilt."""
    return Path(shutil.copytree(whole_adapter, tmp_path / "a"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_a_vertex_is_the_adapter(adapted: tuple[str, dict[str, Path]], tmp_path: Path) -> None:
    """And it is what its own export is, with embeddings and heads."""
    from peft import PeftModel

    kind, adapters = adapted
    backbone = tiny_backbone(kind)
    bank = ExpertBank.from_peft(backbone, adapters)
    for k, directory in enumerate(adapters.values()):
        vertex = torch.eye(len(bank) + 1, dtype=torch.float64)[k]
        bank.export(vertex, tmp_path / "export", backbone)
        with torch.no_grad():
            found = of(1, backbone, bank.blend(vertex))
            at_once = backbone.open(1, 7, bank.blend(vertex)).read(IDS[:1], tail=7).after
            for path in (directory, tmp_path / "export"):
                model = PeftModel.from_pretrained(tiny_model(kind), path, autocast_adapter_dtype=False).eval()
                expected = model(input_ids=IDS[:1], use_cache=False).logits.log_softmax(-1)
                torch.testing.assert_close(at_once, expected, rtol=0, atol=1e-10)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if kind == "granite" else 1e-10)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_a_blend_is_the_cat_merge_and_rows_are_one_by_one(adapted: tuple[str, dict[str, Path]], tmp_path: Path) -> None:
    from peft import PeftModel

    kind, adapters = adapted
    backbone, names = tiny_backbone(kind), [name for name in adapters if name not in OTHER_LAYERS]
    bank = ExpertBank.from_peft(backbone, {name: adapters[name] for name in names})
    weights = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(len(bank) + 1), 8))
    weights[3] = torch.eye(len(bank) + 1)[-1]
    with torch.no_grad():
        together = of(8, backbone, bank.blend(weights))
        alone = torch.cat([of(1, backbone, bank.blend(each)) for each in weights])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6 if kind == "granite" else 1e-10)
        plain = tiny_model(kind)(input_ids=IDS[:1], use_cache=False).logits.log_softmax(-1)
        torch.testing.assert_close(together[3:4], plain, rtol=0, atol=1e-6 if kind == "granite" else 1e-12)
        assert float((together[0] - together[1]).abs().max()) > 1e-3
        bank.export(weights[0], tmp_path / "blend", backbone)
        exported = PeftModel.from_pretrained(tiny_model(kind), tmp_path / "blend", autocast_adapter_dtype=False).eval()
        merged = PeftModel.from_pretrained(
            tiny_model(kind), adapters[names[0]], adapter_name=names[0], autocast_adapter_dtype=False
        )
        for name in names[1:]:
            merged.load_adapter(adapters[name], name, autocast_adapter_dtype=False)
        merged.add_weighted_adapter(names, weights[0, :-1].tolist(), "blend", combination_type="cat")
        merged.set_adapter("blend")
        for model in (exported, merged.eval()):
            found = model(input_ids=IDS[:1]).logits.log_softmax(-1)
            torch.testing.assert_close(found, together[:1], rtol=0, atol=1e-6)


def test_an_adapter_that_is_saved_anew_while_it_is_read_is_the_new_one(
    llama: TransformersBackbone, adapter: Path, tmp_path: Path, meanwhile: Callable[..., None]
) -> None:
    """Its settings and its factors are of one save."""
    tiny_adapter(tmp_path / "b", seed=1, r=2)
    bank = ExpertBank.from_peft(llama, {"a": adapter, "b": tmp_path / "b"})
    bank.export([1, 0, 0], tmp_path / "out", llama)
    meanwhile("bayes_dispatch.experts.peft.read_tensors", lambda: bank.export([0, 1, 0], tmp_path / "out", llama))
    found = ExpertBank.from_peft(llama, {"x": tmp_path / "out"})
    assert found["x"].matrices == bank["b"].matrices != bank["a"].matrices


def test_kinds_together_on_disk_and_on_the_way(tmp_path: Path) -> None:
    """A bank of both kinds is the sum of both; files, pickles, gradients and weights by matrix agree with it."""
    from peft import PeftModel

    tiny_adapter(tmp_path / "a", seed=1)
    backbone = tiny_backbone()
    lora = ExpertBank.from_peft(backbone, {"low": tmp_path / "a"})
    generator = torch.Generator().manual_seed(0)
    scales = {
        m: 1 + 0.2 * torch.randn(r, generator=generator, dtype=torch.float64) for m, r in backbone.adaptable().items()
    }
    svf = ExpertVector("scaled", scales, backbone.fingerprint())
    bank = lora.with_expert(svf)
    assert set(bank.adapts) == set(backbone.adaptable())
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64, requires_grad=True)
    backbone.score(IDS[:1], adaptation=bank.blend(weights))[:, 1:].sum().backward()
    assert weights.grad is not None
    assert (weights.grad[:2] != 0).all()
    with torch.no_grad():
        mean = weights.detach()
        found = of(1, backbone, bank.blend(mean))
        by_matrix = bank.blend_by_matrix(mean.expand(len(bank.adapts), 3))
        torch.testing.assert_close(of(1, backbone, by_matrix), found, rtol=0, atol=1e-12)
        bank.save(tmp_path / "bank")
        again = ExpertBank.load(tmp_path / "bank")
        assert again.digest == bank.digest != lora.digest
        for other in (again, pickle.loads(pickle.dumps(bank)), again.renamed("low", "lower").without("scaled")):
            if len(other) == 2:
                torch.testing.assert_close(of(1, backbone, other.blend(mean)), found, rtol=0, atol=1e-12)
            else:
                only = of(1, backbone, other.blend(torch.tensor([0.5, 0.5], dtype=torch.float64)))
                expected = of(1, backbone, bank.blend(torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)))
                torch.testing.assert_close(only, expected, rtol=0, atol=1e-12)
        errors = [bank.export(mean, tmp_path / "out", backbone, rank=rank) for rank in (1, 8, 64)]
        assert 1 > errors[0] > errors[1] > errors[2] == 0
        exported = PeftModel.from_pretrained(tiny_model(), tmp_path / "out", autocast_adapter_dtype=False).eval()
        whole = exported(input_ids=IDS[:1]).logits.log_softmax(-1)
        torch.testing.assert_close(whole, found, rtol=0, atol=1e-10)


def test_what_cannot_be_exported(tmp_path: Path, llama: TransformersBackbone, model: Any) -> None:
    backbone = llama
    tiny_adapter(tmp_path / "a", targets=("embed_tokens",))
    bank = ExpertBank.from_peft(backbone, {"a": tmp_path / "a"})
    scaled = ExpertVector("z", {"model.layers.0.mlp.up_proj": torch.full((5,), 1.5)}, bank.base)
    byte = ExpertVector("z", dict.fromkeys(model.adaptable(), torch.full((5,), 1.5)), model.fingerprint())
    out, half = tmp_path / "out", [0.5, 0.5]
    for use, error, message in (
        (lambda: bank.export([[0.5, 0.5]], out, backbone), TensorError, r"weights of shape \(2,\), got \(1, 2\)"),
        (lambda: bank.export([0.0, 1.0], out, backbone), TensorError, "got base alone, which needs no adapter"),
        (lambda: ExpertBank([byte]).export(half, out, model), ConfigError, "got a MambaFormerForCausalLM"),
        (lambda: bank.export(half, out, backbone, rank=0), ConfigError, "rank to be a whole number"),
        (lambda: bank.export(half, out, tiny_backbone(seed=1)), ForeignExpertError, "expected experts made for"),
    ):
        with pytest.raises(error, match=message):
            use()
    assert not out.exists()
    (tmp_path / "a" / "README.md").unlink()
    with pytest.raises(BundleError, match="got an adapter from elsewhere"):
        bank.export(half, tmp_path / "a", backbone)
    assert bank.export(half, out, backbone) == 0
    assert ExpertBank([scaled]).export(half, out, backbone, rank=5) == 0  # in the place of the other
    (out / "note").write_text("mine")
    with pytest.raises(BundleError, match="got other things in it: note"):
        bank.export(half, out, backbone)


def test_what_is_no_model_or_no_names(llama: TransformersBackbone, tmp_path: Path, unchecked: None) -> None:
    wrong: Any = "models/tiny"
    with pytest.raises(
        ConfigError, match=r"^expected a model, as TransformersBackbone.load gives .*, got 'models/tiny'$"
    ):
        ExpertBank.from_peft(wrong, {"a": tmp_path})
    wrong = ["adapters/a"]
    with pytest.raises(ConfigError, match=r"^expected adapters as {name: directory}, got \['adapters/a'\]$"):
        ExpertBank.from_peft(llama, wrong)


def test_weights_of_the_base_in_an_adapter(tmp_path: Path, llama: TransformersBackbone) -> None:
    """PEFT adds those of adapted embeddings: they are passed over where they are the base's, else refused."""
    tiny_adapter(tmp_path / "a", targets=("embed_tokens",))
    backbone, path = llama, tmp_path / "a" / "adapter_model.safetensors"
    expected = ExpertBank.from_peft(backbone, {"a": tmp_path / "a"}).digest
    own = {"model.embed_tokens.base_layer": "model.embed_tokens", "lm_head": "lm_head"}
    tensors = {f"base_model.model.{key}.weight": backbone.model.get_submodule(m).weight for key, m in own.items()}
    save_file({**load_file(path), **{key: tensor.float() for key, tensor in tensors.items()}}, path)
    assert ExpertBank.from_peft(backbone, {"a": tmp_path / "a"}).digest == expected
    with pytest.raises(ConfigError, match=r"factors of LoRA alone in .*, got base_model\.model\.(lm_head|model)"):
        ExpertBank.from_peft(tiny_backbone(seed=1), {"a": tmp_path / "a"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"use_dora": True}, ConfigError, "got use_dora: DoRA"),
        ({"modules_to_save": ["lm_head"]}, ConfigError, "got modules_to_save"),
        ({"bias": "all"}, ConfigError, "without biases"),
        ({"use_newest": True}, ConfigError, "known here in .*json, got use_newest: take it out"),
        ({"peft_type": "IA3"}, ConfigError, "got one of type 'IA3'"),
        ({"peft_type": None}, ConfigError, "got one of type None"),
        ({"init_lora_weights": "pissa_niter_4"}, ConfigError, "unchanged base"),
        ({"lora_alpha": "much"}, ConfigError, "expected lora_alpha in .* to be a finite number, got 'much'"),
        ({"lora_alpha": float("nan")}, ConfigError, "expected lora_alpha in .* to be a finite number, got nan"),
        ({"alpha_pattern": {"(": 3}}, ConfigError, "expected alpha_pattern in .* to map names to numbers"),
        (
            {"alpha_pattern": {"q_proj": "much"}},
            ConfigError,
            "expected alpha_pattern in .* a finite number, got 'much'",
        ),
        ({"alpha_pattern": [3]}, ConfigError, "expected alpha_pattern in .* to map names to numbers"),
        ({"rank_pattern": {"q_proj": 3}}, BundleError, "expected factors of rank 3 of .*q_proj, .* got 4"),
        ({"r": 2}, BundleError, "expected factors of rank 2 of .*q_proj, as adapter_config.json in .* says, got 4"),
        ({"base_model_name_or_path": "other/model"}, ForeignExpertError, "got one of other/model"),
        ({"base_model_name_or_path": f"other/{'m' * 300}"}, ForeignExpertError, "got one of other/mmm"),
    ],
)
def test_other_adapters_are_refused(
    adapter: Path, llama: TransformersBackbone, change: dict[str, object], error: type[Exception], message: str
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=message) as raised:
        ExpertBank.from_peft(llama, {"a": adapter})
    assert "\n" not in str(raised.value)


def test_every_setting_of_peft_has_its_place() -> None:
    """It is heeded, changes nothing, or is refused; adapters with PEFT's defaults are read."""
    import peft

    places = (set(OTHER_KINDS), READ, WITHOUT_EFFECT)
    for name in {field.name for field in fields(peft.LoraConfig)}:
        assert sum(name in place for place in places) == 1, name


def test_damaged_adapters_are_refused(adapter: Path, llama: TransformersBackbone) -> None:
    backbone, directory = llama, adapter
    weights, whole = directory / "adapter_model.safetensors", load_file(directory / "adapter_model.safetensors")
    first = next(iter(whole))
    for tensors, error, message in (
        ({**whole, first: whole[first] * torch.nan}, TensorError, "got NaN or infinite ones"),
        ({**whole, first: whole[first][:, :-1].contiguous()}, ForeignExpertError, "another base model"),
        ({name: t for name, t in whole.items() if name != first}, BundleError, "expected both factors"),
        ({**whole, "base_model.model.lm_head.weight": whole[first].clone()}, ConfigError, "factors of LoRA alone"),
        ({**whole, first: whole[first].to(torch.float8_e4m3fn)}, ConfigError, "torch.float8_e4m3fn"),
        ({name: t[:0] if "lora_A" in name else t[:, :0] for name, t in whole.items()}, BundleError, "got rank 0"),
        ({}, BundleError, "expected factors in .*, got none"),
        (
            {name.replace("q_proj", "x_proj"): t for name, t in whole.items()},
            ConfigError,
            "got model.layers.0.self_attn.x_proj, which the model does not have",
        ),
    ):
        save_file(tensors, weights)
        with pytest.raises(error, match=message):
            ExpertBank.from_peft(backbone, {"a": directory})
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BundleError, match="expected a whole safetensors file"):
        ExpertBank.from_peft(backbone, {"a": directory})
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(BundleError, match="a pickle, which is never read"):
        ExpertBank.from_peft(backbone, {"a": directory})
    (directory / "adapter_config.json").unlink()
    with pytest.raises(BundleError, match=r"expected a LoRA adapter with an adapter_config.* got none$"):
        ExpertBank.from_peft(backbone, {"a": directory})
    (directory / "named").mkdir()
    (directory / "named" / "adapter_config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"got none; there is one in .*named$"):
        ExpertBank.from_peft(backbone, {"a": directory})
    with pytest.raises(ConfigError, match="expected at least one expert, got none"):
        ExpertBank.from_peft(backbone, {})


@pytest.mark.parametrize("zero", ["lora_A", "lora_B", "lora_alpha"])
def test_an_adapter_that_changes_nothing_is_told(adapter: Path, llama: TransformersBackbone, zero: str) -> None:
    """It is read all the same: blends with it are those with base."""
    weights, whole = adapter / WEIGHTS, load_file(adapter / WEIGHTS)
    save_file({name: t * (zero not in name) for name, t in whole.items()}, weights)
    if zero == "lora_alpha":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, zero: 0}))
    told = rf"^{re.escape(str(adapter))} adds zeros alone, as before training: expert untrained is base$"
    with pytest.warns(UserWarning, match=told) as found:
        bank = ExpertBank.from_peft(llama, {"untrained": adapter})
    assert len(found) == 1
    with torch.no_grad():
        assert torch.equal(of(1, llama, bank.blend([1.0, 0.0])), of(1, llama, bank.blend([0.0, 1.0])))


def test_an_adapter_that_changes_one_matrix_alone_is_read(adapter: Path, llama: TransformersBackbone) -> None:
    weights, zeros = adapter / "adapter_model.safetensors", load_file(adapter / "adapter_model.safetensors")
    first = next(name for name in zeros if "lora_B" in name)
    save_file({name: t * ("lora_A" in name or name == first) for name, t in zeros.items()}, weights)
    bank = ExpertBank.from_peft(llama, {"a": adapter})
    assert sum(bool(up.any()) for _, up in bank["a"].factors.values()) == 1  # type: ignore[union-attr]


def test_factors_of_two_precisions_are_rounded_no_further(adapter: Path, llama: TransformersBackbone) -> None:
    weights, whole = adapter / "adapter_model.safetensors", load_file(adapter / "adapter_model.safetensors")
    save_file({name: t.half() if "lora_B" in name else t for name, t in whole.items()}, weights)
    down, _ = ExpertBank.from_peft(llama, {"a": adapter})["a"].factors["model.layers.0.self_attn.q_proj"]  # type: ignore[union-attr]
    assert torch.equal(down, whole["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])


def test_a_directory_whose_name_is_no_utf8(adapter: Path, llama: TransformersBackbone, tmp_path: Path) -> None:
    """A bank of it is saved and loaded."""
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    try:
        adapter.rename(named)
    except OSError:
        pytest.skip("a disk of names in UTF-8 alone")
    ExpertBank.from_peft(llama, {"a": named}).save(tmp_path / "bank")
    assert ExpertBank.load(tmp_path / "bank")["a"].metadata["adapter"] == "\ufffd"


def test_a_head_with_a_bias(tmp_path: Path) -> None:
    """PEFT writes the base's head and its bias beside an update of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    torch.manual_seed(0)
    base = PhiForCausalLM(PhiConfig(**sizes)).double().eval()
    torch.nn.init.normal_(base.lm_head.bias)
    backbone = TransformersBackbone(base, tiny_tokenizer())
    settings = LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(base), settings, autocast_adapter_dtype=False)
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any(name.endswith("lm_head.base_layer.bias") for name in load_file(tmp_path / "a" / WEIGHTS))
    bank = ExpertBank.from_peft(backbone, {"a": tmp_path / "a"})
    with torch.no_grad():
        found = backbone.open(1, 7, bank.blend(torch.tensor([1.0, 0.0]))).read(IDS[:1], tail=7).after
        expected = adapted(input_ids=IDS[:1]).logits.log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        base.lm_head.bias += 1
    with pytest.raises(ConfigError, match=r"factors of LoRA alone in .*, got .*lm_head\.base_layer\.bias"):
        ExpertBank.from_peft(backbone, {"a": tmp_path / "a"})


def test_a_matrix_that_deltas_do_not_reach(tmp_path: Path) -> None:
    """Positions are the same for all rows: their embedding is looked up once."""
    tiny_adapter(tmp_path / "a", "gpt2", targets=("wpe",))
    with pytest.raises(ConfigError, match=r"got transformer\.wpe, which a row's delta cannot reach"):
        ExpertBank.from_peft(tiny_backbone("gpt2"), {"a": tmp_path / "a"})
