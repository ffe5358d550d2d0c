"""The benchmark of merging: what it reads is what a generation would have read, and its table says what was lost."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bayes_dispatch as bd
import merging
from bayes_dispatch.inference.scoring.compare import score_together
from bayes_dispatch.inference.scoring.evaluation import held_out_documents
from bayes_dispatch.inference.scoring.held_out import domains_of
from bayes_dispatch.inference.two_pass.system import Dispatched
from merging import TOLERANCES, Continued


def test_the_table_says_what_was_lost() -> None:
    lost, rows, texts = [0.0, 0.01, 0.02, 0.04, 0.08], [16, 8, 4, 2, 1], [("a", "b")] * 4 + [("a", "c")]
    found = [
        Continued(np.array([row, row]), np.array([1 + each, 2 + each]), text)
        for row, each, text in zip(rows, lost, texts, strict=True)
    ]
    printed = merging.table({"pure": [found, found], "foreign": [found]})
    assert len(printed.rows) == 2 * len(TOLERANCES)
    assert printed.rows[0] == ["pure", "0", "16.0", "+0.0000 ± 0.0000", "1.000"]
    assert printed.rows[4] == ["", "0.01", "1.0", "+0.0800 ± 0.0000", "0.500"]


@pytest.mark.slow
def test_unmerged_it_is_the_score_of_the_document() -> None:
    """All bytes after the prompts, scored in one go by ``score_together``."""
    bundle, (domain,) = bd.load_bundle(), domains_of("rot13")
    documents = held_out_documents(domain, 3, 1)
    short = min(len(each.data) for each in documents)
    documents = [bd.Document(each.text[:short], each.prompt_bytes) for each in documents]
    posterior = Dispatched().posterior(bundle, [each.data[: each.prompt_bytes] for each in documents], 1)
    particles = bd.PosteriorPredictive(16).particles(posterior)
    rows, nll = merging.read_on(bundle, documents, particles, 0.0)
    scores = score_together(bundle.model, bundle.experts, documents, {"ours": particles})["ours"]
    assert rows.tolist() == [16, 16, 16]
    np.testing.assert_allclose(nll, [score.nll for score in scores], atol=2e-5)
    assert (merging.read_on(bundle, documents, particles, 0.01)[0] < 16).all()


@pytest.mark.slow
def test_the_smoke_test_prints_all_tolerances(capsys: pytest.CaptureFixture[str]) -> None:
    merging.main(quick=True)
    printed = capsys.readouterr().out
    assert all(f"| {tolerance:g} |" in printed for tolerance in TOLERANCES)
    assert "nan" not in printed
