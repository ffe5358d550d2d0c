"""Dispatch by prompt length: its prompts' laws, Arrow's routing, its tables, and a smoke run on a tiny model."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bayes_dispatch as bd
import real_dispatch
from bayes_dispatch.experts.domains import TextDomain
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.inference.two_pass.system import dispatch
from dispatching.methods import Answer
from real.prompts import beginning, mixed_prompts, pure_prompts
from real.quick import quick_bundle, quick_domains
from real.reader import Reader
from real.routers import arrow_shares
from real_dispatch import BASE, CLASSIFIERS, FOREIGN, LENGTHS, MIXED, PURE, Prompts, prompts, tables
from tests.tiny import tiny_backbone

LINES = ("xxxx\n", "yy\n", "zzzzzzz\n")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> bd.Bundle:
    return quick_bundle(tmp_path_factory.mktemp("bundle"))


def test_a_beginning_has_so_many_tokens_and_whole_characters() -> None:
    tokenizer = tiny_backbone().tokenizer
    assert beginning("the 12", 3, tokenizer) == "the "  # after the token that begins every text
    assert beginning("the 12", 5, tokenizer) is None
    assert beginning("aé", 3, tokenizer) is None
    assert beginning("aé", 4, tokenizer) == "aé"


def test_prompts_are_held_out_follow_from_the_seed_and_have_their_shares() -> None:
    tokenizer, domains = tiny_backbone().tokenizer, list(quick_domains()[0].values())
    pure = pure_prompts(domains[0], 32, 5, tokenizer, 0)
    assert [len(tokenizer.tokenize(text).ids) for text in pure] == [32] * 5
    assert pure == pure_prompts(domains[0], 32, 6, tokenizer, 0)[:5] != pure_prompts(domains[0], 32, 5, tokenizer, 1)
    letters = [
        TextDomain(letter, lambda split, line=line: [line * 300]) for letter, line in zip("xyz", LINES, strict=True)
    ]
    texts, shares = mixed_prompts(letters, 64, 20, tokenizer, 0)
    assert [len(tokenizer.tokenize(text).ids) for text in texts] == [64] * 20
    assert {int((own > 0).sum()) for own in shares} == {2, 3}
    for text, own in zip(texts, shares, strict=True):
        lines = text.splitlines(keepends=True)
        counts = [sum(len(line) for line in lines if letter in line) for letter in "xyz"]
        np.testing.assert_allclose(own, np.array(counts) / len(text))


def test_arrow_s_shares_are_those_of_its_top_adapters(bundle: bd.Bundle) -> None:
    """Adapters of rank 1 at one matrix: the only row of ``down`` is what each is known by."""
    backbone, matrix = bundle.model, bundle.experts.adapts[0]
    generator = torch.Generator().manual_seed(0)
    rows, up = (torch.randn(4, 32, generator=generator) for _ in "du")
    bank = bd.ExpertBank(
        [
            LoraExpert(name, {matrix: (rows[[k]], up[k, :, None])}, backbone.fingerprint())
            for k, name in enumerate("abcd")
        ]
    )
    ids = torch.tensor([backbone.tokenizer.tokenize(text).ids for text in ("EN: 3 xyz", "EN: 4 fgh")])
    read: list[torch.Tensor] = []
    hook = backbone.model.get_submodule(matrix).register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        found, alone = (arrow_shares(backbone, bank)(given) for given in (ids, ids[1:]))
        backbone.model(input_ids=ids)
    hook.remove()
    like = (read[0] @ (rows / rows.norm(dim=1, keepdim=True)).T.double()).abs()
    least = like.min(-1, keepdim=True).values
    expected = like.masked_fill(like == least, -torch.inf).softmax(-1).mean(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, found[1:])


def test_what_was_read_is_kept_and_is_what_dispatch_reads(
    bundle: bd.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"EN: {n}\nTR: fghi" for n in range(30, 100)]
    reader = Reader(bundle, tmp_path / "new")
    found, shares = reader.evidence(texts), reader.shares(texts)
    _, expected = dispatch(bundle, texts, 0)
    for name, view in expected.views.items():
        np.testing.assert_allclose(found.views[name], view, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(shares.sum(1), 1)
    monkeypatch.setattr("real.reader.first_pass", None)
    again = Reader(bundle, tmp_path / "new")
    np.testing.assert_array_equal(again.evidence(texts).views["hidden"], found.views["hidden"])
    np.testing.assert_array_equal(again.shares(texts[:64]), shares[:64])
    with pytest.raises(TypeError, match="not callable"):
        again.evidence(texts[1:])


def test_a_text_counts_once_for_each_domain(bundle: bd.Bundle) -> None:
    """Beginnings of documents are often alike, and others of the same seed are not."""
    alike = [TextDomain(name, lambda split: ["e1\n" * 90] * 9) for name in ("de", "fr")]
    drawn = prompts(bundle, [*alike, *list(quick_domains()[0].values())[2:]], alike[:1], 16, 3, 2)
    for own in drawn.values():
        assert len(set(zip(own.texts, own.sources, strict=True))) == len(own.texts) == len(own.shares)
    pure = drawn[PURE]
    assert [int((pure.shares[:, k] == 1).sum()) for k in range(2)] == [1, 1]
    assert list(pure.sources[:2]) == ["de", "fr"]
    assert (pure.sources == "pt").sum() > 3
    assert len(drawn[FOREIGN].texts) == 1


def test_tables_say_what_was_answered() -> None:
    corners = np.eye(3)
    known = {
        16: {
            PURE: Prompts(list("abcd"), corners[[0, 0, 1, 1]], np.array(["pt", "pt", "pt_BR", "pt_BR"])),
            BASE: Prompts(list("ab"), corners[[2, 2]], np.array(["x", "y"])),
            MIXED: Prompts(list("ab"), np.array([[0.5, 0.5, 0], [0.9, 0.1, 0]]), np.array(["", ""])),
            FOREIGN: Prompts(list("abcde"), np.full((5, 3), np.nan), np.array(["fi", "uk", "fi", "uk", "zh"])),
        }
    }

    def said(rows: list[int], foreign: float) -> Answer:
        return Answer(corners[rows], corners[rows], np.full(len(rows), foreign))

    answer = {
        PURE: said([0, 1, 1, 1], 0.0),
        BASE: said([2, 0], 0.0),
        MIXED: said([0, 0], 0.0),
        FOREIGN: Answer(corners[[0] * 5], corners[[0] * 5], np.array([1.0, -1.0, 1.0, 1.0, 1.0])),
    }
    pure, several, foreign, near = tables(["pt", "pt_BR"], ["fi", "uk", "zh"], known, {(16, "one"): answer})
    assert pure.rows == [
        ["16", "one", "0.750 ± 0.250", pure.rows[0][3], "6.908 ± 6.908", "0.500 ± 0.500", "0.500 ± 0.500"]
    ]
    assert str(pure.rows[0][3]).startswith("0.250 ± 0.2")
    assert several.rows[0][:5] == ["16", "one", "0.260 ± 0.240", "", ""]
    assert [str(cell)[:5] for cell in several.rows[0][5:]] == ["0.800"]
    assert [row[:2] for row in foreign.rows] == [["fi", "one"], ["uk", "one"], ["zh", "one"]]
    assert [str(row[2])[:5] for row in foreign.rows] == ["1.000", "0.500", ""]  # one prompt is too few
    assert "Distinct prompts, by length: 4;" in pure.note
    assert near.rows == [
        ["pt taken for pt_BR", "one", "0.500 ± 0.500"],
        ["pt_BR taken for pt", "one", "0.000 ± 0.000"],
    ]


@pytest.mark.slow
def test_the_smoke_test_prints_every_method_at_every_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real_dispatch.main(quick=True, work=tmp_path)
    told = capsys.readouterr().out
    for tokens in LENGTHS:
        for method in ("ours", *CLASSIFIERS, "Arrow"):
            assert told.count(f"| {tokens} | {method} | ") == 2
    assert told.count("pt_BR taken for pt | ") == 4
    assert "nan" not in told
