"""A dispatcher comes back from its files as it was, bit for bit; files that hold none are refused in one line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.errors import BundleError
from bayes_dispatch.storage import read_directory, write_directory

if TYPE_CHECKING:
    from tests.bayes_dispatch.conftest import Sample


def test_dispatcher_round_trip(fitted: Dispatcher, fresh: "Sample", tmp_path: Path) -> None:
    """Saving and loading changes nothing, bit for bit: draws, probabilities, simulations, settings, a second save."""
    fitted.save(tmp_path / "a")
    generator = torch.random.get_rng_state()
    loaded = Dispatcher.load(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), generator)
    for name in ("experts", "random_state", "svi", "features", "program"):
        assert getattr(loaded, name) == getattr(fitted, name)
    draws = [d.posterior(fresh.evidence, draws=5, seed=3).weights for d in (fitted, loaded)]
    assert np.array_equal(*draws)
    assert np.array_equal(fitted.predict_proba(fresh.evidence), loaded.predict_proba(fresh.evidence))
    for ours, theirs in zip(fitted.simulate(9, 4), loaded.simulate(9, 4), strict=True):
        assert np.array_equal(getattr(ours, "weights", ours), getattr(theirs, "weights", theirs))
    loaded.save(tmp_path / "b")
    assert [(tmp_path / d / f"dispatcher.{s}").read_bytes() for d in "a" for s in ("json", "safetensors")] == [
        (tmp_path / d / f"dispatcher.{s}").read_bytes() for d in "b" for s in ("json", "safetensors")
    ]


def test_the_default_device_changes_nothing(
    fresh: "Sample", settings: "Callable[..., dict[str, Any]]", tmp_path: Path
) -> None:
    """All is computed on the CPU where tensors are made elsewhere by default; here, where they hold nothing."""

    few, many = fresh.evidence.select(slice(12)), fresh.evidence.select(slice(48))

    def numbers(path: Path) -> list[np.ndarray]:
        given = settings()
        given["svi"] = replace(given["svi"], conditional_steps=5)
        dispatcher = Dispatcher(("a", "b", "c"), **given).fit(many, fresh.labels[:48])
        dispatcher.save(path)
        loaded, flat = Dispatcher.load(path), Dispatcher.flat(("a", "b", "c"))
        calibrated, of_flat = (
            each.calibrate(few, mixtures=fresh.weights[:12]).posterior(few, 2) for each in (loaded, flat)
        )
        truth, simulated = loaded.simulate(3, 2)
        scores = loaded.log_evidence(few)
        return [
            calibrated.weights,
            calibrated.calibrated_interval(0.5),
            truth,
            simulated.weights,
            scores,
            of_flat.calibrated_interval(0.5),
        ]

    expected = numbers(tmp_path / "cpu")
    torch.set_default_device("meta")
    try:
        found = numbers(tmp_path / "meta")
    finally:
        torch.set_default_device(None)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_dispatchers_of_other_formats(fitted: Dispatcher, tmp_path: Path) -> None:
    """Whole files, with a right digest, that are no dispatcher of ours."""
    fitted.save(tmp_path)
    document, arrays = read_directory(tmp_path, "dispatcher")
    document.pop("format")
    for changes, held in (
        ({"version": 99}, arrays),
        ({"experts": ["a", "b"]}, arrays),
        ({"experts": None}, arrays),
        ({"views": {"smell": 3}}, arrays),
        ({}, {name: array for name, array in arrays.items() if name != "globals.loc.M"}),
        ({}, {name: array for name, array in arrays.items() if not name.startswith("like.")}),
        ({}, {**arrays, "globals.loc.pi": np.zeros((2, 2), np.float32)}),
        ({"program": None}, arrays),
        *(({"temper": temper}, arrays) for temper in (-1.0, 0.0, "abc", None, float("nan"))),
        ({}, {name: array for name, array in arrays.items() if name != "globals.scale.M"}),
        ({}, {**arrays, "globals.scale.M": np.zeros(2, np.float32)}),
        ({}, {**arrays, "features.hidden.projection": np.zeros((6, 1))}),
        ({}, {**arrays, "like.missing.hidden": np.zeros(3, bool)}),
        ({}, {name: array for name, array in arrays.items() if name != "like.totals.counts"}),
        ({"svi": {"stepz": 3}}, arrays),
    ):
        write_directory(tmp_path, "dispatcher", {**document, **changes}, held)
        with pytest.raises(BundleError, match=r"^expected [^\n]*got [^\n]+$"):
            Dispatcher.load(tmp_path)
