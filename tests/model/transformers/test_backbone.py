"""A model and its tokenizer from a directory: what was saved loads, and what cannot be used says so in a line."""

import copy
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    ByT5Tokenizer,
    OPTConfig,
    PreTrainedModel,
    T5Config,
)

from bayes_dispatch.errors import CacheFullError, ConfigError
from bayes_dispatch.model.adaptation import Adaptation, Delta
from bayes_dispatch.model.mambaformer import products
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from tests.tiny import KINDS, VOCABULARY, tiny_backbone, tiny_model, tiny_tokenizer

BERT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
load = TransformersBackbone.load


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny Llama in float32 with its tokenizer."""
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_is_saved_loads_without_a_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    own = TransformersBackbone(tiny_model(dtype=torch.float32), tiny_tokenizer())
    for path in (saved, str(saved)):
        backbone = load(path)
        assert backbone.fingerprint() == own.fingerprint()
        assert (backbone.name, backbone.dtype, backbone.device.type) == (str(saved), torch.float32, "cpu")
        assert (backbone.depth, backbone.longest, backbone.vocab_size) == (4, 512, VOCABULARY)


def test_half_precision_reads_as_the_plain_model_does(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_in_hardware", lambda _: True)  # else it rounds less often than the library
    backbone = load(saved, dtype=torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert backbone.cuts
    assert backbone.continues
    ids = torch.arange(3, 23).expand(2, -1)
    with torch.no_grad():
        after = backbone.open(2, 20).read(ids).after
        plain = backbone.model(ids).logits[:, -1:].float().log_softmax(-1)
    assert after is not None
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "granite", "gpt2"])
def test_decoded_tokens_are_those_of_the_library(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are multiplied by loops of our own, which large matrices alone need."""
    monkeypatch.setattr(products, "SMALL", 1)
    monkeypatch.setattr(products, "_in_hardware", lambda _: False)
    backbone, by_loops = tiny_backbone(kind, dtype), []
    monkeypatch.setattr(products, "_few", lambda *of, few=products._few: by_loops.append(1) or few(*of))
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = copy.deepcopy(backbone.model).double()(ids).logits.log_softmax(-1)
        assert not by_loops  # the library's own calls stay its own
        session = backbone.open(3, 12)
        found = [session.read(part).after[:, -1] for part in ids.split([5, *[1] * 7], 1)]
    assert len(by_loops) >= 8  # the head at least: GPT-2's layers are no linear ones
    for t, after in zip(range(4, 12), found, strict=True):
        slack = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(after.double(), expected[:, t], rtol=slack / 10, atol=slack)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "seeds"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_what_a_model_can_do_is_seen_in_any_precision(kind: str, dtype: torch.dtype, seeds: int) -> None:
    """Jamba's states are lost where several tokens follow at once, by little more than bfloat16 rounds."""
    for seed in range(seeds):
        backbone = tiny_backbone(kind, dtype, seed)
        assert (backbone.continues, backbone.cuts) == (kind != "jamba", True)


def without_config(path: Path) -> None:
    (path / "config.json").unlink()


def without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def without_a_tokenizer(path: Path) -> None:
    for file in path.glob("token*"):
        file.unlink()


def of_t5(path: Path) -> None:
    T5Config().save_pretrained(path)


def of_bert(path: Path) -> None:
    BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, **BERT)).save_pretrained(path)


def torn(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100])


def of_another_shape(path: Path) -> None:
    changed(path / "config.json", intermediate_size=48)


def deeper(path: Path) -> None:
    changed(path / "config.json", num_hidden_layers=5)


