"""One prefill serves both passes, a stream is what `generate` gives, stops end texts, merged particles cost fewer
rows, groups fit the memory. Own tokens are evidence on request, foreign prompts go to base, bad settings are refused
first."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.inference.few_shot.strategies import Given
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass import second_pass as second_pass_module
from bayes_dispatch.inference.two_pass.blends import (
    BestExpert,
    Blend,
    FixedWeights,
    PosteriorMean,
    PosteriorPredictive,
    RefinedMean,
)
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.inference.two_pass.generation import Cost, Generation
from bayes_dispatch.inference.two_pass.readers import CachedReader
from bayes_dispatch.inference.two_pass.system import cut_of, dispatch

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle

PROMPTS = ["kfpa>apfk\nbcde>", "9", "37+58=95\n12+11=23\n44+44=", "9"]
UNMERGED = PosteriorPredictive(6, merge=0.0)
BLENDS: list[Blend] = [PosteriorMean(), UNMERGED, RefinedMean(6)]


def assert_same(a: Generation, b: Generation, atol: float = 1e-8) -> None:
    np.testing.assert_array_equal(a.token_ids, b.token_ids)
    for name in ("log_probabilities", "predictive_entropy", "mutual_information", "weights", "lengths"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=atol, err_msg=name)
    for one, other in zip(a.paths, b.paths, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)
    np.testing.assert_allclose(a.posterior.weights, b.posterior.weights, rtol=0, atol=atol)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("blend", BLENDS, ids=repr)
def test_one_prefill_is_two(cut64: "Bundle", blend: Blend) -> None:
    """Going on from the first pass's states gives what reading everything again with the whole model gives."""
    generator = TwoPassGenerator(cut64)
    given: dict[str, Any] = {"blend": blend, "max_new_tokens": 5, "do_sample": True, "seed": 1}
    once = generator.generate(PROMPTS, **given)
    assert_same(once, generator.generate(PROMPTS, **given, use_cache=False))
    posterior, evidence = dispatch(cut64, PROMPTS, 1)
    first = slice(3)  # the fourth prompt is a copy: ``generate`` draws anew for it, and ``dispatch`` does not
    np.testing.assert_allclose(posterior.weights[:, first], once.posterior.weights[:, first], rtol=0, atol=1e-10)
    np.testing.assert_array_equal(posterior.weights[:, 3], posterior.weights[:, 1])
    assert set(evidence.views) == {"hidden", "counts"}
    assert cut_of(cut64) == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("blend", [*BLENDS, PosteriorPredictive(6, merge=0.05)], ids=repr)
