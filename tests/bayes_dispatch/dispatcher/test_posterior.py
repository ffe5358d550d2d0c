"""The posterior's summaries are NumPy's, and its draws reach arviz and NetCDF as one chain."""

import copy
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, TensorError

NAMES = ("sort", "reverse", "base")


@pytest.fixture
def posterior() -> DispatchPosterior:
    return DispatchPosterior(np.random.default_rng(0).dirichlet([0.5, 1, 2], (7, 4)), NAMES)


def test_summaries(posterior: DispatchPosterior) -> None:
    w = posterior.weights
    assert len(posterior) == 4
    np.testing.assert_allclose(posterior.mean, w.mean(0))
    np.testing.assert_allclose(posterior.entropy, [-sum(p * np.log(p) for p in row) for row in w.mean(0)])
    counts = np.stack([np.bincount(w[:, prompt].argmax(1), minlength=3) for prompt in range(4)])
    np.testing.assert_allclose(posterior.probability_best, counts / 7)
    for probability in (0.5, 0.9):
        tail = 50 * (1 - probability)
        expected = np.percentile(w, [tail, 100 - tail], axis=0)
        np.testing.assert_allclose(posterior.interval(probability), expected, atol=1e-12)


def test_certainty() -> None:
    """All draws on one corner: no entropy, no width."""
    posterior = DispatchPosterior(np.tile([0.0, 1.0, 0.0], (5, 2, 1)), NAMES)
    assert posterior.entropy.tolist() == [0, 0]
    assert posterior.probability_best.tolist() == [[0, 1, 0]] * 2
    assert np.ptp(posterior.interval(), axis=0).max() == 0


def test_tables(posterior: DispatchPosterior) -> None:
    """A row for each weight, and a row for each prompt, with the numbers of the properties."""
    frame = posterior.to_frame(list("abcd"), probability=0.5)
    assert list(frame.columns) == ["mean", "sd", "low", "high", "probability_best"]
    assert frame.index.names == ["prompt", "expert"]
    assert frame.loc[("c", "base"), "mean"] == posterior.mean[2, 2]
    assert frame.loc[("b", "sort"), "sd"] == posterior.weights[:, 1, 0].std()
    np.testing.assert_array_equal(frame[["low", "high"]].to_numpy().T.reshape(2, 4, 3), posterior.interval(0.5))
    table = posterior.summary(list("abcd"), probability=0.5)
    best = posterior.probability_best.argmax(1)
    assert table.index.tolist() == list("abcd")
    assert table["best"].tolist() == [NAMES[k] for k in best]
    for prompt, k in zip("abcd", best, strict=True):
        assert (frame.loc[(prompt, NAMES[k])] == table.loc[prompt, list(frame.columns)]).all()
    np.testing.assert_array_equal(table["entropy"], posterior.entropy)
    assert "k_hat" not in table
    weighed = DispatchPosterior(posterior.weights, NAMES, k_hat=np.arange(4.0))
    assert weighed.summary()["k_hat"].tolist() == [0, 1, 2, 3]


def test_it_is_printed_in_a_line(posterior: DispatchPosterior) -> None:
    assert repr(posterior) == "DispatchPosterior(7 draws, 4 prompts: weights of sort, …, base)"
    one = DispatchPosterior(np.tile([0.25, 0.75, 0.0], (5, 1, 1)), NAMES)
    assert repr(one) == "DispatchPosterior(5 draws, 1 prompt: reverse .75, sort .25, base .00)"
    assert repr(one.select([])) == "DispatchPosterior(5 draws, 0 prompts: weights of sort, …, base)"


def test_select(posterior: DispatchPosterior) -> None:
    assert np.array_equal(posterior.select([2, 0]).weights, posterior.weights[:, [2, 0]])
    assert np.array_equal(posterior.select(slice(1, 3)).weights, posterior.weights[:, 1:3])
    assert posterior.select([1]).experts == NAMES
    for rows in ([4], [-5], [True]):
        with pytest.raises(TensorError, match=r"expected indices of 4 prompts, got [^\n]+$"):
            posterior.select(rows)


@pytest.mark.usefixtures("unchecked")
def test_concatenate(posterior: DispatchPosterior) -> None:
    """Halves are the whole; what is of other experts, draws, chains or kinds is refused in a line."""
    halves = [posterior.select([0, 1]), posterior.select([2, 3])]
    assert np.array_equal(DispatchPosterior.concatenate(halves).weights, posterior.weights)
    others = (
        replace(posterior, experts=("x", *NAMES[1:])),
        replace(posterior, weights=posterior.weights[:3]),
        replace(posterior, chains=7),
    )
    for parts in ([], *([posterior, other] for other in others)):
        with pytest.raises(TensorError, match=r"^expected [^\n]*got [^\n]+$"):
            DispatchPosterior.concatenate(parts)


