"""Weights by layer run as the model whose layers are blended so; equal layers are ordinary weights. Scores, fits and
foreign prompts go by layer, too; what does not fit is refused."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.few_shot.answers import AnswerLikelihood
from bayes_dispatch.inference.few_shot.layered import LayeredMean, LayeredPredictive
from bayes_dispatch.inference.few_shot.methods import ImportanceSampling
from bayes_dispatch.inference.few_shot.program import FewShotFit, FewShotProgram
from bayes_dispatch.inference.few_shot.strategies import Given
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.scoring.compare import compare_blends, score_together
from bayes_dispatch.inference.two_pass.blends import FixedWeights, Particles, PosteriorMean, PosteriorPredictive
from bayes_dispatch.inference.two_pass.first_pass import read_prefix
from bayes_dispatch.inference.two_pass.readers import CachedReader, UncachedReader, straight
from bayes_dispatch.inference.two_pass.second_pass import on_base
from bayes_dispatch.inference.two_pass.system import cut_of
from bayes_dispatch.model.backbone import padded

PROMPTS = ["kfpa>apfk\nbcde>", "9", "37+58=95\n12+11="]
DOCUMENTS = [Document("ab>ba\ncd>dc\n", 6), Document("1+2=3\n4+4=8\n", 6)]


def fit_of(system: Bundle, draws: int = 6, seed: int = 0, together: bool = False) -> FewShotFit:
    """A fit of random weights: shared ones, and each layer's; ``together``: the same in every layer."""
    program = FewShotProgram(AnswerLikelihood(system.model, system.experts, [("a", "b")]), coupling=20.0)
    rng = np.random.default_rng(seed)
    state = rng.dirichlet(np.ones(4), (draws, program.rows))
    if together:
        state[:] = state[:, :1]
    return FewShotFit.of(program, torch.from_numpy(state), 0)


@pytest.fixture(params=["bundle64", "cut64", "embedded64"])
def system(request: pytest.FixtureRequest) -> Bundle:
    made: Bundle = request.getfixturevalue(request.param)
    return made


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("blend", [LayeredMean, lambda fit: LayeredPredictive(fit, 5, merge=0.0)])
def test_generation_is_that_of_the_slow_reader(system: Bundle, blend: Callable[[FewShotFit], Any]) -> None:
    generator = TwoPassGenerator(system)
    given: dict[str, Any] = {"blend": blend(fit_of(system)), "max_new_tokens": 5, "do_sample": True, "seed": 1}
    fast, slow = (generator.generate(PROMPTS, **given, use_cache=cached) for cached in (True, False))
    np.testing.assert_array_equal(fast.token_ids, slow.token_ids)
    for name in ("log_probabilities", "predictive_entropy", "mutual_information", "weights"):
        np.testing.assert_allclose(getattr(fast, name), getattr(slow, name), rtol=0, atol=1e-8)


@settings(max_examples=10, deadline=None)
@given(prompts=st.integers(1, 3), particles=st.integers(1, 3), copies=st.booleans(), seed=st.integers(0, 999))
def test_readers_run_each_layer_under_its_own_weights(
    cut64: Bundle, prompts: int, particles: int, copies: bool, seed: int
) -> None:
    """Both readers, row by row against the whole model; then a step, and one after some were dropped."""
    rng, bank, model = np.random.default_rng(seed), cut64.experts, cut64.model
    layers = rng.dirichlet(np.ones(4), (prompts, particles, len(bank.layers)))
    if copies:
        layers[:] = layers[:1, :1]
    mass = np.full((prompts, particles), 1 / particles)
    given = Particles(layers.mean(2), mass, layers=layers)
    texts = [text.encode() for text in PROMPTS[:prompts]]
    rows = [[256, *text] for text in texts]
    prefix = read_prefix(model, cut_of(cut64), rows, 257, 30)
    readers = [
        CachedReader(model, bank, given, prefix, range(prompts), 30),
        UncachedReader(model, bank, given, *padded(rows, 257)),
    ]
    token = torch.from_numpy(rng.integers(0, 256, prompts))
    with torch.no_grad():
        both = (
            (next(straight(reader.read_prompts(own=False)).after)[:, :, 0], reader.read(token)) for reader in readers
        )
        ends, more = zip(*both, strict=True)
        for n, text in enumerate(texts):
            for s in range(particles):
                adaptation = bank.blend_by_layer(torch.from_numpy(layers[n, s]))
                whole = model(torch.tensor([[256, *text, int(token[n])]]), adaptation=adaptation).logits.log_softmax(-1)
                for end, step in zip(ends, more, strict=True):
                    torch.testing.assert_close(end[n, s], whole[0, -2], rtol=0, atol=1e-10)
                    torch.testing.assert_close(step[n, s], whole[0, -1], rtol=0, atol=1e-10)
        for reader in readers:
            reader.keep([prompts - 1], [[particles - 1]])
        last = [reader.read(token[:1]) for reader in readers]
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=1e-10)


