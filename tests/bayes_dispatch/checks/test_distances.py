"""Agreement of posteriors: zero for equals, its floor for equals in law, and more for others."""

import numpy as np
import pytest
from scipy import stats

from bayes_dispatch.checks.distances import agreement
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, TensorError

ALPHA = np.array([[0.3, 0.5, 0.2], [4.0, 2.0, 1.0], [0.05, 3.0, 0.4], [20.0, 20.0, 20.0]])


def dirichlet(draws: int, seed: int, alpha: np.ndarray = ALPHA) -> DispatchPosterior:
    rng = np.random.default_rng(seed)
    return DispatchPosterior(np.stack([rng.dirichlet(a, draws) for a in alpha], axis=1), ("a", "b", "base"))


def test_distances_of_scipy() -> None:
    """With one subset and one half the KS distance is SciPy's, ties included."""
    ours, theirs = dirichlet(50, 0), dirichlet(100, 1, ALPHA + 0.3)
    found = agreement(ours, theirs, resolution=0.2)
    assert found.draws == (50, 50)
    for prompt in range(len(ALPHA)):
        for k in range(3):
            a, b = (np.maximum(p.weights[:, prompt, k], 0.2) for p in (ours, theirs))
            expected = np.mean([stats.ks_2samp(a, half).statistic for half in (b[:50], b[50:])])
            assert found.ks[prompt, k] == pytest.approx(expected)
            assert found.mean_ratio[prompt, k] == pytest.approx(a.mean() / b.mean())
            assert found.sd_ratio[prompt, k] == pytest.approx(a.std() / b.std())


@pytest.mark.parametrize("draws", [64, 1000, 5000])
def test_equals_in_law_are_at_their_floor(draws: int) -> None:
    """Over 12 components the mean distance is within a quarter of its floor; the seed is fixed."""
    found = agreement(dirichlet(draws, 0), dirichlet(4000, 1))
    assert found.draws == (min(draws, 2000), 2000)
    assert abs(found.excess_ks) < 0.25 * found.ks_floor.mean()
    assert abs(found.excess_total_variation) < 0.25 * found.total_variation_floor.mean()
    m, n = found.draws
    assert found.ks_floor.mean() == pytest.approx(0.8687 * np.sqrt(1 / m + 1 / n), rel=0.25)  # Kolmogorov's mean
    assert np.abs(np.log(found.mean_ratio)).mean() < 2 * np.log(found.mean_ratio_floor).mean()
    assert np.abs(np.log(found.sd_ratio)).mean() < 2 * np.log(found.sd_ratio_floor).mean()


def test_the_same_draws_are_nearer_than_the_floor() -> None:
    """Both halves are within the posterior, so that it is half as far from each as they are from each other."""
    found = agreement(dirichlet(4000, 1), dirichlet(4000, 1))
    assert found.excess_ks < 0
    np.testing.assert_allclose(found.mean_ratio, 1)
    np.testing.assert_allclose(found.sd_ratio, 1)


def test_a_shifted_posterior_is_far() -> None:
    """KS between the two Dirichlets' Beta marginals, up to three times the floor of a one-sided error."""
    shifted = ALPHA.copy()
    shifted[1] = [2.0, 4.0, 1.0]
    found = agreement(dirichlet(4000, 0, shifted), dirichlet(4000, 1))
    grid = np.linspace(0, 1, 2001)
    gap = np.abs(stats.beta(2, 5).cdf(grid) - stats.beta(4, 3).cdf(grid)).max()
    assert found.ks[1, :2] == pytest.approx([gap, gap], abs=0.05)
    assert (found.ks[1, :2] > 10 * found.ks_floor[1, :2]).all()
    assert (found.total_variation[1, :2] > 5 * found.total_variation_floor[1, :2]).all()
    assert found.mean_ratio[1, :2] == pytest.approx([0.5, 2.0], rel=0.05)
    assert abs((found.ks - found.ks_floor)[[0, 2, 3]].mean()) < 0.01


def test_errors() -> None:
    reference = dirichlet(100, 0)
    with pytest.raises(TensorError, match=r"expected the same prompts and components, got 3 prompts .* and 4 of"):
        agreement(dirichlet(100, 0, ALPHA[:3]), reference)
    with pytest.raises(TensorError, match="expected the same prompts and components"):
        agreement(DispatchPosterior(reference.weights, ("b", "a", "base")), reference)
    with pytest.raises(TensorError, match="expected at least 2 draws and 8 of the reference, got 100 and 7"):
        agreement(reference, dirichlet(7, 0))
    with pytest.raises(ConfigError, match="expected a resolution"):
        agreement(reference, reference, resolution=1.0)
