"""Blocks of documents and prompts give what all of them give at once, in the same order. What is sent with a block is
small, and a process that gets some of them loads the bundle once. None of it needs Ray."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayes_dispatch.app import bulk
from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.app.bundle_at import BundleAt
from bayes_dispatch.errors import BundleError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.scoring.compare import compare_blends
from bayes_dispatch.inference.two_pass.first_pass import first_pass

BLENDS = ("thompson_sample", "posterior_predictive(6)", "refined_mean(5)", "add")
TEXTS = ["kfpa>apfk\nbcde>edcb\n", "37+58=95\n12+11=23\n44+44=88\n", "naïve: é", "kfpa>apfk\n", "a b c\n"]
DOCUMENTS = [Document(text, 4) for text in TEXTS]  # the first and the fourth have the same prompt


class Elsewhere:
    """Blocks are called as in other processes: all that goes there and comes back is pickled."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, work: Any, blocks: Sequence[Sequence[Any]], *constants: Any, progress: bool) -> list[Any]:
        sent = [pickle.dumps((work, block, constants)) for block in blocks]
        self.sizes = [len(block) for block in blocks]
        assert max(map(len, sent)) < 2000
        return [pickle.loads(pickle.dumps(work(block, *rest))) for work, block, rest in map(pickle.loads, sent)]


@pytest.fixture
def place(bundle64: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BundleAt:
    """Where the bundle lies; no process has loaded it, and blocks are small."""
    bundle64.save(tmp_path / "tiny")
    bulk._loaded.cache_clear()
    monkeypatch.setattr(bulk, "DOCUMENTS", 2)
    monkeypatch.setattr(bulk, "PROMPTS", 4)
    monkeypatch.setattr("bayes_dispatch.inference.two_pass.first_pass.PROMPTS_AT_ONCE", 2)
    return BundleAt.here(tmp_path / "tiny")


def test_a_bundle_that_is_saved_anew_while_it_is_loaded_is_not_the_one_that_was_named(
    place: BundleAt, bundle64: Bundle, tmp_path: Path, meanwhile: Callable[..., None]
) -> None:
    other = replace(bundle64, report={"note": "other"})
    meanwhile("bayes_dispatch.app.bundle_at.load_bundle", lambda: other.save(tmp_path / "tiny"))
    with pytest.raises(BundleError, match=r"expected the bundle .*, as where it was named, got"):
        place.load()


def test_blocks_of_documents_are_joined_to_what_all_give(place: BundleAt, bundle64: Bundle) -> None:
    mapped = Elsewhere()
    found = bulk.compare_in_blocks(mapped, place, DOCUMENTS, BLENDS, seed=4)
    expected = compare_blends(bundle64, DOCUMENTS, BLENDS, seed=4)
    assert mapped.sizes == [2, 2, 1]
    keys = ["document", "blend", "rows"]
    assert found.to_frame()[keys].equals(expected.to_frame()[keys])
    for one, other in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_allclose(one.scored.log_probability, other.scored.log_probability, atol=1e-9)
        np.testing.assert_allclose(one.mutual_information, other.mutual_information, atol=1e-9)
    assert bulk._loaded.cache_info().misses == 1


def test_blocks_of_prompts_are_joined_to_what_all_give(place: BundleAt, bundle64: Bundle) -> None:
    mapped = Elsewhere()
    found = bulk.evidence_in_blocks(mapped, place, bundle64.tokenizer, TEXTS)
    expected = first_pass(bundle64.model, bundle64.tokenizer, TEXTS).evidence
    assert mapped.sizes == [4, 1]
    assert found.views.keys() == expected.views.keys()
    for name, view in expected.views.items():
        np.testing.assert_array_equal(found.views[name], view)  # the same batches
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    assert not any(mask.any() for mask in found.missing.values())
    assert bulk._loaded.cache_info().misses == 1