def pickled(path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (path / "ran",)

    without_weights(path)
    torch.save({"x": Trap()}, path / "pytorch_model.bin")


def of_remote_code(path: Path) -> None:
    (path / "own.py").write_text(f"open({str(path / 'ran')!r}, 'w')\nclass Own: ...\nclass OwnConfig: ...\n")
    changed(
        path / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    )


def without_json(path: Path) -> None:
    (path / "config.json").write_text("{")


@pytest.mark.filterwarnings("ignore")  # that library's, which differ from version to version
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_config, "with a config.json"),
        (without_json, "causal language model"),
        (without_weights, "causal language model"),
        (without_a_tokenizer, "a tokenizer in .*, got none: no tokenizer.json"),
        (of_t5, "got T5Config"),
        (of_bert, "got BertLMHeadModel, which looks at later tokens"),
        (torn, "causal language model"),
        (of_another_shape, "causal language model"),
        (deeper, "all weights of the model"),
        (pickled, "safetensors"),
        (of_remote_code, "causal language model"),
    ],
)
def test_a_directory_that_cannot_be_used_is_refused_in_a_line(
    saved: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(saved)
    with pytest.raises(ConfigError, match=r"^expected .*" + says) as raised:
        load(saved)
    assert "\n" not in str(raised.value)
    assert not (saved / "ran").exists()


def test_code_beside_a_model_that_is_known_does_not_run(saved: Path) -> None:
    (saved / "own.py").write_text(f"open({str(saved / 'ran')!r}, 'w')\nclass Own: ...\n")
    changed(saved / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    changed(saved / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    assert load(saved).depth == 4
    assert not (saved / "ran").exists()


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c", Path("nowhere"), Path("owner/name")])
def test_what_is_neither_a_directory_nor_a_name_is_not_looked_for(path: str | Path) -> None:
    with pytest.raises(ConfigError, match=r"^expected a directory, or a name on the hub, got"):
        load(path)


def test_a_name_that_is_neither_here_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most are paths that were mistyped."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = r"^expected a causal language model in models/nope, got no such directory, and from the hub: ."
    with pytest.raises(ConfigError, match=told) as raised:
        load("models/nope")
    assert not re.search(r"'https?:[^']*$", str(raised.value))  # long as it is, it ends with a word


def test_a_dtype_that_is_none_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"^expected a dtype of auto, float32, bfloat16, .*, got 'bf16'$"):
        load(saved, dtype="bf16")


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused(saved: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"^expected a device of this machine, got {device}"):
        load(saved, device=device)


def test_a_tokenizer_that_does_not_fit_is_refused() -> None:
    model, large = tiny_model(), tiny_tokenizer()
    large.add_tokens(["more"] * 1 + [f"more{n}" for n in range(9)])
    with pytest.raises(ConfigError, match=f"^expected a tokenizer of at most {VOCABULARY} ids"):
        TransformersBackbone(model, large)
    with pytest.raises(ConfigError, match=r"^expected a fast tokenizer, got ByT5Tokenizer"):
        TransformersBackbone(model, ByT5Tokenizer())


def test_texts_end_with_all_ids_that_the_model_says(saved: Path) -> None:
    model = tiny_model()
    assert TransformersBackbone(model, tiny_tokenizer()).tokenizer.ends == {2}
    model.generation_config.eos_token_id = [2, 40]
    backbone = TransformersBackbone(model, tiny_tokenizer())
    assert backbone.tokenizer.ends == {2, 40}
    assert backbone.tokenizer.continues[[2, 40]].all()
    assert backbone.tokenizer.decode([40, 41]) == backbone.tokenizer.decode([41])
    for end in (VOCABULARY, -1):
        model.generation_config.eos_token_id = [2, end]
        with pytest.raises(ConfigError, match=f"^expected ends of a text among {VOCABULARY} ids, got {end}"):
            TransformersBackbone(model, tiny_tokenizer())


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_model_of_the_library_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    told = r"^expected a model of the transformers library, got a PeftModel: its unload\(\) gives one$"
    with pytest.raises(ConfigError, match=told):
        TransformersBackbone(wrapped, tiny_tokenizer())
    assert TransformersBackbone(wrapped.unload(), tiny_tokenizer()).fingerprint() == tiny_backbone().fingerprint()
    path: Any = "models/tiny"
    with pytest.raises(ConfigError, match=r"^expected a model of the transformers library, got 'models/tiny'$"):
        TransformersBackbone(path, tiny_tokenizer())
    for tokenizer, kind in ((None, "NoneType"), (ByteTokenizer(), "ByteTokenizer")):
        with pytest.raises(ConfigError, match=f"^expected a fast tokenizer, got {kind}$"):
            TransformersBackbone(tiny_model(), tokenizer)


def test_a_model_of_nan_is_said() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[3, 4] = torch.nan
    with pytest.raises(ConfigError, match=r"^expected a model whose logits are numbers, got LlamaForCausalLM, .* NaN$"):
        TransformersBackbone(model, tiny_tokenizer())


def test_a_model_that_does_not_run_is_said() -> None:
    model = tiny_model()
    model.get_submodule("model.layers.2.mlp.up_proj").float()  # a matrix that the inputs do not fit
    told = r"^expected a model that runs in torch.float64 on cpu, got LlamaForCausalLM: .*"
    with pytest.raises(ConfigError, match=told) as raised:
        TransformersBackbone(model, tiny_tokenizer())
    assert "\n" not in str(raised.value)


def test_a_head_that_reads_more_than_the_blocks_give_is_said() -> None:
    sizes = {"ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, **sizes)
    ).eval()
    with pytest.raises(ConfigError, match=r"^expected a model whose head reads its blocks alone, got OPTForCausalLM"):
        TransformersBackbone(model, tiny_tokenizer())


def test_blocks_that_cannot_be_found_are_said() -> None:
    model = tiny_model()
    inner: Any = model.base_model
    inner.layers = nn.ModuleList([nn.Sequential(*inner.layers)])
    with pytest.raises(ConfigError, match=r"^expected a model with a list of its 4 blocks, got LlamaForCausalLM"):
        TransformersBackbone(model, tiny_tokenizer())
    model.config.num_hidden_layers, inner.layers = 0, nn.ModuleList()
    with pytest.raises(ConfigError, match=r"^expected a model with a list of its 0 blocks, got LlamaForCausalLM"):
        TransformersBackbone(model, tiny_tokenizer())


class Bytes(nn.Module):
    """A linear layer in whole numbers, as libraries of quantised models make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).to(x.dtype).T


class Uneven(Bytes):
    """Rounds more where it is given many tokens, as those of bitsandbytes do on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16).to(x.dtype) if x.shape[-2] > 8 else x)


