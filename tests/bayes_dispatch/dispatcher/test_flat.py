"""A flat dispatcher: its posterior is the Dirichlet that it says, for every prompt; labels move it, files keep it."""

from pathlib import Path

import numpy as np
import pytest

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.exact.cells import prompt_generators
from bayes_dispatch.dispatcher.fitting.flat import Dirichlets
from bayes_dispatch.errors import ConfigError, NotFittedError

EVIDENCE = Evidence({"counts": np.ones((3, 4))}, np.array([5.0, 6.0, 7.0]))


def test_the_posterior_is_the_dirichlet() -> None:
    """Means and variances of 20,000 draws are within five standard errors: a false alarm in 100,000 runs or so."""
    flat = Dispatcher.flat(["a", "b", "c"], concentration=2.0)
    draws = flat.posterior(EVIDENCE, draws=20_000, seed=0).weights
    assert flat.fitted
    assert flat.views == ()
    variance = 0.25 * 0.75 / 9  # of a component of Dirichlet(2, 2, 2, 2)
    np.testing.assert_allclose(draws.mean(0), 0.25, rtol=0, atol=5 * (variance / 20_000) ** 0.5)
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.06)
    np.testing.assert_allclose(flat.predict_proba(EVIDENCE), 0.25, rtol=0, atol=1e-3)
    assert not np.array_equal(draws[:, 0], draws[:, 1])
    alone = flat.posterior(EVIDENCE.select(np.array([1])), draws=8, seed=[7]).weights
    np.testing.assert_array_equal(alone[:, 0], flat.posterior(EVIDENCE, draws=8, seed=[1, 7, 2]).weights[:, 1])


def test_the_largest_of_sparse_weights() -> None:
    """Where one weight has nearly all, it is each with its mean; draws agree where none of this holds."""
    sparse = Dirichlets(np.array([[0.005, 0.001, 0.001], [1e-4, 3e-4, 4e-4]]))
    np.testing.assert_allclose(sparse.probability_best(), [[5 / 7, 1 / 7, 1 / 7], [1 / 8, 3 / 8, 4 / 8]], atol=2e-3)
    some = Dirichlets(np.array([[0.05, 0.3, 1.0], [2.0, 3.0, 0.01], [30.0, 31.0, 5.0]]))
    draws, _ = some.draw(40_000, prompt_generators(0, 3))
    shares = (draws.argmax(-1)[..., None] == np.arange(3)).mean(0)
    np.testing.assert_allclose(some.probability_best(), shares, atol=5 * 0.5 / 200)


def test_labels_move_it_and_files_keep_it(tmp_path: Path) -> None:
    flat = Dispatcher.flat(["a", "b"])
    flat.update([0] * 30)
    assert flat.posterior(EVIDENCE, draws=2000, seed=1).mean[0].argmax() == 0
    flat.save(tmp_path / "flat")
    again = Dispatcher.load(tmp_path / "flat")
    assert again.fingerprint == flat.fingerprint != Dispatcher.flat(["a", "c"]).fingerprint
    draws = [each.posterior(EVIDENCE, draws=9, seed=3).weights for each in (flat, again)]
    np.testing.assert_array_equal(*draws)


def test_what_needs_examples_says_so() -> None:
    flat = Dispatcher.flat(["a", "b"])
    with pytest.raises(NotFittedError, match="expected a dispatcher that was fitted on examples, got a flat one"):
        flat.log_evidence(EVIDENCE)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="concentration"):
            Dispatcher.flat(["a", "b"], concentration=bad)
