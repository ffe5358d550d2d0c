"""The benchmark of blends runs, keeps what it has, and its tables say what was measured."""

import sys
from pathlib import Path

import numpy as np
import pytest
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bayes_dispatch as bd
import blends
from bayes_dispatch.inference.scoring.compare import compare_blends
from bayes_dispatch.inference.scoring.evaluation import held_out_documents
from bayes_dispatch.inference.scoring.held_out import domains_of
from blends import ABLATIONS, BEST_FIXED, BLENDS, OURS, Scores


@pytest.mark.slow
def test_the_smoke_test_prints_all_blends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And run again it reads what it kept."""
    blends.main(sets=["add", "add & reverse"], work=tmp_path, quick=True)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*BLENDS, *ABLATIONS, BEST_FIXED, "pure documents", "mixed documents"))
    assert "nan" not in printed
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(blends, "judge", None)
    blends.main(sets=["add", "add & reverse"], work=tmp_path, quick=True)
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(blends, "bank_of", lambda bundle: "another")
    with pytest.raises(TypeError, match="not callable"):
        blends.main(sets=["add"], work=tmp_path, quick=True)


@pytest.mark.slow
def test_it_scores_as_compare_blends_does() -> None:
    bundle, (domain,) = bd.load_bundle(), domains_of("sort")
    documents = held_out_documents(domain, 3, 5)
    found = blends.judge(bundle, documents, 5)
    ours = compare_blends(bundle, documents, [bd.BestExpert(), bd.PosteriorPredictive(16)], seed=5)
    for name in ("best_expert", OURS):
        np.testing.assert_allclose(found.of(name, "nll"), ours.values(name, "nll"), atol=1e-5)
    best, right = found.of(BEST_FIXED, "nll"), found.of("sort", "nll")
    assert np.isnan(best).tolist() == np.isnan(found.of("64 particles", "nll")).tolist() == [False, False, True]
    assert (best <= np.minimum(right, found.of("posterior_mean", "nll")))[:2].all()
    assert all(found.whole(name) for name in found.names if name not in blends.COSTLY)
    assert not np.allclose(found.of(blends.FIXED, "nll"), found.of(OURS, "nll"), atol=1e-4)


def made_up(nll: dict[str, float], documents: int) -> Scores:
    rng = np.random.default_rng(0)
    names = [*BLENDS, *ABLATIONS, BEST_FIXED, "sort", "json"]
    values = np.array([nll.get(name, 1.0) + np.zeros(documents) for name in names])
    confidence = rng.uniform(0.5, 1, (len(names), 10 * documents))
    right = rng.random(confidence.shape) < confidence
    return Scores(np.array(names), np.ones(len(names), int), values, values, values, confidence, right)


def test_tables_say_what_was_measured() -> None:
    pure = made_up({OURS: 0.5, "sort": 0.25, BEST_FIXED: 0.375, "best_expert": 0.75}, 3)
    mixed = made_up({OURS: 0.5, "base": 0.5, BEST_FIXED: 0.25}, 4)
    first, second, ablations, claims = blends.tables({"sort": pure, "reverse & sort": mixed})
    assert [first.title, second.title] == ["Blends, pure documents", "Blends, mixed documents"]
    rows = {row[0]: row for row in first.rows}
    assert rows["best_expert"][1:3] == ["0.750", "+0.250 [+0.250, +0.250]"]
    assert rows[OURS][1:3] == ["0.500", ""]
    assert ablations.columns[1:] == ["pure", "mixed"]
    assert ablations.rows[0][1] == "+0.500 [+0.500, +0.500]"
    assert claims.rows[0][:4] == [
        "sort",
        "+0.250 [+0.250, +0.250]",
        "-0.250 [-0.250, -0.250] (best_expert)",
        "+0.125 [+0.125, +0.125]",
    ]
    assert claims.rows[1][1:3] == ["", "+0.000 [+0.000, +0.000] (base)"]
    assert blends.tables({"json": pure, "sort": mixed})[0].rows[0][3] == "0.500"  # of sort alone
    assert blends.tables({"rot13": pure})[0].rows[0][3] == ""


def test_what_was_scored_on_fewer_documents() -> None:
    """Pairs are those that both were scored on, and the table says so."""
    some = made_up({OURS: 0.5, BEST_FIXED: 0.25}, 2)
    keep = [i for i, name in enumerate(some.names) if name not in blends.COSTLY]
    others = made_up({OURS: 0.75}, 6)
    others = Scores(*(getattr(others, field)[keep] for field in vars(others)))
    both = Scores.concatenate([some, others])
    assert both.whole(OURS)
    assert not both.whole(BEST_FIXED)
    assert both.mean(OURS, "nll") == pytest.approx((2 * 0.5 + 6 * 0.75) / 8)
    assert both.mean(BEST_FIXED, "nll") == 0.25
    assert both.calibration_error(BEST_FIXED) == pytest.approx(some.calibration_error(BEST_FIXED))
    table = blends.tables({"sort": both})[0]
    rows = {row[0]: row for row in table.rows}
    assert rows[f"{BEST_FIXED} *"][1:3] == ["0.250", "-0.250 [-0.250, -0.250]"]
    assert "*: on the first quarter" in table.note


def test_unknown_sets_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match=r"expected a set of pure, .* got 'subtract'"):
        blends.main(sets=["subtract"], quick=True)
