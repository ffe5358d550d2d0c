"""Evidence is checked once where it enters, and is its own; selecting and concatenating are those of its rows; its
files give it back."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.evidence.files import read_evidence, write_evidence
from bayes_dispatch.errors import EvidenceError

no_deadline = settings(deadline=None, max_examples=40)


@st.composite
def evidences(draw: st.DrawFn, least: int = 0) -> Evidence:
    """Any evidence of two views, of which some rows, and some lengths, are missing."""
    count = draw(st.integers(least, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    views = {"hidden": rng.normal(size=(count, 2)), "counts": rng.integers(0, 9, (count, 3))}
    lengths = rng.integers(1, 99, count) if draw(st.booleans()) else None
    names = ["hidden", "counts", *([] if lengths is None else ["lengths"])]
    missing = {name: rng.random(count) < 0.4 for name in names if draw(st.booleans())}
    return Evidence(views, lengths, missing)


def same(a: Evidence, b: Evidence) -> None:
    assert set(a.views) == set(b.views)
    assert all(np.array_equal(values, b.views[name]) for name, values in a.views.items())
    assert np.array_equal(a.known_lengths(), b.known_lengths())
    assert all(np.array_equal(a.is_missing(name), b.is_missing(name)) for name in [*a.views, "lengths"])


@no_deadline
@given(evidences(), st.data())
def test_splitting_and_concatenating_is_the_identity(evidence: Evidence, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(evidence)))
    same(Evidence.concatenate([evidence.select(slice(0, at)), evidence.select(slice(at, None))]), evidence)


@no_deadline
@given(evidences(least=1), st.data())
def test_selecting_composes(evidence: Evidence, data: st.DataObject) -> None:
    """Selecting twice is selecting the selected; arrays, tuples, masks and slices agree."""
    rows = data.draw(st.lists(st.integers(0, len(evidence) - 1), min_size=1, max_size=8))
    again = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    picked = evidence.select(rows)
    same(picked.select(again), evidence.select([rows[i] for i in again]))
    same(picked, evidence.select(np.array(rows)))
    same(picked, evidence.select(tuple(rows)))
    mask = np.isin(np.arange(len(evidence)), rows)
    same(evidence.select(mask), evidence.select(sorted(set(rows))))
    same(evidence.select(mask.tolist()), evidence.select(mask))
    same(evidence.select(rows[0]), evidence.select([rows[0]]))


def test_concatenating_fills_absent_views() -> None:
    both = Evidence.concatenate(
        [Evidence({"hidden": np.ones((2, 3))}), Evidence({"counts": np.ones((1, 4))}, np.array([9]))]
    )
    assert {name: values.shape for name, values in both.views.items()} == {"hidden": (3, 3), "counts": (3, 4)}
    assert both.is_missing("hidden").tolist() == [False, False, True]
    assert both.is_missing("counts").tolist() == [True, True, False]
    assert both.known_lengths().tolist() == [0, 0, 9]
    assert both.is_missing("lengths").tolist() == [True, True, False]


def test_arrays_are_the_hidden_view() -> None:
    evidence = Evidence.from_array(np.arange(6).reshape(3, 2))
    assert list(evidence.views) == ["hidden"]
    assert len(evidence) == 3
    assert evidence.views["hidden"].dtype == np.float64
    assert evidence.lengths is None
    assert evidence.is_missing("lengths").all()
    assert evidence.is_missing("counts").all()
    assert not evidence.is_missing("hidden").any()


@pytest.mark.usefixtures("unchecked")
def test_tensors_are_arrays() -> None:
    """As a model gives them: of half precision, or with gradients; alone, or in a list."""
    numbers = torch.tensor([[0.5, -2.0], [3.0, 4.0]])
    for tensors in (numbers.bfloat16(), numbers.clone().requires_grad_(), [*numbers.bfloat16().requires_grad_()]):
        evidence = Evidence({"hidden": tensors}, torch.tensor([3, 4]))  # type: ignore[arg-type]
        assert evidence.views["hidden"].tolist() == numbers.tolist()
        assert evidence.known_lengths().tolist() == [3, 4]
    shared = numbers.double()
    own = Evidence({"hidden": shared})  # type: ignore[dict-item]
    shared += 1
    assert own.views["hidden"].tolist() == numbers.tolist()


def test_what_a_missing_row_holds_is_ignored() -> None:
    hidden, counts = np.array([[1.0, 2.0], [np.nan, np.inf]]), np.array([[-3.0], [4.0]])
    evidence = Evidence(
        {"hidden": hidden, "counts": counts},
        np.array([np.nan, 7.0]),
        {name: np.array(mask) for name, mask in
         {"hidden": [False, True], "counts": [True, False], "lengths": [True, False]}.items()},
    )  # fmt: skip
    assert evidence.views["hidden"].tolist() == [[1, 2], [0, 0]]
    assert evidence.views["counts"].tolist() == [[0], [4]]
    assert evidence.known_lengths().tolist() == [0, 7]


def test_evidence_is_its_own() -> None:
    """It neither follows later changes of the user's arrays, nor makes them read-only, nor can be changed."""
    hidden, lengths, mask = np.zeros((2, 2)), np.ones(2), np.array([False, True])
    evidence = Evidence({"hidden": hidden}, lengths, {"hidden": mask})
    hidden += 1
    lengths += 1
    mask[:] = False
    for sent in (evidence, pickle.loads(pickle.dumps(evidence))):
        assert sent.views["hidden"].sum() == 0
        assert sent.known_lengths().tolist() == [1, 1]
        assert sent.is_missing("hidden").tolist() == [False, True]
        for array in (sent.views["hidden"], sent.lengths, sent.missing["hidden"]):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


