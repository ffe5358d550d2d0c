"""Scores of blends are what the model itself says of the bytes, under the same posterior for all. Neither rows at
once, order nor other blends matter; what cannot be compared is refused."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from bayes_dispatch.errors import ConfigError, PromptError, TensorError, UnknownNameError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.few_shot.categories import name_probabilities
from bayes_dispatch.inference.few_shot.strategies import ByPrompt, Classified
from bayes_dispatch.inference.scoring import compare as compare_module
from bayes_dispatch.inference.scoring import document_reader as reading_module
from bayes_dispatch.inference.scoring.compare import compare_blends, compare_systems, score_together
from bayes_dispatch.inference.scoring.document_reader import TokenDocument
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
from bayes_dispatch.inference.two_pass.system import Dispatched, Strategy, dispatch
from bayes_dispatch.model.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle

DOCUMENTS = [
    Document("kfpa>apfk\nbcde>edcb\n", 10, ((15, 19),)),
    Document("37+58=95\n12+11=23\n44+44=88\n", 9, ((15, 17), (17, 17), (24, 26))),
    Document("naïve: é", 4),
]
BLENDS: list[Blend] = [
    PosteriorMean(),
    TopK(2),
    BestExpert(),
    ThompsonSample(),
    FixedWeights.vertex(("reverse", "sort", "add", "base"), "base"),
    PosteriorPredictive(6, switching=(0.05, 0.001), flat=0.2),
]


def scored(document: Document) -> list[int]:
    return [i for start, stop in document.ranges for i in range(start, stop)]


def exactly(
    explicit_filter: Callable[..., SimpleNamespace], bundle: "Bundle", document: Document, particles: Particles, n: int
) -> SimpleNamespace:
    """What the filter written out says of a document under its particles."""
    own = particles.weights[n], particles.mass[n]
    rest = (0.05, 0.001), particles.target[n], document.prompt_bytes
    return explicit_filter(bundle.model, bundle.experts, document.data, *own, *rest)


def test_one_particle_is_the_adapted_model(bundle64: "Bundle") -> None:
    frame = compare_blends(bundle64, DOCUMENTS, BLENDS[:5], seed=2).to_frame()
    posterior, _ = dispatch(bundle64, [document.prompt for document in DOCUMENTS], 2)
    for blend in BLENDS[:5]:
        weights = blend.particles(posterior).weights[:, 0]
        for n, document in enumerate(DOCUMENTS):
            adaptation = bundle64.experts.blend(torch.tensor(weights[n]))
            with torch.no_grad():
                log_p = bundle64.model(torch.tensor([[256, *document.data]]), adaptation=adaptation).logits[0]
            log_p = log_p.log_softmax(-1)
            places = scored(document)
            expected = -np.mean([float(log_p[i, document.data[i]]) for i in places])
            row = frame[(frame.document == n) & (frame.blend == blend.name)].iloc[0]
            np.testing.assert_allclose(row.nll, expected, atol=1e-10)
            np.testing.assert_allclose(row.mutual_information, 0, atol=1e-10)
            entropy = -(log_p.exp() * log_p).sum(-1)
            np.testing.assert_allclose(row.entropy, float(entropy[places].mean()), atol=1e-10)
            hits = [bool(log_p[i].argmax() == document.data[i]) for i in range(len(document.data))]
            ranges = [(a, b) for a, b in document.ranges if b > a]
            assert row.exact_match == np.mean([all(hits[a:b]) for a, b in ranges])


def test_many_particles_are_filtered_by_every_byte(
    bundle64: "Bundle", explicit_filter: Callable[..., SimpleNamespace]
) -> None:
    blend = BLENDS[5]
    scores = compare_blends(bundle64, DOCUMENTS, [blend], seed=2).scores
    posterior, _ = dispatch(bundle64, [document.prompt for document in DOCUMENTS], 2)
    particles = blend.particles(posterior)
    for n, (document, score) in enumerate(zip(DOCUMENTS, scores, strict=True)):
        exact = exactly(explicit_filter, bundle64, document, particles, n)
        places = scored(document)
        expected = -np.mean([exact.log_p[i, document.data[i]] for i in places])
        np.testing.assert_allclose(score.nll, expected, atol=1e-9)
        np.testing.assert_allclose(score.entropy, exact.entropy[places].mean(), atol=1e-9)
        np.testing.assert_allclose(score.mutual_information, exact.information[places].mean(), atol=1e-9)


@pytest.mark.parametrize(
    "strategy", [None, Classified(lambda evidence: np.full((len(evidence), 4), 0.25)), ByPrompt(lambda p: Dispatched())]
)
def test_documents_with_the_same_prompt_are_of_one_posterior(bundle64: "Bundle", strategy: Strategy | None) -> None:
    """So that choices are compared; the prompt alone decides, whatever stands beside it."""
    choices = [Document(text, 10) for text in ("kfpa>apfk\nbcde>edcb", "37+58=95\n12+11=23", "kfpa>apfk\nbcde>edcb")]
    draws = [ThompsonSample(), PosteriorPredictive(12)]
    one, _, same = zip(
        *(compare_blends(bundle64, choices, draws, 4, strategy=strategy).of(d.name) for d in draws), strict=True
    )
    (alone,) = zip(
        *(compare_blends(bundle64, choices[:1], draws, 4, strategy=strategy).of(d.name) for d in draws), strict=True
    )
    for ours, theirs, expected in zip(one, same, alone, strict=True):
        assert ours.nll == pytest.approx(theirs.nll, abs=1e-12)
        assert ours.nll == pytest.approx(expected.nll, abs=1e-9)


def test_exact_match_counts_whole_ranges(bundle64: "Bundle") -> None:
    """Of a text that the model continues greedily itself, every range matches; change one byte, and its range fails."""
    from bayes_dispatch.inference.generator import TwoPassGenerator

    blend = FixedWeights.vertex(bundle64.experts.components, "sort")
    prompts = [f"{letter}fpa>" for letter in "abcdefghijklmnop"]
    generated = TwoPassGenerator(bundle64).generate(prompts, blend=blend, max_new_tokens=8, seed=0).token_ids
    prompt, row = next((p, row) for p, row in zip(prompts, generated, strict=True) if row.max() < 128)
    text = prompt + bytes(row.tolist()).decode()
    ranges = ((5, 7), (7, 10), (10, 13))
    changed = text[:8] + chr((ord(text[8]) + 1) % 128) + text[9:]
    whole, broken = compare_blends(
        bundle64, [Document(text, 5, ranges), Document(changed, 5, ranges[:2])], [blend]
    ).scores
    assert whole.exact_match == 1
    assert broken.exact_match == 0.5


def test_a_prompt_that_ends_amid_a_token_has_no_score_of_its_own(llama64: SimpleNamespace) -> None:
    """The token counts for neither: what is scored, and how many bytes that is, is as if it ended with it."""
    text = "the the the\n"
    amid, after = (compare_blends(llama64, [Document(text, end)], ["base"]).scores[0] for end in (1, 3))
    assert len(amid.scored.log_probability) == len(after.scored.log_probability) == 5
    for name in ("nll", "entropy", "aleatoric"):
        assert getattr(amid, name) == pytest.approx(getattr(after, name), rel=1e-12)


def test_rows_at_once_and_order_do_not_matter(bundle64: "Bundle", monkeypatch: pytest.MonkeyPatch) -> None:
    together = compare_blends(bundle64, DOCUMENTS, BLENDS, seed=1)
    monkeypatch.setattr(compare_module, "KEPT_AT_ONCE", 1)
    monkeypatch.setattr(reading_module, "TOKENS_AT_ONCE", 70)
    apart = compare_blends(bundle64, DOCUMENTS[::-1], BLENDS[::-1], seed=1)
    found = {(2 - score.document, score.blend): score for score in apart.scores}
    assert len(found) == len(together.scores) == len(DOCUMENTS) * len(BLENDS)
    for score in together.scores:
        other = found[score.document, score.blend]
        np.testing.assert_allclose(
            [score.nll, score.exact_match, score.entropy, score.mutual_information],
            [other.nll, other.exact_match, other.entropy, other.mutual_information],
            atol=1e-9,
        )


def test_what_is_kept_counts_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long document beside many short ones does not make these as long."""
    monkeypatch.setattr(compare_module, "KEPT_AT_ONCE", 60_000)
    short, long = Document("a" * 20, 19), Document("a" * 2000, 1999)
    texts = [TokenDocument.of(each, ByteTokenizer()) for each in (short, short, long, short, short, short)]
    parts = list(compare_module._groups(texts, [10] * 6))
    assert parts == [slice(0, 2), slice(2, 4), slice(4, 6)]  # 10 rows of 21 or 2,001 tokens