def quantised(model: PreTrainedModel, layer: type[Bytes] = Bytes) -> PreTrainedModel:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer(module))
    return model


def test_a_quantised_model_takes_low_rank_deltas_and_no_singular_values() -> None:
    backbone = TransformersBackbone(quantised(tiny_model()), tiny_tokenizer())
    assert backbone.adaptable().keys() == tiny_backbone().adaptable().keys()
    name, ids = next(iter(backbone.adaptable())), torch.arange(3, 13)[None]
    generator = torch.Generator().manual_seed(0)
    up, down, c = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in [(32, 2), (2, 32), (2,)])
    module = backbone.model.get_submodule(name)
    with torch.no_grad():
        said = backbone.open(1, 10, Adaptation({}, {name: Delta(up, down, c)})).read(ids).after
        wide = nn.Linear(32, 32, bias=False, dtype=torch.float64)
        wide.weight.copy_(module.weight * module.scale + up @ torch.diag(c) @ down)  # type: ignore[operator]
        backbone.model.set_submodule(name, wide)
        plain = backbone.model(ids).logits[:, -1:].log_softmax(-1)
    torch.testing.assert_close(said, plain, rtol=0, atol=1e-10)
    other = TransformersBackbone(quantised(tiny_model()), tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"^expected a matrix of numbers for singular values, got a Bytes"):
        other.open(1, 10, Adaptation({name: torch.full((32,), 1.1)}))