ones = np.ones((3, 2))


@pytest.mark.parametrize(
    ("views", "lengths", "missing"),
    [
        ({}, None, {}),
        ({"hidden": np.array([[1.0], [np.nan]])}, None, {}),
        ({"hidden": np.array([[1.0], [np.inf]])}, None, {}),
        ({"counts": np.array([[1.0], [-1.0]])}, None, {}),
        ({"hidden": ones, "counts": ones[:2]}, None, {}),
        ({"hidden": ones[0]}, None, {}),
        ({"hidden": ones[:, :0]}, None, {}),
        ({"hidden": np.array([["a", "b"]])}, None, {}),
        ({"hidden": np.array([[10**400]])}, None, {}),
        ({"hidden": ones + 1j}, None, {}),
        ({"hidden": ones}, np.ones(2), {}),
        ({"hidden": ones}, np.ones((3, 1)), {}),
        ({"hidden": ones}, np.array([1, 0, 2]), {}),
        ({"hidden": ones}, np.array([1, -4, 2]), {}),
        ({"hidden": ones}, np.array([1, np.nan, 2]), {}),
        ({"hidden": ones}, None, {"counts": np.zeros(3, bool)}),
        ({"hidden": ones}, None, {"lengths": np.zeros(3, bool)}),
        ({"hidden": ones}, None, {"hidden": np.zeros(2, bool)}),
        ({"hidden": ones}, None, {"hidden": np.zeros(3)}),
        ({"hidden": ones}, None, {"hidden": [[True], [True, False]]}),
        ({"hidden": ones}, None, [np.zeros(3, bool)]),
        ([ones], None, {}),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_evidence(views: dict[str, np.ndarray], lengths: np.ndarray | None, missing: dict[str, np.ndarray]) -> None:
    with pytest.raises(EvidenceError, match=r"^expected .*got [^\n]+$"):
        Evidence(views, lengths, missing)


def test_a_view_that_is_nan_is_told_how_to_be_missing() -> None:
    """And so it is, as it is told."""
    views = {"hidden": np.array([[1.0], [np.nan]])}
    with pytest.raises(EvidenceError, match=r"numbers in 'hidden', or missing=\{'hidden': mask\} of .*, got nan at"):
        Evidence(views)
    assert Evidence(views, missing={"hidden": np.array([False, True])}).is_missing("hidden").tolist() == [False, True]


@pytest.mark.parametrize("indices", [[3], np.array([-4]), np.array([0.5]), [True, False], "a"])
def test_bad_indices(indices: object) -> None:
    with pytest.raises(EvidenceError, match=r"^expected indices of 3 prompts, got [^\n]+$"):
        Evidence.from_array(ones).select(indices)


def test_bad_concatenations() -> None:
    with pytest.raises(EvidenceError, match="expected at least one piece of evidence, got none"):
        Evidence.concatenate([])
    with pytest.raises(EvidenceError, match=r"one width, got widths \[1, 2\]"):
        Evidence.concatenate([Evidence.from_array(ones), Evidence.from_array(ones[:, :1])])


def endless() -> bytes:
    """A file of a few hundred bytes whose array would take 80 TB."""
    header, file = io.BytesIO(), io.BytesIO()
    described = {"descr": "<f8", "fortran_order": False, "shape": (10**7, 10**6)}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(file, "w") as whole:
        whole.writestr("hidden.npy", header.getvalue())
    return file.getvalue()


def test_evidence_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "evidence.npz"
    for name in ("embedding", "file", "labels"):
        with pytest.raises(EvidenceError, match=rf"^expected evidence of the views hidden, .* got \['{name}'\]$"):
            write_evidence(path, Evidence({"hidden": ones, name: ones}, np.array([4, 5, 6])))
    assert not path.exists()


def test_evidence_files(tmp_path: Path) -> None:
    path = tmp_path / "evidence.npz"
    labels = np.array([0, 1, -1])
    np.savez(path, hidden=ones, counts=2 * ones, lengths=np.array([4, 5, 6]), labels=labels)
    evidence, got, mixtures = read_evidence(path)
    same(evidence, Evidence({"hidden": ones, "counts": 2 * ones}, np.array([4, 5, 6])))
    assert got is not None
    assert np.array_equal(got, labels)
    assert mixtures is None

    whole = path.read_bytes()
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, hidden=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    encrypted = bytearray(whole)
    for name in (b"PK\x01\x02", b"PK\x03\x04"):  # where an entry's flags are: after its signature, and versions
        encrypted[whole.index(name) + (8 if name[2] == 1 else 6)] |= 1
    contents = (b"", b"PK no zip", whole[: len(whole) // 2], pickled.read_bytes(), bytes(encrypted), endless())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(EvidenceError, match=r"^expected an? [^\n]*got[^\n]+$"):
            read_evidence(path)
    np.savez(path, hiden=ones)
    with pytest.raises(EvidenceError, match=r"got hiden$"):
        read_evidence(path)
    np.savez(path, labels=labels)
    with pytest.raises(EvidenceError, match="at least one view"):
        read_evidence(path)
    with pytest.raises(EvidenceError, match="No such file"):
        read_evidence(tmp_path / "none.npz")