def test_the_table(bundle64: "Bundle") -> None:
    frame = compare_blends(bundle64, DOCUMENTS[:2], BLENDS[:2], seed=0).to_frame()
    assert list(frame.columns) == [
        "document",
        "blend",
        "nll",
        "exact_match",
        "entropy",
        "mutual_information",
        "aleatoric",
        "ece",
        "rows",
    ]
    assert sorted(zip(frame.document, frame.blend, strict=True)) == [
        (0, "posterior_mean"),
        (0, "top_k(2)"),
        (1, "posterior_mean"),
        (1, "top_k(2)"),
    ]


def test_what_cannot_be_compared(bundle64: "Bundle", unchecked: None) -> None:
    with pytest.raises(ConfigError, match=r"blends that all differ, got top_k\(2\), top_k\(2\)"):
        compare_blends(bundle64, DOCUMENTS, ["top_k", TopK(2)])
    with pytest.raises(ConfigError, match="blends that all differ, got none"):
        compare_blends(bundle64, DOCUMENTS, [])
    with pytest.raises(UnknownNameError, match=r"a blend of best_expert, .*, reverse, sort, add, base, .* 'mean'"):
        compare_blends(bundle64, DOCUMENTS, ["mean"])
    with pytest.raises(ConfigError, match=r"document 1 to be a Document\(text, prompt_bytes\), .*'ab=ba'"):
        compare_blends(bundle64, [DOCUMENTS[0], "ab=ba"], BLENDS[:1])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"expected a list of at least one document, got \[\]"):
        compare_blends(bundle64, [], BLENDS)
    for document in (Document("abc", 3), Document("abc", 1, ((2, 2),)), Document("abc", 1, ())):
        with pytest.raises(ConfigError, match="expected document 1 to have scored bytes, got none"):
            compare_blends(bundle64, [DOCUMENTS[0], document], BLENDS[:1])
    with pytest.raises(PromptError, match="expected prompt 1 to have at least 1 byte, got none"):
        compare_blends(bundle64, [DOCUMENTS[0], Document("abc", 0)], BLENDS[:1])


