"""The comparison on real documents: its sets, its rivals' laws, its records, and a smoke run on a tiny model."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bayes_dispatch as bd
import real_documents
from bayes_dispatch.dispatcher.evidence.files import write_evidence
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.scoring.compare import compare_blends
from bayes_dispatch.inference.scoring.document_reader import TokenDocument
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from real.methods import (
    BLENDS,
    GROUPS,
    OURS,
    PAIR,
    ROUTERS,
    SEARCH,
    Contest,
    Nats,
    contest,
    evidence_of_build,
    judged,
    merged,
)
from real.quick import SETTINGS, quick_bundle, quick_domains
from real.records import BEST, Record, Records, tables
from real.routers import _aligned, _arrow_model, arrow, spectr
from real.sets import DocumentSet, document_sets
from tests.tiny import tiny_adapter, tiny_backbone

SETS = {each.name: each for each in document_sets(*quick_domains(), 60)}


@pytest.fixture(scope="module")
def contested(tmp_path_factory: pytest.TempPathFactory) -> Contest:
    directory = tmp_path_factory.mktemp("bundle")
    domains = list(quick_domains()[0].values())
    return contest(quick_bundle(directory), directory, domains, GROUPS, directory, SETTINGS)


def text_of(contested: Contest, each: DocumentSet, number: int) -> TokenDocument:
    return TokenDocument.of(each.case(0, number).document, contested.bundle.tokenizer)


def test_hard_routing_is_fitted_on_what_the_build_is(
    contested: Contest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtures and base's texts among it; what is made is kept, and what lies beside the bundle is taken as it is."""
    bundle, domains = contested.bundle, list(quick_domains()[0].values())
    made = evidence_of_build(bundle, tmp_path / "b", domains, tmp_path / "kept", SETTINGS)
    assert (made.labels >= 0).sum() == 4 * SETTINGS.pure_prompts
    assert (made.mixtures[:, -1] == 1).sum() == SETTINGS.pure_prompts
    assert len(made.labels) == 5 * SETTINGS.pure_prompts + SETTINGS.mixed_prompts
    monkeypatch.setattr("real.methods.training_evidence", None)
    again = evidence_of_build(bundle, tmp_path / "b", domains, tmp_path / "kept", SETTINGS)
    np.testing.assert_array_equal(again.evidence.views["hidden"], made.evidence.views["hidden"])
    with pytest.raises(TypeError, match="not callable"):
        evidence_of_build(bundle, tmp_path / "b", domains[::-1], tmp_path / "kept", SETTINGS)
    own = made.select(np.arange(5))
    write_evidence(tmp_path / "b.work" / "1" / "train.npz", *own)
    beside = evidence_of_build(bundle, tmp_path / "b", domains, tmp_path / "kept", SETTINGS)
    np.testing.assert_array_equal(beside.labels, own.labels)
    write_evidence(tmp_path / "b.work" / "2" / "train.npz", *own)
    with pytest.raises(ConfigError, match="expected evidence of one build, got"):
        evidence_of_build(bundle, tmp_path / "b", domains, tmp_path / "kept", SETTINGS)


def test_sets_of_documents() -> None:
    kinds = ["pure", "in turn", "near pairs in turn", "switching", "switching later", "short", "natural", "foreign"]
    assert list(dict.fromkeys(each.kind for each in SETS.values())) == kinds
    turn, switch, short = (SETS[name].case(0, 1) for name in ("de & fr", "de, then fr", "short prompts"))
    assert turn.owners[:2] in (("de", "fr"), ("fr", "de"))
    assert set(switch.owners) == {"fr"}
    assert switch.domains == ("de", "fr")
    late = SETS["de, later fr"].case(0, 1)
    assert list(dict.fromkeys(late.owners)) == ["de", "fr"]
    assert late.owners.count("de") in (1, 2, 3)
    assert short.document.prompt.count("EN:") == 2
    for case in (turn, switch):
        data, prompt = case.document.data, case.document.prompt_bytes
        assert data[:prompt].endswith(b"\n")
        assert 60 <= prompt < 80
        assert all(stop <= prompt and data[start:stop].startswith(b" ") for start, stop in case.shown)
        assert all(start > prompt and data[stop : stop + 1] == b"\n" for start, stop in case.document.ranges)
    assert "a" in switch.document.prompt
    assert SETS["de & fr"].case(0, 1) == turn != SETS["de & fr"].case(1, 1)
    both = SETS["both"].case(0, 0)
    assert (both.shown, both.owners) == (((0, 60),), ("both",))


