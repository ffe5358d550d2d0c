"""The benchmark of first adapted blocks runs once, keeps what it made, and its tables say what was measured."""

import sys
from pathlib import Path

import numpy as np
import pytest
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import adapt_from
import bayes_dispatch as bd
from bayes_dispatch.experts.domains import EXPERT_DOMAINS
from bayes_dispatch.inference.scoring.evaluation import expert_report
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.storage import read_json, write_json
from dispatching.data import Sizes, shipped
from first_block import measuring
from first_block.costs import Cost, costs
from first_block.measuring import BLENDED, FULL, JUDGED, OWN, QUICK, Scores
from first_block.reporting import gain_kept, quality_tables, tables
from two_pass import cut

NAMES = [domain.name for domain in EXPERT_DOMAINS]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_smoke_test_prints_all_and_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt_from.main(block=[4], work=tmp_path, quick=True)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*NAMES, *JUDGED, *BLENDED, "from block 4", "below block 4"))
    assert "nan" not in printed
    own = f"shipped-{bd.load_bundle().dispatcher.fingerprint[:12]}.json"
    assert sorted(path.name for path in (tmp_path / "seed-0").iterdir()) == ["block-0", "block-4", own]
    for made in ("train_expert", "judge", "score_together", "compare_blends"):
        monkeypatch.setattr(measuring, made, None)
    adapt_from.main(block=[4], work=tmp_path, quick=True)
    timed = "**Quality and cost"
    again = capsys.readouterr().out
    parts = [[each for each in text.split("\n\n") if "%" not in each] for text in (printed, again)]
    assert timed in again
    assert parts[0] == parts[1]

    scores, bundle = measuring.scored(tmp_path, QUICK, 4), measuring.first_block_system(tmp_path, QUICK, 4)
    assert bundle.experts.adapt_from == 4
    report = expert_report(bundle.model, bundle.experts, EXPERT_DOMAINS[0], QUICK.judged_documents, QUICK.seed + 1)
    for ours, theirs in ((OWN, NAMES[0]), ("base", "base")):
        assert np.mean(scores.nll[NAMES[0]][ours]) == pytest.approx(report[theirs]["nll"][0], abs=1e-5)
        assert np.mean(scores.exact[NAMES[0]][ours]) == pytest.approx(report[theirs]["exact_match"][0])