def test_a_document_that_the_model_cannot_read_is_named(llama64: SimpleNamespace) -> None:
    longest = llama64.model.longest
    long, whole = (Document("#" * (longest - 1 + more), 4) for more in (1, 0))  # one token more begins a text
    with pytest.raises(ConfigError, match=f"^expected document 1 to have at most {longest} tokens, got {longest + 1}$"):
        compare_blends(llama64, [whole, long], ["base"])
    assert len(compare_blends(llama64, [whole], ["base"]).scores) == 1


def test_an_expert_under_which_the_model_overflows_is_named(bundle: "Bundle") -> None:
    scales = {name: torch.full((rank,), 1e30) for name, rank in bundle.model.adaptable().items()}
    add = replace(bundle.experts["add"], scales=scales)  # type: ignore[type-var]
    broken = replace(bundle, experts=ExpertBank([*list(bundle.experts.values())[:2], add]))
    assert len(compare_blends(broken, DOCUMENTS, ["base", "sort"]).scores) == 2 * len(DOCUMENTS)
    for blend in ("add", "posterior_predictive"):
        with pytest.raises(
            TensorError, match=rf"^expected finite log-probabilities of document 0 under {blend}\S*, got"
        ):
            compare_blends(broken, DOCUMENTS, ["base", blend])
    with pytest.raises(TensorError, match=r"^expected finite log-probabilities of the names after prompt 0, got NaN"):
        name_probabilities(bundle.model, bundle.tokenizer, ["a"], ["b", "c"], add.adaptation())


def test_blends_do_not_change_each_other(bundle64: "Bundle") -> None:
    """Particles that blends share are run once; what each blend makes of them is its own."""
    together = compare_blends(bundle64, DOCUMENTS, BLENDS, seed=1)
    for blend in BLENDS:
        alone = compare_blends(bundle64, DOCUMENTS, [blend], seed=1)
        for one, other in zip(together.of(blend.name), alone.of(blend.name), strict=True):
            np.testing.assert_allclose(one.nll, other.nll, atol=1e-10)
            assert one.rows == other.rows == (6 if isinstance(blend, PosteriorPredictive) else 1)


def test_masses_move_from_the_byte_that_is_said(
    bundle64: "Bundle", explicit_filter: Callable[..., SimpleNamespace]
) -> None:
    """From the document's end: never. From the prompt's end: as a filter that only then begins."""
    posterior, _ = dispatch(bundle64, [document.prompt for document in DOCUMENTS], 2)
    particles = BLENDS[5].particles(posterior)
    never = [len(document.data) for document in DOCUMENTS]
    late = [document.prompt_bytes for document in DOCUMENTS]
    found = score_together(
        bundle64.model,
        bundle64.experts,
        DOCUMENTS,
        {"never": particles, "late": particles, "always": particles},
        filtered_from={"never": never, "late": late},
    )
    for n, document in enumerate(DOCUMENTS):
        mass = particles.mass[n]
        ids = torch.tensor([[256, *document.data]])
        each = [
            bundle64.model(ids, adaptation=bundle64.experts.blend(torch.tensor(w))).logits[0].softmax(-1).detach()
            for w in particles.weights[n]
        ]
        own = np.array([[float(p[i, byte]) for i, byte in enumerate(document.data)] for p in each])  # (S, T)
        places = scored(document)
        fixed = np.log(mass @ own)
        np.testing.assert_allclose(found["never"][n].nll, -fixed[places].mean(), atol=1e-9)
        joint, log_p = np.tile(mass / 2, (2, 1)), []
        for t in range(own.shape[1]):
            log_p.append(np.log(joint.sum(0) @ own[:, t]))
            if t >= document.prompt_bytes:
                joint = joint * own[:, t] / np.exp(log_p[-1])
                rates = np.array([[0.05], [0.001]])
                joint = (1 - rates) * joint + rates * joint.sum(1, keepdims=True) * particles.target[n]
        np.testing.assert_allclose(found["late"][n].nll, -np.array(log_p)[places].mean(), atol=1e-9)
        exact = exactly(explicit_filter, bundle64, document, particles, n)
        np.testing.assert_allclose(
            found["always"][n].nll, -np.mean([exact.log_p[i, document.data[i]] for i in places]), atol=1e-9
        )