def test_a_vertex_is_the_library_s_model_with_that_adapter(contested: Contest, tmp_path: Path) -> None:
    peft = tiny_adapter(tmp_path, seed=1, layers_to_transform=[2, 3])
    case, text = SETS["de & fr"].case(0, 0), text_of(contested, SETS["de & fr"], 0)
    with torch.no_grad():
        after = peft(input_ids=torch.tensor([text.ids])).logits[0, text.places].log_softmax(-1)
    (found,) = contested.scores([case], ["experts"], 0)
    assert found["fr"] == pytest.approx(judged(after, text), abs=1e-9)
    parts = {name: contested.under(text, np.eye(4)[[k]]) for k, name in enumerate(contested.bundle.experts)}
    true = torch.tensor(text.ids)[text.places + 1]
    sizes = np.split(np.arange(len(true)), np.cumsum(text.sizes)[:-1])
    right = sum(-parts[name][own, true[own]].sum() for name, own in zip(case.owners, sizes, strict=True))
    assert found["right expert"].total == pytest.approx(float(right), abs=1e-9)


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
def test_a_router_of_one_adapter_is_that_adapter(make: object, contested: Contest) -> None:
    backbone, bank = contested.bundle.model, bd.ExpertBank([contested.bundle.experts["fr"]])
    assert isinstance(backbone, TransformersBackbone)
    text = text_of(contested, SETS["fr"], 0)
    with torch.no_grad():
        found = make(backbone, bank)(torch.tensor([text.ids]))[0, text.places].log_softmax(-1)
        torch.testing.assert_close(found, contested.under(text, np.eye(4)[[1]]), rtol=0, atol=1e-6)
        several = make(backbone, contested.bundle.experts)(torch.tensor([text.ids]))[0, text.places].log_softmax(-1)
        assert float((several - found).abs().max()) > 0.01
        plain = backbone.model(input_ids=torch.tensor([text.ids])).logits[0, text.places].log_softmax(-1)
        torch.testing.assert_close(
            plain, contested.under(text, np.zeros((1, 4))), rtol=0, atol=1e-9
        )  # no trace is left


def test_routers_take_adapters_of_several_ranks_and_layers(tmp_path: Path) -> None:
    """With two adapters of which one is all that a token may have."""
    tiny_adapter(tmp_path / "a", seed=1, layers_to_transform=[2], r=2)
    tiny_adapter(tmp_path / "b", seed=2, layers_to_transform=[3], targets=("q_proj",))
    backbone = tiny_backbone()
    bank = bd.ExpertBank.from_peft(backbone, {name: tmp_path / name for name in "ab"})
    ids = torch.tensor([backbone.tokenizer.tokenize("EN: 1\nTR: abc").ids])
    with torch.no_grad():
        logits = [make(backbone, bank)(ids) for make in (arrow, spectr)]
    assert all(bool(each.isfinite().all()) for each in logits)


def test_arrow_s_adapters_have_the_model_s_type(tmp_path: Path) -> None:
    """As SpectR's do: otherwise one of them would have more digits than the other, and than our blends."""
    tiny_adapter(tmp_path, seed=1)
    backbone = tiny_backbone(dtype=torch.bfloat16)
    model = _arrow_model(backbone, bd.ExpertBank.from_peft(backbone, {"a": tmp_path}))
    assert {own.dtype for name, own in model.named_parameters() if ".task_0." in name} == {torch.bfloat16}


def test_spectr_routes_by_the_size_of_each_update() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(3, 9, 2, generator=generator), torch.randn(3, 2, 7, generator=generator)
    routing, rest = _aligned(tiny_backbone(dtype=torch.float32), up, down)
    torch.testing.assert_close(rest @ routing, up @ down)
    x = torch.randn(7, generator=generator)
    torch.testing.assert_close((routing @ x).norm(dim=1), (up @ down @ x).norm(dim=1))


def test_merging_and_its_search(contested: Contest) -> None:
    text, bank = text_of(contested, SETS["pt"], 0), contested.bundle.experts
    weights = np.array([0.3, 0.1, 0.4, 0.0])
    inside = bank.blend(np.append(weights, 0.2)).deltas
    for name, delta in merged(bank, weights[None]).deltas.items():
        x = torch.randn(1, delta.down.shape[1], dtype=torch.double)
        torch.testing.assert_close(delta(x), inside[name]._replace(c=inside[name].c.double())(x), rtol=0, atol=1e-6)
    case = SETS["pt"].case(0, 0)
    shown = TokenDocument.of(bd.Document(case.document.prompt, 0, case.shown), contested.bundle.tokenizer)
    assert shown.scored_bytes == 5 * len(case.shown)

    def loss(weights: np.ndarray) -> float:
        said = contested.under(shown, weights[None], following=False)[0, shown.places]
        return float(-said.mean()) + 0.05 * float(np.abs(weights).mean())

    found = contested.searched(case, 0)
    assert loss(found) < min(map(loss, [np.zeros(4), *np.eye(4)])) - 0.01
    assert np.abs(found).max() <= 1.5
    assert text.scored_bytes == 5 * len(case.owners)


def test_scales_have_no_routers_and_merge_all_the_same(contested: Contest, tmp_path: Path) -> None:
    backbone, generator = contested.bundle.model, torch.Generator().manual_seed(0)
    ranks = {matrix: rank for matrix, rank in backbone.adaptable().items() if ".3." in matrix}
    scales = [{name: 0.5 + torch.rand(rank, generator=generator) for name, rank in ranks.items()} for _ in "ab"]
    names = ("de", "fr")
    bank = bd.ExpertBank([bd.ExpertVector(*own, backbone.fingerprint()) for own in zip(names, scales, strict=True)])
    bundle = bd.Bundle(backbone, bank, bd.Dispatcher.flat(names))
    svf = contest(bundle, tmp_path, [quick_domains()[0][name] for name in names], GROUPS, tmp_path, SETTINGS)
    case, text = SETS["fr"].case(0, 0), text_of(contested, SETS["fr"], 0)
    (found,) = svf.scores([case], ["experts", *ROUTERS], 0)
    assert found.keys() == {*bank.components, "right expert"}
    assert found["fr"] == pytest.approx(judged(svf.under(text, np.eye(2)[[1]]), text), abs=1e-9)


