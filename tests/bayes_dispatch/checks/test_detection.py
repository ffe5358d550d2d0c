"""OOD AUROC and its standard error are those of brute force over pairs and of repetition; bad input is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from bayes_dispatch.checks.detection import AUROC, ood_auroc
from bayes_dispatch.errors import TensorError

scores = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12).map(np.array)


@settings(max_examples=60, deadline=None)
@given(inside=scores, outside=scores)
def test_area_and_error_by_pairs(inside: np.ndarray, outside: np.ndarray) -> None:
    """Ties count by half; DeLong's error from the matrix of all pairs."""
    wins = (outside[:, None] > inside) + 0.5 * (outside[:, None] == inside)
    variance = wins.mean(1).var(ddof=1) / len(outside) + wins.mean(0).var(ddof=1) / len(inside)
    found = ood_auroc(inside, outside)
    assert found.value == pytest.approx(wins.mean())
    assert found.standard_error == pytest.approx(np.sqrt(variance), abs=1e-9)
    assert (found.inside, found.outside) == (len(inside), len(outside))
    assert ood_auroc(outside, inside).value == pytest.approx(1 - found.value)


def test_error_by_repetition() -> None:
    """Normal scores one apart: the area is Φ(1/√2), and 250 repetitions scatter as the errors say.

    The mean area is within 5 standard errors, the ratio of sd to mean error within .23 of 1 (5 standard errors of an sd
    from 250); false alarms in fewer than 1 of 100,000 seeds, and the seed is fixed.
    """
    rng = np.random.default_rng(0)
    runs = [ood_auroc(rng.normal(size=120), rng.normal(1, 1, 60)) for _ in range(250)]
    values, errors = np.array([run.value for run in runs]), np.array([run.standard_error for run in runs])
    assert abs(values.mean() - norm.cdf(np.sqrt(0.5))) < 5 * values.std() / np.sqrt(250)
    assert abs(values.std() / errors.mean() - 1) < 0.23


def test_complete_separation() -> None:
    assert ood_auroc(np.array([0.1, 0.2]), np.array([0.3, 0.4, 0.5])) == AUROC(1.0, 0.0, 2, 3)


def test_bad_input() -> None:
    with pytest.raises(TensorError, match="expected at least 2 prompts of each kind, got 1 and 3"):
        ood_auroc(np.zeros(1), np.zeros(3))
    with pytest.raises(TensorError, match="expected finite outside scores, got 1"):
        ood_auroc(np.zeros(2), np.array([0.0, np.inf]))
