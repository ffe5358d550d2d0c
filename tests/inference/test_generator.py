"""Cached and uncached, in a batch and one by one, generation is the same for every blend; its numbers are those of
the filter written out. A vertex is the model under that expert, seeds decide, foreign parts are refused."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, ForeignExpertError, NotFittedError, PromptError
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass import second_pass as second_pass_module
from bayes_dispatch.inference.two_pass.blends import (
    Blend,
    FixedWeights,
    PosteriorMean,
    PosteriorPredictive,
    RefinedMean,
    ThompsonSample,
    TopK,
)
from bayes_dispatch.inference.two_pass.generation import Generation
from bayes_dispatch.model.mambaformer import blocks as blocks_module

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle

PROMPTS = ["kfpa>apfk\nbcde>", "9", "37+58=95\n12+11=23\n44+44="]
EVERY: list[Blend] = [
    PosteriorMean(),  # as any other of one particle
    PosteriorPredictive(3, merge=0.0),
    PosteriorPredictive(6, merge=0.0),
    PosteriorPredictive(6, switching=(0.0,), flat=0.0, merge=0.0),
    RefinedMean(6),
]
every_blend = pytest.mark.parametrize("blend", EVERY, ids=repr)
fast = pytest.mark.usefixtures("unchecked")  # the other tests here, and test_bundle, check the shapes


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read in several parts, of which short ones lack the last."""
    monkeypatch.setattr(blocks_module, "PIECE", 8)


def assert_same(a: Generation, b: Generation, rows: slice = slice(None)) -> None:
    """Token by token, and every number to rounding of float64; ``rows`` are those of ``b``."""
    np.testing.assert_array_equal(a.token_ids, b.token_ids[rows])
    assert a.texts == b.texts[rows]
    for name in ("log_probabilities", "predictive_entropy", "mutual_information", "weights"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name)[rows], rtol=0, atol=1e-8, err_msg=name)


@fast
@every_blend
@pytest.mark.usefixtures("short_chunks")
def test_cached_is_uncached_is_one_by_one(bundle64: "Bundle", blend: Blend) -> None:
    generator = TwoPassGenerator(bundle64)
    cached = generator.generate(PROMPTS, blend=blend, max_new_tokens=5, seed=1)
    assert cached.token_ids.shape == (3, 5)
    assert_same(generator.generate(PROMPTS, blend=blend, max_new_tokens=5, seed=1, use_cache=False), cached)
    for i, prompt in enumerate(PROMPTS):
        alone = generator.generate([prompt], blend=blend, max_new_tokens=5, seed=1)
        assert_same(alone, cached, slice(i, i + 1))


@fast
def test_sampling_too(bundle64: "Bundle") -> None:
    generator = TwoPassGenerator(bundle64)
    given: dict[str, Any] = {
        "blend": PosteriorPredictive(6, merge=0.0),
        "max_new_tokens": 8,
        "do_sample": True,
        "temperature": 1.5,
    }
    cached = generator.generate(PROMPTS, **given, seed=1)
    assert_same(generator.generate(PROMPTS, **given, seed=1, use_cache=False), cached)
    for i, prompt in enumerate(PROMPTS):
        assert_same(generator.generate([prompt], **given, seed=1), cached, slice(i, i + 1))
    assert not np.array_equal(generator.generate(PROMPTS, **given, seed=2).token_ids, cached.token_ids)
    assert not np.array_equal(
        generator.generate(PROMPTS, **given).token_ids, generator.generate(PROMPTS, **given).token_ids
    )


