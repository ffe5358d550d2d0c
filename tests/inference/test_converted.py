"""A converted hybrid is a backbone as any other: experts of both kinds are trained on it, dispatched and blended."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.experts.training import ExpertSettings, train_expert
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import Blend, PosteriorMean, PosteriorPredictive
from tests.tiny import tiny_converted

TEXTS = ["ab>ba\ncd>", "1+2=3\n4+", "a"]


@pytest.mark.parametrize("blend", [PosteriorMean(), PosteriorPredictive(4)], ids=lambda blend: blend.name)
def test_blends_of_both_kinds_of_experts(hybrid64: SimpleNamespace, blend: Blend) -> None:
    """Cached is uncached, and a batch is one prompt after the other."""
    generator = TwoPassGenerator(hybrid64)
    cached = generator.generate(TEXTS, blend=blend, max_new_tokens=5, seed=0)
    uncached = generator.generate(TEXTS, blend=blend, max_new_tokens=5, seed=0, use_cache=False)
    alone = [generator.generate([text], blend=blend, max_new_tokens=5, seed=0) for text in TEXTS]
    np.testing.assert_array_equal(cached.token_ids, uncached.token_ids)
    np.testing.assert_allclose(cached.log_probabilities, uncached.log_probabilities, atol=1e-9)
    for n, one in enumerate(alone):
        np.testing.assert_array_equal(one.token_ids[0], cached.token_ids[n])
        np.testing.assert_allclose(one.log_probabilities[0], cached.log_probabilities[n], atol=1e-9)
    weights = cached.posterior.weights
    assert weights.std(0).max() > 0.01
    assert len({tuple(row) for row in cached.token_ids.tolist()}) > 1


@pytest.mark.parametrize("kind", ["svf", "lora"])
def test_experts_are_trained(kind: str) -> None:
    """MLPs among what they adapt; the model stays as it is."""
    model = tiny_converted("bamba", torch.float32)
    before = model.fingerprint()
    domain = next(each for each in CONVENTIONS if each.name == "sort")
    settings = ExpertSettings(kind=kind, steps=3, batch_size=2, length=32, **({"rank": 2} if kind == "lora" else {}))
    expert = train_expert(model, domain, settings, progress=False)
    assert expert.matrices.keys() == model.adaptable().keys()
    assert model.fingerprint() == before == expert.base
    bank = ExpertBank([expert])
    ids = torch.tensor([[1, 40, 50, 60]])
    with torch.no_grad():
        adapted = model(ids, adaptation=bank.blend(torch.tensor([1.0, 0.0]))).logits
        base = model(ids, adaptation=bank.blend(torch.tensor([0.0, 1.0]))).logits
        assert torch.equal(base, model(ids).logits)
        assert not torch.allclose(adapted, base, atol=1e-5)