@pytest.mark.usefixtures("unchecked")
def test_equal_layers_are_ordinary_weights(system: Bundle) -> None:
    generator, fit = TwoPassGenerator(system), fit_of(system, together=True)
    given: dict[str, Any] = {"max_new_tokens": 4, "seed": 2}
    mean = FixedWeights(tuple(fit.state[:, 0].mean(0).tolist()))
    one, other = (generator.generate(PROMPTS, blend=blend, **given) for blend in (LayeredMean(fit), mean))
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, rtol=0, atol=1e-8)
    np.testing.assert_allclose(one.weights, other.weights, rtol=0, atol=1e-12)


def test_layers_matter_and_what_is_told_is_shared(bundle64: Bundle) -> None:
    fit = fit_of(bundle64)
    posterior = Given(np.full(4, 0.25)).posterior(bundle64, PROMPTS, 0)
    particles = LayeredPredictive(fit, 4).particles(posterior)
    np.testing.assert_allclose(particles.weights, np.tile(fit.state[:4, 0], (3, 1, 1)))
    np.testing.assert_allclose(particles.run, np.tile(fit.state[:4, 1:], (3, 1, 1, 1)))
    chosen = particles.select(np.array([1]))
    assert (chosen.weights.shape, chosen.run.shape) == ((1, 4, 4), (1, 4, 3, 4))
    generator = TwoPassGenerator(bundle64)
    layered, shared = (
        generator.generate(PROMPTS[:1], blend=blend, max_new_tokens=3, seed=0)
        for blend in (LayeredMean(fit), FixedWeights(tuple(fit.state[:, 0].mean(0).tolist())))
    )
    np.testing.assert_allclose(layered.weights, shared.weights, atol=1e-12)
    assert not np.allclose(layered.log_probabilities, shared.log_probabilities, atol=1e-3)


def test_scores_are_those_of_the_explicit_filter(
    bundle64: Bundle, explicit_filter: Callable[..., SimpleNamespace]
) -> None:
    """Beside blends of one set of weights, whose scores stay as they are."""
    fit = fit_of(bundle64)
    layered = LayeredPredictive(fit, 5, (0.05, 0.001), merge=0.0)
    scores = compare_blends(bundle64, DOCUMENTS, [layered, PosteriorMean()], seed=3).scores
    by_layer = SimpleNamespace(blend=bundle64.experts.blend_by_layer)
    for n, document in enumerate(DOCUMENTS):
        (found,) = (score for score in scores if score.document == n and score.blend == layered.name)
        exact: Any = explicit_filter(
            bundle64.model, by_layer, document.data, fit.state[:5, 1:], np.full(5, 0.2), (0.05, 0.001)
        )
        places = [i for a, b in document.ranges for i in range(a, b)]
        expected = -np.mean([exact.log_p[i, document.data[i]] for i in places])
        np.testing.assert_allclose(found.nll, expected, atol=1e-9)
        np.testing.assert_allclose(found.mutual_information, exact.information[places].mean(), atol=1e-9)
    alone = compare_blends(bundle64, DOCUMENTS, [PosteriorMean()], seed=3).scores
    beside = [score for score in scores if score.blend == PosteriorMean().name]
    np.testing.assert_allclose([s.nll for s in beside], [s.nll for s in alone], rtol=0, atol=1e-10)