def test_prompts_longer_than_a_chunk(bundle64: "Bundle", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "PIECE", 256)
    blend = PosteriorPredictive(5, merge=0.0)
    prompts = ["37+58=95\n" * 32, "bcde>", "abcd>dcba\n" * 26]
    assert [len(prompt) // blocks_module.PIECE for prompt in prompts] == [1, 0, 1]
    generator = TwoPassGenerator(bundle64)
    cached = generator.generate(prompts, blend=blend, max_new_tokens=2, seed=0)
    assert_same(generator.generate(prompts, blend=blend, max_new_tokens=2, seed=0, use_cache=False), cached)
    assert_same(generator.generate(prompts[:1], blend=blend, max_new_tokens=2, seed=0), cached, slice(0, 1))


@fast
@pytest.mark.parametrize("blend", [EVERY[0], EVERY[2]], ids=repr)
@pytest.mark.usefixtures("short_chunks")
def test_float32_parts_only_where_logits_tie(bundle: "Bundle", blend: Blend) -> None:
    """Where two runs first differ, the two best tokens are within 1e-3 of each other; before, all agrees."""
    generator = TwoPassGenerator(bundle)
    cached = generator.generate(PROMPTS, blend=blend, max_new_tokens=8, seed=1)
    others = [generator.generate(PROMPTS, blend=blend, max_new_tokens=8, seed=1, use_cache=False)]
    others.extend(generator.generate([prompt], blend=blend, max_new_tokens=8, seed=1) for prompt in PROMPTS)
    pairs = [(others[0], i, i) for i in range(3)] + [(other, 0, i) for i, other in enumerate(others[1:])]
    agreed = 0
    for other, row, i in pairs:
        same = other.token_ids[row] == cached.token_ids[i]
        until = 8 if same.all() else int(same.argmin())
        agreed += until
        ours, theirs = cached.log_probabilities[i], other.log_probabilities[row]
        np.testing.assert_allclose(ours[:until], theirs[:until], rtol=0, atol=1e-3)
        if until < 8:
            assert abs(ours[until] - theirs[until]) < 1e-3
    assert agreed > 30  # of 48


@pytest.mark.parametrize("rows", [1, 12])
def test_the_number_of_rows_at_once_does_not_matter(
    bundle64: "Bundle", monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    generator = TwoPassGenerator(bundle64)
    given: dict[str, Any] = {"blend": PosteriorPredictive(6), "max_new_tokens": 4, "do_sample": True, "seed": 1}
    together = generator.generate(PROMPTS, **given)
    monkeypatch.setattr(second_pass_module, "ROWS_AT_ONCE", rows)
    assert_same(generator.generate(PROMPTS, **given), together)


@pytest.mark.parametrize("do_sample", [False, True])
def test_only_bytes_are_generated(
    bundle64: "Bundle", make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, do_sample: bool
) -> None:
    """Even if the model thinks that a special token comes next."""
    model = make_model(dtype=bundle64.model.dtype)
    head = model.logits
    monkeypatch.setattr(model, "logits", lambda *given: head(*given) + 30.0 * (np_to_torch(np.arange(258)) > 255))
    system = stub(bundle64, np.eye(4))
    system.model = model
    given: dict[str, Any] = {"blend": PosteriorPredictive(4), "max_new_tokens": 6, "do_sample": do_sample, "seed": 0}
    result = TwoPassGenerator(system).generate(PROMPTS, **given)
    assert result.token_ids.max() < 256
    assert (result.log_probabilities < -10).all()  # the special tokens keep their share of the probability


@pytest.mark.parametrize("blend", [blend for blend in EVERY if not isinstance(blend, RefinedMean)], ids=repr)
def test_every_number_is_that_of_the_filter_written_out(
    bundle64: "Bundle", blend: Blend, explicit_filter: Callable[..., SimpleNamespace]
) -> None:
    result = TwoPassGenerator(bundle64).generate(PROMPTS, blend=blend, max_new_tokens=5, seed=3)
    particles = blend.particles(result.posterior)
    assert result.blend == blend.name
    assert result.prompts == tuple(prompt.encode() for prompt in PROMPTS)
    for i, prompt in enumerate(result.prompts):
        generated = bytes(result.token_ids[i].tolist())
        assert result.texts[i] == generated.decode(errors="replace")
        exact = explicit_filter(
            bundle64.model,
            bundle64.experts,
            prompt + generated,
            particles.weights[i],
            particles.mass[i],
            particles.switching,
            None if particles.target is None else particles.target[i],
            len(prompt),
        )
        after = slice(len(prompt), len(prompt) + 5)
        log_p = exact.log_p[after]
        assert log_p[:, :256].argmax(1).tolist() == list(generated)
        np.testing.assert_allclose(result.log_probabilities[i], log_p[np.arange(5), list(generated)], atol=1e-9)
        np.testing.assert_allclose(result.predictive_entropy[i], exact.entropy[after], atol=1e-9)
        np.testing.assert_allclose(result.mutual_information[i], exact.information[after], atol=1e-9)
        np.testing.assert_allclose(result.weights[i], exact.masses[len(prompt)] @ particles.weights[i], atol=1e-9)


def test_a_vertex_generates_as_the_model_under_that_expert(bundle64: "Bundle") -> None:
    """The second pass under all weight on one component is plain generation under its scales (bytes only)."""
    model, bank = bundle64.model, bundle64.experts
    for component in bank.components:
        blend = FixedWeights.vertex(bank.components, component)
        got = TwoPassGenerator(bundle64).generate(PROMPTS[:1], blend=blend, max_new_tokens=8, seed=0).token_ids[0]
        ids, mask = bundle64.tokenizer.encode_batch(PROMPTS[:1])
        scales = bank.blend(np_to_torch(np.eye(4)[bank.components.index(component)]))
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, adaptation=scales)[0]
        until = int((plain > 255).long().argmax()) if (plain > 255).any() else 8
        assert until > 1
        assert got[:until].tolist() == plain[:until].tolist()


def np_to_torch(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(values)


def test_the_seed_decides(bundle64: "Bundle") -> None:
    generator, blend = TwoPassGenerator(bundle64), PosteriorPredictive(6)
    one, again = (generator.generate(PROMPTS[:2], blend=blend, max_new_tokens=2, seed=5) for _ in range(2))
    assert_same(one, again)
    np.testing.assert_array_equal(one.posterior.weights, again.posterior.weights)
    other = generator.generate(PROMPTS[:2], blend=blend, max_new_tokens=2, seed=6)
    assert not np.array_equal(other.posterior.weights, one.posterior.weights)


def test_copies_of_a_prompt_draw_differently(bundle64: "Bundle") -> None:
    prompts = [PROMPTS[0]] * 3
    generator = TwoPassGenerator(bundle64)
    sampled = generator.generate(
        prompts, blend=PosteriorMean(), max_new_tokens=10, do_sample=True, temperature=2.0, seed=0
    )
    assert len(set(sampled.texts)) == 3
    draws = generator.generate(prompts * 4, blend=ThompsonSample(), max_new_tokens=1, seed=0)
    assert len({tuple(row) for row in draws.weights.tolist()}) > 2  # some are of one expert alone


def stub(bundle: "Bundle", weights: np.ndarray) -> SimpleNamespace:
    """The system with a dispatcher whose posterior is given: draws (draw, K + 1) for every prompt."""

    def posterior(evidence: Any, draws: int, seed: Any) -> DispatchPosterior:
        repeated = np.resize(weights, (draws, weights.shape[1]))
        return DispatchPosterior(np.repeat(repeated[:, None], len(evidence), 1), bundle.experts.components)

    dispatcher = SimpleNamespace(experts=bundle.experts.names, posterior=posterior, views=("hidden", "counts"))
    return SimpleNamespace(
        model=bundle.model, tokenizer=bundle.tokenizer, experts=bundle.experts, dispatcher=dispatcher
    )


def test_one_effective_particle_is_a_plain_blend(bundle64: "Bundle") -> None:
    """All draws alike and no mass on the vertices: the predictive is the posterior mean, and nothing is epistemic."""
    generator = TwoPassGenerator(stub(bundle64, np.array([[0.4, 0.3, 0.2, 0.1]])))
    mean = generator.generate(PROMPTS, blend=PosteriorMean(), max_new_tokens=5, seed=0)
    for blend in (PosteriorPredictive(3), PosteriorPredictive(6, vertex_mass=0.0, flat=0.0), ThompsonSample()):
        result = generator.generate(PROMPTS, blend=blend, max_new_tokens=5, seed=0)
        assert_same(replace(result, blend=mean.blend), mean)
        np.testing.assert_allclose(result.mutual_information, 0, atol=1e-10)


def test_particles_that_differ_have_something_to_tell(bundle64: "Bundle") -> None:
    generator = TwoPassGenerator(stub(bundle64, np.eye(4)))
    result = generator.generate(PROMPTS, blend=PosteriorPredictive(4), max_new_tokens=5, seed=0)
    assert (result.mutual_information > 1e-6).all()
    assert (result.mutual_information < result.predictive_entropy).all()


class TestErrors:
    @pytest.mark.parametrize("prompts", [[], [""], ["a" * 40_000], [b"\xff"], "a", None, iter("a")])
    def test_prompts(self, bundle: "Bundle", prompts: Any, unchecked: None) -> None:
        with pytest.raises(PromptError, match="expected"):
            TwoPassGenerator(bundle).generate(prompts, blend=PosteriorMean(), max_new_tokens=1)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens to be a whole number from 1 to 65536, got 0"),
            ({"temperature": 0.0}, "temperature to be a finite number > 0"),
            ({"blend": PosteriorPredictive(100)}, "posterior of at least 95 draws, got 64"),
            ({"blend": TopK(9)}, "k of at most 4"),
            ({"seed": -1}, "seed to be a whole number from 0"),
            ({"stop": ["a", ""]}, "stop to be a text of at least one byte, or a list of such, got"),
            ({"use_cache": "no"}, "use_cache to be true or false, got 'no'"),
            ({"own_evidence": 1}, "own_evidence to be true or false, got 1"),
            ({"abstain": True}, "expected a false_alarm_rate to abstain at"),
        ],
    )
    def test_settings(self, bundle: "Bundle", bad: dict[str, Any], message: str, unchecked: None) -> None:
        given = {"blend": PosteriorMean(), "max_new_tokens": 1} | bad
        with pytest.raises(ConfigError, match=message):
            TwoPassGenerator(bundle).generate(["a"], **given)

    def test_paths(self, bundle: "Bundle", unchecked: None) -> None:
        path: Any = "runs/mine"
        with pytest.raises(ConfigError, match=r"^expected a bundle, as load_bundle gives one, got 'runs/mine'$"):
            TwoPassGenerator(path)
        with pytest.raises(ConfigError, match=r"^expected a model, as .*, got 'runs/mine'$"):
            bundle.experts.check_base(path)

    def test_foreign_experts(self, bundle: "Bundle", make_model: Any, make_bank: Any) -> None:
        system = stub(bundle, np.eye(4))
        system.experts = make_bank(make_model(seed=7))
        with pytest.raises(ForeignExpertError, match=f"made for base model {bundle.experts.base}"):
            TwoPassGenerator(system)

    def test_a_dispatcher_over_others(self, bundle: "Bundle") -> None:
        system = stub(bundle, np.eye(4))
        system.dispatcher.experts = ("sort", "reverse", "add")
        with pytest.raises(ConfigError, match=r"expected a dispatcher over .'reverse', 'sort', 'add'.* got one over"):
            TwoPassGenerator(system)

    def test_a_dispatcher_that_is_not_fitted(self, bundle: "Bundle") -> None:
        from bayes_dispatch.dispatcher.estimator import Dispatcher

        system = stub(bundle, np.eye(4))
        system.dispatcher = Dispatcher(bundle.experts.names)
        with pytest.raises(NotFittedError):
            TwoPassGenerator(system).generate(["a"], blend=PosteriorMean(), max_new_tokens=1)
