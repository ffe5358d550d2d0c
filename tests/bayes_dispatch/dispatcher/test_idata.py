"""All that a fitted program says, as arviz data: named, in one chain, and the same numbers as anywhere else.

Laws: groups and dimensions; draws are the posterior's; globals and observations give the program's density; missing is
NaN; replicates have the program's mean; nothing for ``az.loo`` to misread; NetCDF is the identity; names are unique.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

from bayes_dispatch.dispatcher.arviz_data import write_netcdf
from bayes_dispatch.dispatcher.arviz_groups import fitted_groups
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.program.generative import WEIGHT_FLOOR
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.errors import ConfigError, EvidenceError, TensorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bayes_dispatch.conftest import Sample

EXPERTS = ("sort", "reverse", "add")
DRAWS = ("chain", "draw")


@pytest.fixture(scope="module")
def data(fitted: Dispatcher, fresh: "Sample") -> Any:
    return fitted.to_arviz(fresh.evidence, draws=40, seed=3)


def dims(dataset: Any) -> dict[str, tuple[str, ...]]:
    return {name: variable.dims for name, variable in dataset.data_vars.items()}


def test_groups_and_dimensions(data: Any) -> None:
    weights, per_expert = (*DRAWS, "prompt", "expert"), (*DRAWS, "expert", "hidden_feature")
    globals_ = {"weights": weights, "pi": (*DRAWS, "expert"), "kappa": DRAWS}
    globals_ |= {"lt": DRAWS, "xi": DRAWS, "conc": DRAWS}
    globals_ |= {"M": per_expert, "s2": per_expert, "Phi": (*DRAWS, "expert", "counts_feature")}
    views = {name: (*DRAWS, "prompt", f"{name}_feature") for name in ("hidden", "counts")}
    expected = {"posterior": globals_, "prior": globals_, "posterior_predictive": views, "prior_predictive": views}
    expected["observed_data"] = {name: found[2:] for name, found in views.items()}
    expected["constant_data"] = {"lengths": ("prompt",)}
    expected["sample_stats"] = {"log_evidence": ("prompt",), "elbo": ("step",)}
    assert {group: dims(data[group]) for group in expected} == expected
    for group in ("posterior", "prior", "posterior_predictive", "prior_predictive"):
        assert data[group].sizes["chain"] == 1
        assert data[group].sizes["draw"] == 40
    assert data["prior"].expert.values.tolist() == [*EXPERTS, "base"]


def test_draws_are_those_of_the_posterior(data: Any, fitted: Dispatcher, fresh: "Sample") -> None:
    posterior = fitted.posterior(fresh.evidence, draws=40, seed=3)
    assert np.array_equal(data["posterior"]["weights"].values[0], posterior.weights)
    assert np.array_equal(data["sample_stats"]["log_evidence"], posterior.log_evidence)
    assert np.array_equal(data["sample_stats"]["elbo"], -fitted.report.losses)
    raw = fitted.to_arviz(fresh.evidence, draws=5, seed=3, prompts=[f"p{i}" for i in range(60)])
    drawn = fitted.posterior(fresh.evidence, draws=5, seed=3).weights
    assert np.array_equal(raw["posterior"]["weights"].sel(prompt="p7").values[0], drawn[:, 7])
    with pytest.raises(TensorError, match="expected 60 prompt names, got 1"):
        fitted.to_arviz(fresh.evidence, prompts=["a"])
    with pytest.raises(TensorError, match="expected unique prompt names, got 'a' 60 times"):
        fitted.to_arviz(fresh.evidence, prompts=["a"] * 60)


def test_prior_weights_are_of_the_prior_that_is_served(fitted: Dispatcher, fresh: "Sample") -> None:
    """After labels of one expert, too: means within five standard errors of 1,200 draws, and as many exact zeros."""
    moved = copy.copy(fitted)
    moved.update([1] * 30)
    found = moved.to_arviz(fresh.evidence.select(slice(0, 30)), draws=40, seed=5)["prior"]["weights"].values
    weights, sizes = found.reshape(-1, 4), fitted.state.model.sizes
    prior = moved.posterior(fresh.evidence.select([0]), 1).prior
    assert prior is not None
    assert np.abs(weights.mean(0) - prior[0]).max() < 5 * 0.5 / np.sqrt(1_200)
    shared = np.bincount((weights > 0).sum(1), minlength=4)[1:] / 1_200
    assert np.abs(shared - sizes).max() < 5 * 0.5 / np.sqrt(1_200)


def test_globals_and_observations_are_the_programs(data: Any, fitted: Dispatcher, fresh: "Sample") -> None:
    """SciPy's density at a draw's weights and globals, base's constants among them, is that of the program."""
    draw, seen = data["posterior"].isel(chain=0, draw=11), data["observed_data"]
    tau, lt, rows = fitted.state.temper, float(draw["lt"]), [0, 3, 8]  # the last one's length is unknown
    sites = {name: torch.tensor(draw[name].values[:-1] if draw[name].ndim > 1 else draw[name].values)
             for name in ("pi", "kappa", "lt", "xi", "conc", "M", "s2", "Phi")}  # fmt: skip
    sites |= {f"base_{name}": torch.tensor(draw[name].values[-1]) for name in ("M", "s2", "Phi")}
    weights = torch.tensor(draw["weights"].values[rows])
    likely = fitted.state.model.log_likelihood(sites, weights, fitted.state.prompts(fresh.evidence.select(rows)), tau)
    for row, prompt in enumerate(rows):
        w = draw["weights"].values[prompt] + WEIGHT_FLOOR
        w /= w.sum()
        length = float(data["constant_data"]["lengths"][prompt])
        factor = 1.0 if np.isnan(length) else (1 + 20 * lt / length) / (1 + 0.4 * lt)
        means = draw["M"].values
        between = w @ means**2 - (w @ means) ** 2
        sd = np.sqrt(tau * (w @ draw["s2"].values * factor + float(draw["xi"]) * between))
        expected = stats.t(6, w @ means, sd).logpdf(seen["hidden"].values[prompt]).sum()
        assert float(likely["hidden"][row]) == pytest.approx(expected, rel=1e-6)
        counts = seen["counts"].values[prompt]
        alpha = float(draw["conc"]) / tau * (w @ draw["Phi"].values) + 1e-3
        expected = stats.dirichlet_multinomial(alpha, int(counts.sum())).logpmf(counts.astype(int))
        if not fresh.evidence.is_missing("counts")[prompt]:
            assert float(likely["counts"][row]) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(data["constant_data"]["lengths"].values[8])
    assert (draw["s2"] > 0).all()