def test_a_refined_mean_beside_weights_by_layer(bundle64: Bundle) -> None:
    posterior = Given(np.full(4, 0.25)).posterior(bundle64, ["a", "b"], 0)
    refined = replace(PosteriorPredictive(1, merge=0.0).particles(posterior), refined=True)
    layered = LayeredMean(fit_of(bundle64)).particles(posterior)
    both = score_together(bundle64.model, bundle64.experts, DOCUMENTS, {"refined": refined, "layered": layered})
    alone = score_together(bundle64.model, bundle64.experts, DOCUMENTS, {"refined": refined})
    np.testing.assert_allclose([s.nll for s in both["refined"]], [s.nll for s in alone["refined"]], atol=1e-10)


def test_a_fit_generates(bundle64: Bundle) -> None:
    """From answers to text: the inferred weights by layer explain the answers as the likelihood says."""
    pairs = [("kfpa>", "apfk\n"), ("dcba>", "abcd\n")]
    likelihood = AnswerLikelihood(bundle64.model, bundle64.experts, pairs)
    fit = ImportanceSampling(proposals=32, draws=8).infer(FewShotProgram(likelihood, coupling=10.0), seed=0)
    document = Document("kfpa>apfk\n", 5)
    scores = compare_blends(bundle64, [document], [LayeredMean(fit)], seed=0).scores
    with torch.no_grad():
        each = likelihood.by_pair(torch.from_numpy(fit.state[:, 1:].mean(0))[None])
    np.testing.assert_allclose(-scores[0].nll * 5, float(each[0, 0]), rtol=1e-9)


def test_foreign_prompts_are_left_to_base_in_every_layer(bundle64: Bundle) -> None:
    posterior = Given(np.full(4, 0.25)).posterior(bundle64, PROMPTS, 0)
    found = on_base(LayeredMean(fit_of(bundle64)).particles(posterior), np.array([False, True, False]))
    assert found.layers is not None
    np.testing.assert_array_equal(found.layers[1, 0], np.tile([0, 0, 0, 1], (3, 1)))
    np.testing.assert_array_equal(found.weights[1, 0], [0, 0, 0, 1])
    assert (found.layers[0] < 1).all()


def test_what_does_not_fit_is_refused(bundle64: Bundle, cut64: Bundle) -> None:
    fit, posterior = fit_of(bundle64), Given(np.full(4, 0.25)).posterior(bundle64, ["a"], 0)
    shared = FewShotFit(fit.state[:, :1], fit.posterior, None, None, 0)
    for blend in (LayeredMean, LayeredPredictive):
        with pytest.raises(ConfigError, match=r"expected a fit with weights by layer .* got one set for all"):
            blend(shared)
    with pytest.raises(ConfigError, match="expected a fit of at least 7 draws, got 6"):
        LayeredPredictive(fit, 7)
    with pytest.raises(ConfigError, match="a switching rate to be"):
        LayeredPredictive(fit, 2, switching=(2.0,))
    with pytest.raises(ConfigError, match="expected a fit over"):
        LayeredMean(fit).particles(replace(posterior, experts=("x", "y", "z", "base")))
    with pytest.raises(ConfigError, match="the same weights in every layer to refine"):
        replace(LayeredMean(fit).particles(posterior), refined=True)
    with pytest.raises(TensorError, match=r"expected weights of shape \(2, 4\) or \(B, 2, 4\), got \(3, 4\)"):
        TwoPassGenerator(cut64).generate(["a"], blend=LayeredMean(fit), max_new_tokens=1, seed=0)
    with pytest.raises(ConfigError, match="expected a blend of one set of weights for a chat, got layered_mean"):
        TwoPassGenerator(bundle64).chat(blend=LayeredMean(fit)).say("a", 1)