def test_a_stream_is_what_generate_gives(cut64: "Bundle", blend: Blend, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TwoPassGenerator(cut64)
    given: dict[str, Any] = {"blend": blend, "max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "seed": 4}
    monkeypatch.setattr(second_pass_module, "ROWS_AT_ONCE", 8)
    whole = generator.generate(PROMPTS, **given)
    texts, count, last = [""] * 4, [0] * 4, [False] * 4
    for each in generator.stream(PROMPTS, **given):
        n, t = each.prompt, count[each.prompt]
        assert not last[n]
        assert each.token_id == whole.token_ids[n, t]
        assert each.log_probability == pytest.approx(whole.log_probabilities[n, t])
        assert each.mutual_information == pytest.approx(whole.mutual_information[n, t])
        np.testing.assert_allclose(each.weights, whole.paths[n][len(PROMPTS[n]) + t])
        np.testing.assert_array_equal(each.posterior.weights[:, 0], whole.posterior.weights[:, n])
        texts[n], count[n], last[n] = texts[n] + each.text, t + 1, each.last
    assert tuple(texts) == whole.texts
    assert all(last)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("use_cache", [True, False])
def test_texts_end_with_stop(cut64: "Bundle", use_cache: bool) -> None:
    """Those that have ended leave the batch; the others go on as they would have."""
    generator = TwoPassGenerator(cut64)
    given: dict[str, Any] = {"blend": UNMERGED, "max_new_tokens": 8, "do_sample": True, "temperature": 3.0, "seed": 2}
    free = generator.generate(PROMPTS, **given)
    own, at = next((n, t) for t in range(6) for n in range(4) if free.token_ids[n, t : t + 2].max() < 128)
    stop = bytes(free.token_ids[own, at : at + 2].tolist())
    found = generator.generate(PROMPTS, **given, stop=["never", stop], use_cache=use_cache)  # any of several
    for n in range(4):
        data = bytes(free.token_ids[n].tolist())
        length = data.index(stop) + 2 if stop in data else 8
        assert found.lengths[n] == length
        assert bytes(found.token_ids[n, :length].tolist()) == data[:length]
        assert (found.token_ids[n, length:] == 257).all()
        np.testing.assert_allclose(found.log_probabilities[n, :length], free.log_probabilities[n, :length], atol=1e-8)
        assert np.isnan(found.log_probabilities[n, length:]).all()
        assert found.paths[n].shape == (len(PROMPTS[n]) + length, 4)
    assert found.lengths[own] == at + 2 < 8
    assert found.cost.decode < free.cost.decode or not use_cache


@pytest.mark.usefixtures("unchecked")
def test_merged_particles_cost_fewer_rows_and_little_likelihood(bundle64: "Bundle") -> None:
    generator = TwoPassGenerator(bundle64)
    given: dict[str, Any] = {"max_new_tokens": 6, "seed": 3}
    whole = generator.generate(PROMPTS, blend=UNMERGED, **given)
    assert whole.rows.tolist() == [6] * len(PROMPTS)
    for tolerance in (1e-9, 0.01, 10.0):
        merged = generator.generate(PROMPTS, blend=PosteriorPredictive(6, merge=tolerance), **given)
        np.testing.assert_allclose(merged.weights, whole.weights, atol=1e-9)  # before anything is merged
        if tolerance < 1e-6:
            assert_same(merged, whole, atol=1e-4)
        assert merged.cost.decode == merged.cost.depth * merged.rows @ (merged.lengths - 1)
        if tolerance == 10.0:
            assert merged.rows.tolist() == [1] * len(PROMPTS)
            assert merged.cost.rows == 1.0
            np.testing.assert_allclose(merged.mutual_information, 0, atol=1e-12)
        assert merged.cost.decode <= whole.cost.decode
        assert merged.cost.prefill == whole.cost.prefill


@pytest.mark.usefixtures("unchecked")
def test_what_it_costs(cut64: "Bundle", bundle64: "Bundle") -> None:
    """One row of experts above a cut reads the prompt once in all; several read it once below, and each above."""
    lengths = [len(prompt) + 1 for prompt in PROMPTS[:3]]
    tokens = sum(lengths)
    generator = TwoPassGenerator(cut64)

    def cost(blend: Blend, bundle: "Bundle" = cut64) -> Cost:
        return TwoPassGenerator(bundle).generate(PROMPTS[:3], blend=blend, max_new_tokens=4, seed=0).cost

    one = cost(PosteriorMean())
    assert one == Cost(3, tokens, 9, first_pass=0, prefill=3 * tokens, decode=3 * 9)
    assert (one.prompt_passes, one.rows) == (1.0, 1.0)
    particles = UNMERGED.particles(generator.generate(PROMPTS[:3], max_new_tokens=1, seed=0).posterior)
    rows = [len(np.unique(each, axis=0)) for each in particles.run]  # draws may be vertices
    assert max(rows) > 3
    prefill = sum((1 + own * 2) * length for own, length in zip(rows, lengths, strict=True))
    six = cost(UNMERGED)
    assert six == Cost(3, tokens, 9, first_pass=0, prefill=prefill, decode=sum(3 + own * 6 for own in rows))
    refined = cost(RefinedMean(6))
    assert refined == Cost(3, tokens, 9, first_pass=0, prefill=prefill + 2 * tokens, decode=3 * 9)
    twice = cost(PosteriorMean(), bundle64)  # experts adapt all blocks: the first pass is no prefill
    assert twice == Cost(3, tokens, 9, first_pass=3 * tokens, prefill=3 * tokens, decode=3 * 9)
    assert twice.prompt_passes == 2.0
    assert twice.total == 6 * tokens + 27
    copies = generator.generate([PROMPTS[2]] * 3, blend=FixedWeights((0.0, 1.0, 0.0, 0.0)), max_new_tokens=1, seed=0)
    assert copies.cost.prefill == 3 * (len(PROMPTS[2]) + 1)
    assert np.isnan(copies.cost.rows)


@pytest.mark.usefixtures("unchecked")
def test_own_tokens_as_evidence(bundle64: "Bundle") -> None:
    """They move the weights, or not; the tokens of the prompt always do."""
    generator = TwoPassGenerator(bundle64)
    given: dict[str, Any] = {"blend": UNMERGED, "max_new_tokens": 5, "seed": 3}
    counted = generator.generate(PROMPTS, **given)
    apart = generator.generate(PROMPTS, **given, own_evidence=False)
    assert_same(apart, generator.generate(PROMPTS, **given, own_evidence=False, use_cache=False))
    for n, prompt in enumerate(PROMPTS):
        count = len(prompt)
        np.testing.assert_allclose(apart.paths[n][: count + 1], counted.paths[n][: count + 1], atol=1e-12)
        np.testing.assert_allclose(apart.paths[n][count:], np.tile(apart.weights[n], (5, 1)), atol=1e-12)
        assert not np.allclose(counted.paths[n][-1], counted.weights[n], atol=1e-9)
        assert count == 1 or not np.allclose(counted.paths[n][0], counted.paths[n][count], atol=1e-9)


def test_a_refined_mean_is_a_blend_at_the_filtered_weights(bundle64: "Bundle") -> None:
    generator = TwoPassGenerator(bundle64)
    refined = generator.generate(PROMPTS[:1], blend=RefinedMean(6), max_new_tokens=4, seed=1)
    mixed = generator.generate(PROMPTS[:1], blend=UNMERGED, max_new_tokens=4, seed=1)
    np.testing.assert_allclose(refined.weights, mixed.weights, atol=1e-12)
    fixed = generator.generate(
        PROMPTS[:1], blend=FixedWeights(tuple(refined.weights[0].tolist())), max_new_tokens=4, seed=1
    )
    np.testing.assert_array_equal(refined.token_ids, fixed.token_ids)
    np.testing.assert_allclose(refined.log_probabilities, fixed.log_probabilities, atol=1e-8)
    np.testing.assert_allclose(refined.aleatoric_entropy, refined.predictive_entropy, atol=1e-10)


def test_groups_hold_what_memory_allows(cut64: "Bundle", monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TwoPassGenerator(cut64)
    together = generator.generate(PROMPTS, blend=BestExpert(), max_new_tokens=2, seed=1)
    monkeypatch.setattr(second_pass_module, "TOKENS_AT_ONCE", 30)
    assert_same(generator.generate(PROMPTS, blend=BestExpert(), max_new_tokens=2, seed=1), together)


def test_settings_are_checked_before_the_first_token(bundle: "Bundle") -> None:
    generator = TwoPassGenerator(bundle)
    with pytest.raises(ConfigError, match="expected stop to be a text of at least one byte"):
        generator.stream(["a"], blend=PosteriorMean(), max_new_tokens=1, stop="")


@pytest.fixture(scope="module")
def gated64(cut64: "Bundle") -> "Bundle":
    """The same system with a gate that knows short lines of three kinds."""
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.dispatcher.gate import Gate

    rng = np.random.default_rng(0)
    texts = [("ab>ba\n", "ba>ab\n", "1+2=3\n")[i % 3] * int(rng.integers(1, 6)) for i in range(120)]
    evidence = first_pass(cut64.model, cut64.tokenizer, texts, cut=1).evidence
    gate = Gate.calibrate(cut64.dispatcher, evidence, bins=1)
    return Bundle(cut64.model, cut64.experts, cut64.dispatcher, gate=gate)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("blend", [PosteriorMean(), PosteriorPredictive(6), RefinedMean(6)], ids=repr)
def test_foreign_prompts_are_left_to_base(gated64: "Bundle", blend: Blend) -> None:
    prompts = ["ab>ba\nab>ba\n", "ZZZZ{}{}ZZZZ{}{}" * 4, "1+2=3\n1+2=3\n"]
    generator = TwoPassGenerator(gated64)
    given: dict[str, Any] = {"blend": blend, "max_new_tokens": 4, "seed": 1}
    found = generator.generate(prompts, **given, false_alarm_rate=0.05)
    assert found.foreign.tolist() == [False, True, False]
    assert (found.p_values > 0.05).tolist() == [True, False, True]
    free = generator.generate(prompts, **given)
    assert not free.foreign.any()
    assert np.isnan(free.p_values).all()
    base = generator.generate(prompts, **given | {"blend": FixedWeights((0.0, 0.0, 0.0, 1.0))})
    np.testing.assert_allclose(found.log_probabilities[1], base.log_probabilities[1], atol=1e-8)
    np.testing.assert_allclose(found.weights[1], [0, 0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(found.log_probabilities[[0, 2]], free.log_probabilities[[0, 2]], atol=1e-8)
    np.testing.assert_allclose(found.posterior.weights, free.posterior.weights)  # what was inferred stays
    silent = generator.generate(prompts, **given, false_alarm_rate=0.05, abstain=True)
    assert silent.texts[1] == ""
    assert silent.lengths.tolist() == [4, 0, 4]
    assert silent.rows.tolist() == [found.rows[0], 0, found.rows[2]]
    assert found.rows[1] == 1
    assert silent.texts[::2] == found.texts[::2]
    assert silent.paths[1].shape == (len(prompts[1]), 4)
    alone = generator.generate(prompts[1:2], **given, false_alarm_rate=0.05, abstain=True)
    assert alone.texts == ("",)
    assert {each.prompt for each in generator.stream(prompts, **given, false_alarm_rate=0.05, abstain=True)} == {0, 2}


@pytest.mark.usefixtures("unchecked")
def test_a_gate_that_is_not_there(bundle: "Bundle", gated64: "Bundle") -> None:
    given: dict[str, Any] = {"blend": PosteriorMean(), "max_new_tokens": 1}
    with pytest.raises(ConfigError, match="expected a bundle with a gate for a false-alarm rate"):
        TwoPassGenerator(bundle).generate(["a"], **given, false_alarm_rate=0.05)
    with pytest.raises(ConfigError, match="expected a false_alarm_rate to abstain at"):
        TwoPassGenerator(gated64).generate(["a"], **given, abstain=True)
    with pytest.raises(ConfigError, match="expected a false-alarm rate of at least"):
        TwoPassGenerator(gated64).generate(["a"], **given, false_alarm_rate=0.001)
    with pytest.raises(ConfigError, match=r"expected a false-alarm rate .* got 'x'"):
        TwoPassGenerator(gated64).generate(["a"], **given, false_alarm_rate="x")  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("do_sample", [False, True])
def test_nan_is_one_clear_error(bundle: "Bundle", make_model: Any, do_sample: bool) -> None:
    """However tokens are chosen."""
    from types import SimpleNamespace

    model = make_model()
    system = SimpleNamespace(
        model=model, tokenizer=bundle.tokenizer, experts=bundle.experts, dispatcher=bundle.dispatcher
    )
    generator, known = TwoPassGenerator(system), Given(np.array([0.0, 0.0, 0.0, 1.0]))
    model.logits = lambda hidden, adaptation: torch.full((*hidden.shape[:2], 258), float("nan"))
    for blend in (FixedWeights((0.0, 0.0, 0.0, 1.0)), PosteriorPredictive(5, merge=0.0)):
        with pytest.raises(TensorError, match="expected finite log-probabilities"):
            generator.generate(["ab"], blend=blend, max_new_tokens=2, do_sample=do_sample, seed=0, strategy=known)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("part", ["own", "after"])
def test_a_particle_of_which_nan_is_said_is_no_certain_one(
    bundle: "Bundle", monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Of one token of the prompt, or of what may follow, where that tells which particles are alike."""
    whole = CachedReader.read_prompts

    def poisoned(self: CachedReader, own: bool, tail: int = 1, piece: int | None = None) -> Any:
        said = yield from whole(self, own, tail, piece)
        after = torch.cat(list(said.after), 2)
        found = {"own": said.own.clone(), "after": after}
        found[part][:, 1, 2] = torch.nan
        return said._replace(own=found["own"], after=iter([after]))

    monkeypatch.setattr(CachedReader, "read_prompts", poisoned)
    with pytest.raises(TensorError, match=r"^expected finite log-probabilities from the model, got NaN$"):
        TwoPassGenerator(bundle).generate(["kfpa>apfk"], blend=PosteriorPredictive(6), max_new_tokens=2, seed=0)


def test_too_many_tokens_are_refused(bundle: "Bundle") -> None:
    with pytest.raises(ConfigError, match="expected max_new_tokens to be a whole number from 1 to 65536, got 65537"):
        TwoPassGenerator(bundle).generate(["a"], blend=PosteriorMean(), max_new_tokens=65_537)


def test_a_bundle_tells_how_many_blocks_run_once(cut64: "Bundle", embedded64: "Bundle") -> None:
    """Whose evaluations the prompts' costs have once, whatever the number of particles."""
    assert embedded64.cut == 0  # adapted in front of all blocks
    blend, tokens = PosteriorPredictive(6, merge=0.0), len(PROMPTS[2]) + 1
    found = TwoPassGenerator(cut64).generate([PROMPTS[2]], blend=blend, max_new_tokens=1, seed=0)
    cost, rows = found.cost, len(np.unique(blend.particles(found.posterior).run[0], axis=0))
    assert 0 < cut64.cut < cost.depth
    assert (cost.first_pass, cost.prefill) == (0, tokens * (cut64.cut + rows * (cost.depth - cut64.cut)))