def test_there_is_nothing_that_loo_would_take_for_a_likelihood(data: Any) -> None:
    """It would be that given each prompt's own weights, for which leave-one-out by importance sampling fails."""
    import arviz as az

    assert "log_likelihood" not in {
        name.strip("/") for name in (data.groups() if callable(data.groups) else data.groups)
    }
    with pytest.raises((TypeError, KeyError, ValueError, AttributeError)):
        az.loo(data)


def test_missing_views(data: Any, fresh: "Sample") -> None:
    """What was not observed is NaN, and is not replicated."""
    for view in ("hidden", "counts"):
        absent = fresh.evidence.is_missing(view)
        assert absent.any()
        for group in ("observed_data", "prior_predictive", "posterior_predictive"):
            holes = np.isnan(data[group][view].values)
            assert np.array_equal(holes, np.broadcast_to(absent[:, None], holes.shape))


def test_replicates(data: Any, fitted: Dispatcher, fresh: "Sample") -> None:
    """Replicated vectors have the mean of their program: 100 draws, 5.5 standard errors, false alarm < 1e-3. Fitting
    brings replicates nearer to what was observed."""
    posterior = fitted.posterior(fresh.evidence, draws=100, seed=0)
    groups = fitted_groups(fitted.state, fresh.evidence, posterior, fitted.state.shares, seed=1)
    own, drawn = groups["posterior"], groups["posterior_predictive"]["hidden"]
    mean = own["weights"].dot(own["M"], dim="expert")
    residual = (drawn - mean).mean(DRAWS)
    error = (drawn - mean).std(DRAWS) / 10
    assert float(np.abs(residual / error).max()) < 5.5
    totals = data["posterior_predictive"]["counts"].sum("counts_feature", skipna=False)
    seen = data["observed_data"]["counts"].sum("counts_feature", skipna=False)
    assert ((totals == seen) | np.isnan(seen)).all()
    distance = {
        group: float(np.abs(data[group]["hidden"].median(DRAWS) - data["observed_data"]["hidden"]).mean())
        for group in ("prior_predictive", "posterior_predictive")
    }
    assert distance["posterior_predictive"] < 0.5 * distance["prior_predictive"]