def test_scales_of_ones_add_nothing_but_can_be_trained() -> None:
    backbone = tiny_backbone()
    ones = {name: torch.ones(rank, dtype=torch.float64) for name, rank in backbone.adaptable().items()}
    assert backbone.deltas(Adaptation(ones)) == {}
    scales = {name: z.requires_grad_() for name, z in ones.items()}
    backbone.score(torch.arange(3, 13)[None], None, Adaptation(scales))[:, 1:].sum().backward()
    assert all(z.grad is not None and z.grad.abs().sum() > 0 for z in scales.values())


def test_only_a_quantised_model_may_round_by_the_number_of_tokens() -> None:
    model = quantised(tiny_model(), Uneven)
    with pytest.raises(ConfigError, match=r"^expected a model that says the same of a token whatever follows it"):
        TransformersBackbone(model, tiny_tokenizer())
    model.is_quantized = True  # as transformers marks what it has quantised
    backbone = TransformersBackbone(model, tiny_tokenizer())
    assert (backbone.continues, backbone.cuts) == (True, True)


def test_a_cast_model_keeps_its_fingerprint_until_a_weight_changes() -> None:
    backbone = tiny_backbone(dtype=torch.float32)
    before = backbone.fingerprint()
    cast = backbone.cast(torch.bfloat16)
    assert (cast.dtype, cast.loaded_dtype, cast.fingerprint()) == (torch.bfloat16, torch.float32, before)
    with torch.no_grad():
        cast.model.get_input_embeddings().weight.mul_(2)
    assert cast.fingerprint() != before


def test_factors_follow_the_weights() -> None:
    backbone = tiny_backbone()
    name = next(iter(backbone.adaptable()))
    values = backbone.factors(name)[1]
    with torch.no_grad():
        backbone.model.get_submodule(name).weight.mul_(2)
    torch.testing.assert_close(backbone.factors(name)[1], 2 * values)


def test_scales_near_one_are_told_from_one_in_half_precision() -> None:
    """Blend weights, and so scales, are float32 where the model is bfloat16."""
    backbone = tiny_backbone(dtype=torch.bfloat16)
    assert backbone.weights_dtype == torch.float32
    name, rank = next(iter(backbone.adaptable().items()))
    (delta,) = backbone.deltas(Adaptation({name: torch.full((rank,), 1.001)})).values()
    torch.testing.assert_close(delta.c, (backbone.factors(name)[1] * 0.001).to(delta.c.dtype), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_no_row_reads_more_than_the_model_can(kind: str) -> None:
    """Whatever was reserved, and however it was joined; a shorter row beside it may read on."""
    backbone = tiny_backbone(kind)
    backbone.model.config.max_position_embeddings = 16
    ids, long, short = torch.arange(3, 19)[None], backbone.open(1, 10), backbone.open(1, 16)
    long.read(ids[:, :9])
    long.reserve(40)
    for _ in range(2):
        with pytest.raises(CacheFullError, match="at most 16 tokens, as the model can read, got 17"):
            long.read(ids[:, :8])
    long.read(ids[:, :6])
    short.read(ids[:, :3])
    long.join(short)
    long.read(ids[:, :1].expand(2, -1))
    assert long.lengths.tolist() == [16, 4]
    with pytest.raises(CacheFullError, match="as the model can read, got 17"):
        long.read(ids[:, :1].expand(2, -1))
    other = long.select([1])
    alone = torch.cat([ids[:, :3], ids[:, :1], ids[:, :10]], 1)
    expected = backbone.open(1, 16).read(alone).after
    torch.testing.assert_close(other.read(ids[:, :10]).after, expected)


def test_more_than_the_model_can_read_is_refused() -> None:
    backbone = tiny_backbone()
    for read in (lambda: backbone.open(1, 513), lambda: backbone.score(torch.ones(1, 513, dtype=torch.long))):
        with pytest.raises(CacheFullError, match="expected at most 512 tokens, as the model can read, got 513"):
            read()
