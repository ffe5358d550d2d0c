"""What saves memory or time in training changes no result (checkpointing, compiling), or by as much as it says
(bfloat16). A run goes on in its own precision; what the machine lacks is refused."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig, StateSpaceKind
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.pretraining.corpus import TextCorpus
from bayes_dispatch.model.pretraining.run import (
    ComputeSettings,
    PretrainingSettings,
    next_token_loss,
    pack_rows,
    pretrain,
)
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.storage import read_tensors
from tests.model.tensors import assert_same

CONFIG = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)
SETTINGS = PretrainingSettings(steps=8, batch_size=4, length=24, warmup=4, checkpoint_every=3, seed=3)
CORPUS = TextCorpus((b"a man a plan a canal panama, or so they say who have seen it.", b"to be or not"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> MambaFormerForCausalLM:
    """Trained as is: in float32 on the CPU."""
    return pretrain(CONFIG, CORPUS, SETTINGS, tmp_path_factory.mktemp("plain"), progress=False)


@contextmanager
def saved() -> Iterator[dict[int, int]]:
    """Bytes of each storage that is kept for the backward pass, by its address."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def loss(model: MambaFormerForCausalLM) -> Tensor:
    ids, weights = pack_rows([(text, [1.0] * len(text)) for text in CORPUS.documents], ByteTokenizer())
    return next_token_loss(model(ids).logits, ids, weights) / weights.sum()


@pytest.mark.parametrize("mixer", get_args(StateSpaceKind))
def test_checkpointed_gradients_are_the_same_and_keep_less(
    make_model: Callable[..., MambaFormerForCausalLM], mixer: StateSpaceKind
) -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = make_model(replace(CONFIG.backbone, n_pairs=3, mixer=mixer), dtype=torch.float64).train()
        model.gradient_checkpointing = checkpointing
        with saved() as sizes:
            value = loss(model)
        kept.append(sum(sizes.values()))
        value.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12, msg=name)
    assert kept[1] < kept[0] / 4


def test_training_with_gradient_checkpointing(plain: MambaFormerForCausalLM, tmp_path: Path) -> None:
    kept = []
    for checkpointing in (False, True):
        compute = ComputeSettings(gradient_checkpointing=checkpointing)
        with saved() as sizes:
            model = pretrain(
                *(CONFIG, CORPUS, replace(SETTINGS, steps=1, warmup=1), tmp_path / str(checkpointing)),
                progress=False,
                compute=compute,
            )
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2
    assert not model.gradient_checkpointing
    compute = ComputeSettings(gradient_checkpointing=True)
    assert_same(pretrain(CONFIG, CORPUS, SETTINGS, tmp_path / "c", progress=False, compute=compute), plain)


def test_bfloat16_rounds_products_but_neither_loss_nor_weights(
    plain: MambaFormerForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = set()

    def recorded(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dtypes.add(logits.dtype)
        return next_token_loss(logits, ids, weights)

    monkeypatch.setattr("bayes_dispatch.model.pretraining.run.next_token_loss", recorded)
    model = pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, progress=False, compute=ComputeSettings(precision="bfloat16"))
    assert dtypes == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tensors, _ = read_tensors(tmp_path / "pretraining.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not torch.equal(model.embedding.weight, model.embedding.weight.bfloat16().float())
    with torch.no_grad():
        rounded, exact, untrained = (float(loss(m)) for m in (model, plain, MambaFormerForCausalLM(CONFIG)))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)
    assert exact < untrained - 0.3


@pytest.mark.parametrize("mixer", get_args(StateSpaceKind))
def test_bfloat16_is_near_float32(make_model: Callable[..., MambaFormerForCausalLM], mixer: StateSpaceKind) -> None:
    """Loss to 1%, gradients to 5% of each one's norm, at weights that are not small."""
    model = make_model(replace(CONFIG.backbone, mixer=mixer)).train()
    exact = loss(model)
    exact.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.tensor([[256, 97]])).logits
        rounded = loss(model)
    assert logits.dtype == torch.bfloat16
    rounded.backward()
    assert float(rounded.detach()) == pytest.approx(float(exact.detach()), rel=0.01)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        difference = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert difference < 0.05, f"{name}: {difference:.3f}"


def test_a_run_goes_on_in_its_own_precision_on_any_machine(plain: MambaFormerForCausalLM, tmp_path: Path) -> None:
    pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, progress=False)
    other = ComputeSettings(gradient_checkpointing=True)
    assert_same(pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, progress=False, compute=other), plain)
    with pytest.raises(ConfigError, match="expected a checkpoint of these settings"):
        pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, progress=False, compute=ComputeSettings(precision="bfloat16"))


def test_what_the_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="expected a C\\+\\+ compiler for compile, got no no-such-compiler"):
        pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, progress=False, compute=ComputeSettings(compile=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="expected a GPU that torch can use for device 'cuda', got none"):
        pretrain(CONFIG, CORPUS, SETTINGS, tmp_path, progress=False, compute=ComputeSettings(device="cuda"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unchecked")
def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="expected device to be one of cpu, cuda, got 'tpu'"):
        ComputeSettings(device="tpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected precision to be one of float32, bfloat16, got 'float16'"):
        ComputeSettings(precision="float16")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_compiled_training_is_the_same_to_rounding(plain: MambaFormerForCausalLM, tmp_path: Path) -> None:
    """In a process without the tests' type checks, which torch.compile cannot read."""
    script = tmp_path / "compiled.py"
    script.write_text(
        f"""
import sys
from pathlib import Path
import torch._dynamo.utils
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.pretraining.run import ComputeSettings, PretrainingSettings, pretrain
from bayes_dispatch.model.pretraining.corpus import TextCorpus

config = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)
compute = ComputeSettings(compile=True)
pretrain(config, {CORPUS!r}, {SETTINGS!r}, Path(sys.argv[1]), progress=False, compute=compute)
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 6  # two parts of a Mamba block, and attention: not one for each length
    compiled = pretrain(CONFIG, CORPUS, SETTINGS, tmp_path / "run", progress=False, compute=ComputeSettings())
    assert_same(compiled, plain, rtol=1e-3, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same(compiled, plain)
