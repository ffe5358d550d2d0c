"""Programs rank as they should, on densities that are right and of one variable."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from bayes_dispatch.checks.program_comparison import compare_programs, marginal_densities
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.fitting.svi import SVISettings, isolated
from bayes_dispatch.dispatcher.program.settings import Admixture, OneLabelMixture
from bayes_dispatch.errors import ConfigError, EvidenceError

if TYPE_CHECKING:
    from collections.abc import Callable

EXPERTS = ("sort", "reverse", "add")
PROGRAMS = {"full": Admixture(), "hidden": Admixture(views={"hidden": "vectors"}), "one label": OneLabelMixture()}
MEANS = np.array([[2.0, 0, 0, 0], [-1, 1.7, 0, 0], [-1, -1.7, 0, 0]])
CLASSES = np.array([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7]])


def world(mixed: bool, count: int = 120) -> tuple[Evidence, np.ndarray]:
    """Evidence of prompts that mix experts, or of one expert each; the weights of every other one are known."""
    rng = np.random.default_rng(0)
    w = rng.dirichlet(np.ones(3), count) if mixed else np.eye(3)[rng.integers(0, 3, count)]
    hidden = w @ MEANS + 0.25 * rng.standard_t(6, size=(count, 4))
    counts = np.stack([rng.multinomial(40, p) for p in w @ CLASSES])
    known = np.where(np.arange(count)[:, None] % 2 == 0, np.c_[w, np.zeros(count)], np.nan)
    missing = {"hidden": np.arange(count) % 10 == 9}
    return Evidence({"hidden": hidden, "counts": counts}, np.full(count, 50), missing), known


@pytest.fixture(scope="module")
def fits(settings: "Callable[..., dict[str, Any]]") -> "Callable[[bool], tuple[Evidence, dict[str, Dispatcher]]]":
    kept: dict[bool, tuple[Evidence, dict[str, Dispatcher]]] = {}

    def fit(mixed: bool) -> tuple[Evidence, dict[str, Dispatcher]]:
        if mixed not in kept:
            evidence, known = world(mixed)
            own = settings(steps=60, simulations=1_000, hidden=32, real_share=0.0)
            svi = SVISettings(steps=60, learning_rate=0.05, rounds=1)
            own |= {"svi": svi, "features": FeatureSettings(dimensions=2, folds=2)}
            programs = PROGRAMS if mixed else {name: PROGRAMS[name] for name in ("full", "one label")}
            made = {name: Dispatcher(EXPERTS, program=each, **own) for name, each in programs.items()}
            kept[mixed] = evidence, {name: each.fit(evidence, None, known) for name, each in made.items()}
        return kept[mixed]

    return fit


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [True, False])
def test_the_program_of_the_data_wins(fits: Any, mixed: bool) -> None:
    """By more than 2 standard errors over prompts, and far more than the Monte Carlo error."""
    evidence, dispatchers = fits(mixed)
    found = compare_programs(dispatchers, evidence, draws=25, proposals=128)
    table = found.table
    best = {"full", "hidden"} if mixed else {"one label"}
    assert set(table.index[: len(best)]) == best
    assert len(found.prompts) == 108
    first_worse = table.iloc[len(best)]
    assert float(first_worse["elpd_diff"]) > 2 * float(first_worse["dse"])
    assert float(first_worse["elpd_diff"]) > 5 * float(table["monte_carlo_error"].max())
    assert float(table.loc["one label", "monte_carlo_error"]) == 0 < float(table["monte_carlo_error"].max()) < 6


def draw(dispatcher: Dispatcher) -> dict[str, torch.Tensor]:
    with isolated(5, torch.float64):
        return dispatcher.state.globals.to(torch.float64).draw()


def test_density_against_draws_from_the_prior(fits: Any) -> None:
    """Within 5 standard errors of 100,000 prior draws and of the proposals, at six prompts; false alarm < 1e-4."""
    evidence, dispatchers = fits(True)
    state, sites, some = dispatchers["full"].state, draw(dispatchers["full"]), evidence.select(slice(0, 6))
    found = marginal_densities(state, [sites], some, "hidden", proposals=1_000, seed=2)
    with isolated(1, torch.float64):
        w = state.model.weights_prior(sites).sample((100_000, 1))
    likely = state.model.log_likelihood(sites, w, state.prompts(some))["hidden"].numpy()
    expected = logsumexp(likely, axis=0) - np.log(len(likely))
    error = np.exp(likely - expected).std(0) / np.sqrt(len(likely))
    assert (np.abs(found.log_density[0] - expected) < 5 * np.hypot(error, found.error)).all()
    assert found.error.max() < 0.25


def test_density_of_one_label_by_hand(fits: Any) -> None:
    evidence, dispatchers = fits(False)
    state, sites, some = dispatchers["one label"].state, draw(dispatchers["one label"]), evidence.select(slice(0, 6))
    found = marginal_densities(state, [sites], some, "hidden")
    means = np.vstack([sites["M"].numpy(), np.zeros(2)])
    variances = np.vstack([sites["s2"].numpy(), np.ones(2)])
    x = state.feature_maps["hidden"](some.views["hidden"])  # all of 50 tokens: a length factor of 1
    parts = stats.t(6, means, np.sqrt(variances)).logpdf(x[:, None]).sum(-1)  # (6, K+1)
    expected = logsumexp(parts + np.log(0.95 * sites["pi"].numpy() + 0.05 / 4), axis=1)
    np.testing.assert_allclose(found.log_density[0], expected, atol=1e-3)  # weights have a floor in likelihoods
    assert (found.error == 0).all()


def test_other_views_change_nothing(fits: Any) -> None:
    evidence, dispatchers = fits(True)
    state, sites = dispatchers["full"].state, draw(dispatchers["full"])
    less = Evidence({"hidden": evidence.views["hidden"]}, evidence.lengths, evidence.missing)
    a, b = (marginal_densities(state, [sites], each, "hidden", 32) for each in (evidence, less))
    assert np.array_equal(a.log_density, b.log_density)


def test_only_the_same_variable_is_compared(fits: Any) -> None:
    evidence, dispatchers = fits(True)
    _, others = fits(False)
    with pytest.raises(ConfigError, match="expected one projection of the view 'hidden', got another in 'other'"):
        compare_programs({"full": dispatchers["full"], "other": others["full"]}, evidence)
    with pytest.raises(ConfigError, match=r"expected programs that read the view 'counts', got \['hidden'\] in 'hidd"):
        compare_programs(dispatchers, evidence, view="counts")
    narrow = Dispatcher(EXPERTS)
    state = dispatchers["full"].state
    views = tuple(replace(view, width=view.width + (view.name == "counts")) for view in state.model.views)
    narrow._state = replace(state, model=replace(state.model, views=views))
    with pytest.raises(ConfigError, match="expected one kind and width of the view 'counts', got"):
        compare_programs({"full": dispatchers["full"], "narrow": narrow}, evidence, view="counts")


def test_bad_requests(fits: Any) -> None:
    evidence, dispatchers = fits(True)
    with pytest.raises(EvidenceError, match="expected at least 2 prompts with a view 'hidden', got 0"):
        compare_programs(dispatchers, Evidence({"counts": evidence.views["counts"]}))
    for change in ({"draws": 19}, {"proposals": 24}, {"seed": -1}):
        with pytest.raises(ConfigError, match="expected at least 2 programs, 20 draws, 25 proposals and a seed"):
            compare_programs(dispatchers, evidence, **change)
    with pytest.raises(ConfigError, match="got 1, 200, 512 and 0"):
        compare_programs({"full": dispatchers["full"]}, evidence)