def test_evidence_is_that_of_the_first_pass_below_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other hidden states of the same prompts, in files of their own; so are those of another model."""
    sizes = Sizes(pure=1, mixed=2, judged=1, mixtures=2)
    last, below = (shipped(0, sizes, tmp_path, block).train.evidence for block in (0, 2))
    np.testing.assert_array_equal(last.views["counts"], below.views["counts"])
    blocks = [evidence.views["hidden"][:, -128:] for evidence in (last, below)]  # of the last that ran
    assert not np.allclose(*blocks, atol=1e-2)
    assert "surprise" not in below.views
    np.testing.assert_array_equal(shipped(0, sizes, tmp_path).train.evidence.views["hidden"], last.views["hidden"])
    kept = len(list(tmp_path.iterdir()))
    monkeypatch.setattr(MambaFormerForCausalLM, "fingerprint", lambda self: "another")
    shipped(0, sizes, tmp_path)
    assert len(list(tmp_path.iterdir())) == kept * 3 // 2


@pytest.mark.slow
def test_one_prefill_serves_both_passes(bundle: bd.Bundle) -> None:
    """From block 0 a prompt is read twice, else once; particles share what is below the block, and equal ones a row."""
    depth = 3
    found = costs({0: bundle} | {block: cut(bundle, block) for block in (1, 2)}, 1)
    assert {block: each["mean"].evaluations for block, each in found.items()} == {0: 2 * depth, 1: depth, 2: depth}
    # How many of the 16 particles differ is of the evidence, which is of the blocks below the first adapted one.
    predictive = {block: each["predictive"].evaluations for block, each in found.items()}
    rows = {block: (predictive[block] - (block or depth)) / (depth - block) for block in found}
    assert all(4 <= count <= 16 and count == int(count) for count in rows.values()), rows
    assert all(cost.seconds > 0 and cost.ratio[0] > 0 for each in found.values() for cost in each.values())


def test_the_share_of_the_gain() -> None:
    share, error = gain_kept([3.0, 4.0, 5.0], [1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert (share, error) == (0.5, 0.0)
    assert gain_kept([3.0, 4.0], [1.0, 2.0], [3.0, 5.0])[0] == -0.25


def test_the_error_of_the_share_is_that_of_the_bootstrap() -> None:
    """Of 200 documents; a standard deviation of 4,000 resamples is right to 1.1%, the delta method to some per cent."""
    rng = np.random.default_rng(0)
    base = rng.normal(2, 0.3, 200)
    zero, own = base - rng.normal(0.5, 0.2, 200), base - rng.normal(0.3, 0.2, 200)
    rows = rng.integers(200, size=(4000, 200))
    shares = (base - own)[rows].mean(1) / (base - zero)[rows].mean(1)
    assert gain_kept(base.tolist(), zero.tolist(), own.tolist())[1] == pytest.approx(shares.std(), rel=0.1)


def made_up(own: float, blended: float, brier: float) -> Scores:
    pair = {"base": [1.0, 2.0], OWN: [1.0 - own, 2.0 - own]}
    blends = {"base": [2.0, 2.0], "posterior_mean": [blended] * 2, "posterior_predictive(16)": [blended, blended + 0.5]}
    dispatch = dict.fromkeys(JUDGED, 0.875) | {"Brier, mixes": brier}
    return Scores(dict.fromkeys(NAMES, pair), dict.fromkeys(NAMES, pair), dispatch, dict.fromkeys(BLENDED, blends))


def test_tables_say_what_was_measured() -> None:
    """Of one seed with the errors over documents, of two with those over seeds."""
    one = {0: [made_up(0.5, 1.0, 0.25)], 2: [made_up(0.25, 1.25, 0.5)]}
    spent = {block: dict.fromkeys(("mean", "predictive"), Cost(10.0, 0.02, (2.0, 0.1))) for block in one}
    curve, *quality, cost = tables(one, [one[0][0].dispatch], spent)
    lost = "+0.250"
    assert curve.rows[1] == ["2", "0.500", "1.250 ± 0.204", "0.875", "0.500", lost, lost, lost, "10", "2.00 ± 5%"]
    assert curve.rows[0][5:8] == ["", "", ""]
    assert cost.rows[0] == ["0", "10", "20.0", "2.00 ± 5%", "10", "20.0", "2.00 ± 5%"]
    nll, exact, kept, judged, two, less = quality
    assert nll.rows[0] == ["reverse", "1.500 ± 0.500", "1.000 ± 0.500", "1.250 ± 0.500"]
    assert [row[0] for row in exact.rows] == NAMES[:6]
    assert kept.rows[-1] == ["mean", "1.000", "0.500"]
    assert [row[0] for row in judged.rows] == ["last layer", "below block 2", "last layer, shipped dispatcher"]
    assert judged.rows[1] == ["below block 2", "0.875", "0.875", "0.500", "0.875"]
    assert two.rows[1][:4] == ["2", "2.000", "1.250", "1.500 ± 0.250"]
    assert less.rows == [["2", *["+0.250"] * 6]]
    assert less.columns[1:3] == ["pure, mean", "pure, predictive"]

    two_seeds = {0: one[0] * 2, 2: [made_up(0.25, 1.25, 0.5), made_up(0.5, 1.5, 0.5)]}
    _, _, kept, _, _, less = quality_tables(two_seeds, [one[0][0].dispatch] * 2)
    assert kept.rows[-1] == ["mean", "1.000 ± 0.000", "0.750 ± 0.250"]
    assert less.rows[0][1] == "+0.375 ± 0.125"


def test_what_is_kept_is_of_one_recipe(tmp_path: Path) -> None:
    adapt_from.claim(tmp_path, FULL, "a")
    adapt_from.claim(tmp_path, FULL.with_seed(3), "a")
    other = r"expected a directory of the same settings at .*, got another "
    with pytest.raises(typer.BadParameter, match=other):
        adapt_from.claim(tmp_path, QUICK, "a")
    with pytest.raises(typer.BadParameter, match=f"{other}'base model'"):
        adapt_from.claim(tmp_path, FULL, "b")
    write_json(tmp_path / "plan.json", read_json(tmp_path / "plan.json") | {"old_field": "1"})
    with pytest.raises(typer.BadParameter, match=f"{other}'old_field'"):
        adapt_from.claim(tmp_path, FULL, "a")


def test_blocks_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="expected first blocks of 0 … 4, got 5"):
        adapt_from.main(block=[2, 5], work=tmp_path, quick=True)