def test_its_arrays_are_its_own(posterior: DispatchPosterior) -> None:
    """As given, and as sent elsewhere."""
    source, known = posterior.weights.copy(), np.arange(4.0)
    other = DispatchPosterior(source, NAMES, known, known)
    source[:], known[:] = 0, 0
    for sent in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert np.array_equal(sent.weights, posterior.weights)
        for array in (sent.weights, sent.k_hat, sent.log_evidence):
            assert array is not None
            assert array.any()
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


def test_names_are_distinct() -> None:
    with pytest.raises(TensorError, match=r"expected distinct names of experts, got \['a', 'a', 'base'\]"):
        DispatchPosterior(np.full((2, 1, 3), 1 / 3), ("a", "a", "base"))


third = np.full((2, 2, 3), 1 / 3)


@pytest.mark.parametrize(
    "weights", [third[0], third[:0], third[..., :2], 2 * third, third * [-1, 2, 2], third * np.nan, third * np.inf]
)
def test_bad_draws(weights: np.ndarray) -> None:
    with pytest.raises(TensorError, match=r"^expected weights .*got [^\n]+$"):
        DispatchPosterior(weights, NAMES)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"k_hat": np.zeros(3)}, TensorError, r"expected k_hat of shape \(2,\), got shape \(3,\)"),
        ({"log_evidence": np.zeros((2, 1))}, TensorError, r"expected log_evidence of shape \(2,\), got shape \(2, 1\)"),
        ({"prior": np.zeros((2, 3))}, TensorError, "expected prior and log_ratios together, got one without the other"),
        ({"k_hat": ["a", "b"]}, TensorError, "expected numbers as k_hat, got list"),
        ({"chains": 3}, TensorError, "expected as many draws of each of 3 chains, got 2 of all"),
        ({"chains": 0}, ConfigError, "expected chains to be a whole number ≥ 1, got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_statistics(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DispatchPosterior(third, NAMES, **given)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("probability", [0.0, 1.0, -0.5, 90.0, float("nan"), "a", None, [0.5, 0.9]])
def test_bad_intervals(posterior: DispatchPosterior, probability: Any) -> None:
    with pytest.raises(ConfigError, match="expected a probability between 0 and 1, got"):
        posterior.interval(probability)


def weights_of(data: Any) -> xr.DataArray:
    return data["posterior"]["weights"]


def test_arviz(posterior: DispatchPosterior) -> None:
    weights = weights_of(posterior.to_arviz(["a", "b", "c", "d"]))
    assert weights.dims == ("chain", "draw", "prompt", "expert")
    assert weights.sizes["chain"] == 1  # several would fake r-hat ≈ 1
    assert weights.expert.values.tolist() == list(NAMES)
    assert weights.prompt.values.tolist() == ["a", "b", "c", "d"]
    assert np.array_equal(weights.values[0], posterior.weights)
    assert weights_of(posterior.to_arviz()).prompt.values.tolist() == [0, 1, 2, 3]
    for call in (posterior.to_arviz, posterior.to_frame, posterior.summary):
        with pytest.raises(TensorError, match="expected 4 prompt names, got 1"):
            call(["a"])
        with pytest.raises(TensorError, match="expected unique prompt names, got 'b' 2 times"):
            call(["a", "b", "b", "c"])
        with pytest.raises(TensorError, match="expected 4 prompt names, got the text 'abcd'"):
            call("abcd")


def test_arviz_reads_it(posterior: DispatchPosterior) -> None:
    """arviz's own summary finds the mean of every weight."""
    import arviz as az

    summary = az.summary(posterior.to_arviz(), kind="stats", round_to="none")
    assert summary.shape[0] == 12
    np.testing.assert_allclose(summary["mean"].to_numpy(dtype=float), posterior.mean.ravel(), atol=1e-9)


def test_netcdf(posterior: DispatchPosterior, tmp_path: Path) -> None:
    path = posterior.to_netcdf(tmp_path / "new" / "posterior.nc")
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        assert weights_of(tree).dims == ("chain", "draw", "prompt", "expert")
        assert np.array_equal(weights_of(tree).values[0], posterior.weights)
        assert weights_of(tree).expert.values.tolist() == list(NAMES)
    assert [file.name for file in path.parent.iterdir()] == ["posterior.nc"]


def test_netcdf_is_written_whole_or_not_at_all(
    posterior: DispatchPosterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = posterior.to_netcdf(tmp_path / "posterior.nc")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        posterior.select([0]).to_netcdf(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