def test_families(sample: "Sample", settings: "Callable[..., dict[str, Any]]") -> None:
    """Prior draws of the tree are on the simplex too."""
    program = Admixture(families={"letters": ["sort", "reverse"]})
    dispatcher = Dispatcher(EXPERTS, program=program, **settings()).fit(sample.evidence, sample.labels)
    found = dispatcher.to_arviz(sample.evidence.select(slice(0, 8)), draws=30)
    for group in ("prior", "posterior"):
        np.testing.assert_allclose(found[group]["weights"].values.sum(-1), 1, atol=1e-6)


def test_arviz_reads_it(data: Any) -> None:
    import arviz as az

    summary = az.summary(data, var_names=["kappa"], kind="stats", round_to="none")
    assert float(summary["mean"].iloc[0]) == pytest.approx(float(data["posterior"]["kappa"].mean()), rel=1e-9)


def test_netcdf(data: Any, tmp_path: Path) -> None:
    """Every group survives; the file comes whole or not at all."""
    path = write_netcdf(data, tmp_path / "new" / "all.nc")
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        assert len(tree.children) == 7
        for name, group in tree.children.items():
            for variable, values in group.data_vars.items():
                np.testing.assert_array_equal(values, data[name][variable])
        assert tree["sample_stats"].attrs["converged"] in (0, 1)
        assert tree["prior"].expert.values.tolist() == [*EXPERTS, "base"]
    assert [file.name for file in path.parent.iterdir()] == ["all.nc"]


def test_a_loaded_dispatcher_knows_no_trace(fitted: Dispatcher, fresh: "Sample", tmp_path: Path) -> None:
    fitted.save(tmp_path)
    found = Dispatcher.load(tmp_path).to_arviz(fresh.evidence, draws=40, seed=3)
    assert set(found["sample_stats"].data_vars) == {"log_evidence"}


def test_of_no_prompts_there_is_nothing_to_tell(fitted: Dispatcher, fresh: "Sample") -> None:
    with pytest.raises(EvidenceError, match=r"^expected at least 1 prompt, got none$"):
        fitted.to_arviz(fresh.evidence.select([]))


def test_posterior_has_its_own_statistics() -> None:
    weights = np.random.default_rng(0).dirichlet([0.5, 1, 2], (7, 4))
    posterior = DispatchPosterior(weights, ("sort", "reverse", "base"), k_hat=np.arange(4.0))
    found = posterior.to_arviz(list("abcd"))
    assert found["sample_stats"]["k_hat"].sel(prompt="c") == 2
    assert set(found["sample_stats"].data_vars) == {"k_hat"}


@pytest.mark.parametrize("name", ["chain", "draw", "prompt", "expert"])
def test_views_cannot_be_called_like_dimensions(name: str) -> None:
    with pytest.raises(ConfigError, match=f"expected an identifier .*, got '{name}'"):
        Admixture(views={name: "vectors"})