def test_blends_score_as_compare_blends_says(contested: Contest) -> None:
    cases = [SETS["de & fr"].case(0, n) for n in range(2)]
    found = contested.scores(cases, [*BLENDS, PAIR], 3)
    ours = compare_blends(contested.bundle, [case.document for case in cases], BLENDS, seed=3)
    for name in BLENDS:
        bytes_of = [sum(b - a for a, b in case.document.ranges) for case in cases]
        np.testing.assert_allclose([own[name].total for own in found] / np.array(bytes_of), ours.values(name, "nll"))
    even = contested.under(text_of(contested, SETS["de & fr"], 0), np.array([[0.5, 0.5, 0, 0]]))
    assert found[0][PAIR].total <= judged(even, text_of(contested, SETS["de & fr"], 0)).total + 1e-9


def made_up(number: int, **scores: float) -> Record:
    nats = {name.replace("ours", OURS): Nats(10 * value, 0.5) for name, value in scores.items()}
    return Record("b", "de", "pure", 0, number, ["de", "fr", "base"], 20, 10, ["experts", "Arrow", OURS], nats)


def test_tables_say_what_was_measured() -> None:
    pooled, by_set = tables([made_up(0, base=3, de=1, fr=2, ours=2), made_up(1, base=4, de=2.5, fr=2, ours=2.5)])
    rows = {row[0]: row for row in pooled.rows}
    assert rows[BEST][1:] == ["0.750", "1.500", "-0.750 ± 0.250", "0.500", "2"]
    assert rows["base"][2:4] == ["3.500", "+1.250 ± 0.250"]
    assert rows[OURS][3] == "(2.250)"
    assert list(rows) == ["base", BEST, "de", "fr", OURS]
    assert "Left out, as they take LoRA experts alone: Arrow." in pooled.note
    assert by_set.columns == ["", "de"]
    assert by_set.rows[0] == ["base", "+1.250 ± 0.250"]


def test_records_of_several_runs_add_up(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.jsonl"
    kept = Records(path)
    kept.add(made_up(0, base=3))
    kept.add(replace(made_up(0, ours=2), groups=["uniform merge"]))
    kept.add(made_up(1, base=1))
    again = Records(path)
    assert again == kept
    assert len(again) == 2
    assert again["b", "de", 0, 0].scores == {"base": Nats(30, 0.5), OURS: Nats(20, 0.5)}
    assert again["b", "de", 0, 0].groups == ["experts", "Arrow", OURS, "uniform merge"]
    lines = path.read_text()
    path.write_text(lines + lines[:20])  # a run that was stopped while it wrote
    again = Records(path)
    assert again == kept
    again.add(made_up(2, base=1))
    assert len(Records(path)) == 3


@pytest.mark.slow
def test_the_smoke_test_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"quick": True, "json": tmp_path / "scores.jsonl", "sets": ["switching", "xx"]}
    real_documents.main(**given, methods=["experts", OURS])
    real_documents.main(**given)
    told = capsys.readouterr().out.split("**Documents: switching**")[-1]
    assert all(name in told for name in (*ROUTERS, *BLENDS, SEARCH, BEST, "right expert", "Documents: foreign"))
    assert "nan" not in told
    monkeypatch.setattr(Contest, "scores", None)
    real_documents.main(**given)
    assert told in capsys.readouterr().out
    real_documents.main(json=given["json"], only="tables")
    assert told in capsys.readouterr().out


@pytest.mark.slow
def test_costs_are_beside_base(capsys: pytest.CaptureFixture[str]) -> None:
    real_documents.main(quick=True, only="cost")
    told = capsys.readouterr().out
    assert "| base | " in told
    assert "1.00 ± 0.00" in told
    assert all(f"| {name} | " in told for name in GROUPS)


def test_scores_of_several_bundles_are_not_pooled(tmp_path: Path) -> None:
    kept = Records(tmp_path / "scores.jsonl")
    for bank in ("svf", "lora"):
        kept.add(replace(made_up(0, base=3, ours=2), bank=bank))
    with pytest.raises(typer.BadParameter, match="expected scores of one bundle in --json, got those of 2"):
        real_documents.main(json=kept.path, only="tables")


def test_bad_input_is_refused() -> None:
    for given, message in (
        ({"only": "cots"}, "expected cost or tables, got 'cots'"),
        ({"methods": ["arrow"]}, "expected a method of experts, .* got 'arrow'"),
        ({"sets": ["danish"], "quick": True}, "expected a set of pure, .* got 'danish'"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            real_documents.main(**given)