def test_a_refined_mean_that_no_byte_has_moved(bundle64: "Bundle") -> None:
    """It is the particles' mean before any evidence of bytes."""
    posterior, _ = dispatch(bundle64, [document.prompt for document in DOCUMENTS], 2)
    particles = RefinedMean(6, flat=0.0).particles(posterior)
    mean = Particles(np.einsum("ns,nsk->nk", particles.mass, particles.weights)[:, None], np.ones((len(DOCUMENTS), 1)))
    never = [len(document.data) for document in DOCUMENTS]
    found = score_together(
        bundle64.model, bundle64.experts, DOCUMENTS, {"never": particles, "mean": mean}, filtered_from={"never": never}
    )
    for ours, theirs in zip(found["never"], found["mean"], strict=True):
        assert ours.nll == pytest.approx(theirs.nll, abs=1e-9)


def test_two_systems_on_the_same_documents(bundle64: "Bundle") -> None:
    """Against itself a system has no difference; with other experts it is what each gives alone."""
    swapped = {"reverse": "sort", "sort": "reverse", "add": "add"}
    experts = [replace(bundle64.experts[other], name=name) for name, other in swapped.items()]
    other = replace(bundle64, experts=ExpertBank(experts))
    blends = [BestExpert(), PosteriorMean()]
    found = compare_systems({"a": bundle64, "same": bundle64, "b": other}, DOCUMENTS, blends, seed=3)
    alone = compare_blends(other, DOCUMENTS, blends, seed=3).to_frame()
    frame = found.to_frame()
    assert list(frame.columns) == ["system", *alone.columns]
    np.testing.assert_allclose(frame[frame.system == "b"].nll, alone.nll, atol=1e-12)
    table = found.differences("a").set_index(["system", "blend", "metric"])
    assert (table.loc["same"][["difference", "standard_error"]] == 0).all(axis=None)
    first = frame[(frame.system == "a") & (frame.blend == "best_expert")].nll.to_numpy()
    second = frame[(frame.system == "b") & (frame.blend == "best_expert")].nll.to_numpy()
    assert table.loc[("b", "best_expert", "nll")].difference == pytest.approx((second - first).mean())
    assert not np.allclose(first, second)
    assert list(found.summary().system.unique()) == ["a", "same", "b"]
    with pytest.raises(UnknownNameError, match="expected a system of a, same, b, got 'c'"):
        found.differences("c")
    with pytest.raises(ConfigError, match="expected at least 2 systems, got 1"):
        compare_systems({"a": bundle64}, DOCUMENTS, blends)


def test_a_refined_mean_is_the_blend_that_the_prompt_left(
    bundle64: "Bundle", explicit_filter: Callable[..., SimpleNamespace]
) -> None:
    refined = RefinedMean(6, switching=(0.05, 0.001), flat=0.2)
    found = compare_blends(bundle64, DOCUMENTS, [refined, PosteriorMean()], seed=2)
    posterior, _ = dispatch(bundle64, [document.prompt for document in DOCUMENTS], 2)
    particles = refined.particles(posterior)
    for n, document in enumerate(DOCUMENTS):
        exact = explicit_filter(
            bundle64.model,
            bundle64.experts,
            document.data,
            particles.weights[n],
            particles.mass[n],
            particles.switching,
        )
        mean = exact.masses[document.prompt_bytes] @ particles.weights[n]
        alone = compare_blends(bundle64, [document], [FixedWeights(tuple(mean.tolist()))], seed=2).scores[0]
        own = [score for score in found.scores if score.blend == refined.name][n]
        assert own.nll == pytest.approx(alone.nll, abs=1e-9)
        assert own.rows == 7
