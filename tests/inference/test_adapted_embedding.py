"""Both passes with experts of the embedding: the first is unadapted, the second reads each particle's own. Generation
and few-shot weights by layer are those of a slow reader."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.few_shot.answers import AnswerLikelihood
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import (
    BestExpert,
    Blend,
    FixedWeights,
    Particles,
    PosteriorMean,
    PosteriorPredictive,
    RefinedMean,
    ThompsonSample,
    TopK,
)
from bayes_dispatch.inference.two_pass.first_pass import first_pass, read_prefix
from bayes_dispatch.inference.two_pass.readers import CachedReader, straight
from bayes_dispatch.inference.two_pass.system import cut_of, dispatch

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

PROMPTS = ["kfpa>apfk\nbcde>", "9", "37+58=95\n12+11=23\n44+44=", "9"]
BLENDS: list[Blend] = [
    BestExpert(),
    TopK(2),
    PosteriorMean(),
    ThompsonSample(),
    FixedWeights((0.2, 0.5, 0.0, 0.3)),
    RefinedMean(6),
    PosteriorPredictive(6, merge=0.0),
]


def rebuilt(model: "MambaFormerForCausalLM", bank: ExpertBank, weights: torch.Tensor) -> "MambaFormerForCausalLM":
    """A copy whose stored matrices, the embedding among them, are the weighted means of the experts'."""
    made = copy.deepcopy(model)
    for name in bank.matrices:
        weight = made.get_submodule(name).weight
        U, s, Vt = np.linalg.svd(weight.detach().numpy(), full_matrices=False)
        each = [*(expert.scales[name].double().numpy() for expert in bank.values()), np.ones(len(s))]
        matrices = [torch.from_numpy(U @ np.diag(s * z) @ Vt) for z in each]
        weight.data = sum(w * matrix for w, matrix in zip(weights, matrices, strict=True))
    return made


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("blend", BLENDS, ids=repr)
def test_generation_is_that_of_the_slow_reader(embedded64: Bundle, blend: Blend) -> None:
    generator = TwoPassGenerator(embedded64)
    given: dict[str, Any] = {"blend": blend, "max_new_tokens": 5, "do_sample": True, "temperature": 2.0, "seed": 1}
    fast, slow = (generator.generate(PROMPTS, **given, use_cache=cached) for cached in (True, False))
    np.testing.assert_array_equal(fast.token_ids, slow.token_ids)
    for name in ("log_probabilities", "predictive_entropy", "mutual_information", "weights"):
        np.testing.assert_allclose(getattr(fast, name), getattr(slow, name), rtol=0, atol=1e-8)
    np.testing.assert_allclose(fast.posterior.weights, slow.posterior.weights, rtol=0, atol=1e-12)


def test_the_first_pass_is_unadapted(embedded64: Bundle, bundle64: Bundle) -> None:
    """Its evidence, and so the posterior, is that of any experts of the same model; nothing is shared below."""
    assert embedded64.experts.adapt_from == cut_of(embedded64) == 0
    (posterior, evidence), (plain, of_plain) = (dispatch(system, PROMPTS, 2) for system in (embedded64, bundle64))
    for name, view in first_pass(embedded64.model, embedded64.tokenizer, PROMPTS).evidence.views.items():
        np.testing.assert_array_equal(evidence.views[name], of_plain.views[name])
        np.testing.assert_allclose(evidence.views[name], view, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(posterior.weights, plain.weights)
    prefix = read_prefix(embedded64.model, cut_of(embedded64), [[256, 97, 98]], 257, 8)
    assert prefix.x is None
    assert prefix.below is None


@pytest.mark.parametrize("tied", [True, False])
def test_particles_read_their_own_embedding(make_model: Any, embedded64: Bundle, tied: bool) -> None:
    """Each is a model whose matrices are the mean of the experts', under the weights of the particle."""
    model = make_model(dtype=torch.float64, tie_embeddings=tied)
    bank = ExpertBank([ExpertVector(e.name, dict(e.scales), model.fingerprint()) for e in embedded64.experts.values()])
    system = Bundle(model, bank, embedded64.dispatcher)
    weights = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 3))
    texts = [b"kf>fk\nb", b"1+2=3"]
    prefix = read_prefix(model, cut_of(system), [[256, *text] for text in texts], 257, 12)
    reader = CachedReader(model, bank, Particles(weights, np.full((2, 3), 1 / 3)), prefix, [0, 1], 12)
    with torch.no_grad():
        straight(reader.read_prompts(own=False))
        found = reader.read(torch.tensor([97, 50]))
        for n, text in enumerate(texts):
            ids = torch.tensor([[256, *text, (97, 50)[n]]])
            for s in range(3):
                expected = rebuilt(model, bank, torch.tensor(weights[n, s]))(ids).logits[0, -1].log_softmax(-1)
                torch.testing.assert_close(found[n, s], expected, rtol=0, atol=1e-10)


def test_few_shot_weights_of_layers_have_one_for_the_embedding(embedded64: Bundle) -> None:
    likelihood = AnswerLikelihood(embedded64.model, embedded64.experts, [("kfpa>", "apfk\n"), ("1", "2")])
    assert likelihood.layers == ("blocks.0", "blocks.1", "blocks.2", "embedding")
    weights = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(4), (2, 4)))
    weights.requires_grad_()
    found = likelihood(weights)
    (gradient,) = torch.autograd.grad(found.sum(), weights)
    assert bool(gradient.ne(0).any(-1).all())
    shared = weights[:, :1].expand(-1, 4, -1)
    torch.testing.assert_close(likelihood(shared), likelihood(weights[:, 0]), rtol=1e-12, atol=1e-10)
    for name in ("blocks.0", "embedding"):
        other = weights.detach().clone()
        other[:, likelihood.layers.index(name)] = torch.tensor([0.0, 0.0, 0.0, 1.0]).double()
        assert not torch.allclose(likelihood(other), found)
