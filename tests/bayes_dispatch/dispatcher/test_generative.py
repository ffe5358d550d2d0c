"""The generative program's densities are those written by hand and by SciPy; labels alone are conjugate, missing is
absent, mini-batches are unbiased, and the order of experts does not matter."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from bayes_dispatch.dispatcher.program.generative import WEIGHT_FLOOR, DispatchModel, label_informed_start
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import CountsView, VectorsView, length_factor

K, D, C, N = 3, 2, 4, 6


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prompts(seed: int = 0) -> Prompts:
    """Observed evidence with labels where known; lengths from 0, unknown, on."""
    rng = np.random.default_rng(seed)
    counts = torch.tensor(rng.integers(0, 9, (N, C)), dtype=torch.float64)
    missing = {name: torch.zeros(N, dtype=torch.bool) for name in ("hidden", "counts")}
    observed = {"hidden": torch.tensor(rng.normal(size=(N, D))), "counts": counts}
    lengths = torch.tensor([0.0, 1.0, 20.0, 50.0, 128.0, 50.0])
    return Prompts(lengths, {"counts": counts.sum(-1)}, missing, observed, torch.tensor([0, 1, 2, -1, -1, 0]))


def simplex(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1]))


def globals_(seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DispatchModel(K, (VectorsView(D), CountsView(C))).sample_globals()


def density(model: DispatchModel, values: Mapping[str, Tensor], data: Prompts, temper: Tensor | None = None) -> Tensor:
    """Log density of weights, labels and evidence at globals of these values."""
    program = poutine.condition(model.sample_prompts, {"w": values["w"]})
    return poutine.trace(program).get_trace(values, data, temper).log_prob_sum()


both = DispatchModel(K, (VectorsView(D), CountsView(C)))


def test_density_by_hand() -> None:
    """Every term of the joint density, written out with SciPy, for each prompt on its own."""
    data, sites, w = prompts(), globals_(), simplex(1, N, K + 1)
    tau = torch.linspace(0.5, 2.0, N)
    concentration = sites["kappa"] * (0.95 * sites["pi"] + 0.05 / (K + 1))
    means = np.vstack([sites["M"].numpy(), sites["base_M"].numpy()])
    variances = np.vstack([sites["s2"].numpy(), sites["base_s2"].numpy()])
    classes = np.vstack([sites["Phi"].numpy(), sites["base_Phi"].numpy()])
    lt = float(sites["lt"])
    total = 0.0
    for n in range(N):
        total += stats.dirichlet(concentration.numpy()).logpdf(w[n].numpy())
        share = ((w[n] + WEIGHT_FLOOR) / (w[n] + WEIGHT_FLOOR).sum()).numpy()
        length = float(data.lengths[n])
        factor = (1 + 20 * lt / length) / (1 + 0.4 * lt) if length else 1.0
        between = share @ means**2 - (share @ means) ** 2
        sd = np.sqrt(float(tau[n]) * (share @ variances * factor + float(sites["xi"]) * between))
        total += stats.t(6, share @ means, sd).logpdf(data.observed["hidden"][n].numpy()).sum()
        alpha = float(sites["conc"] / tau[n]) * (share @ classes) + 1e-3
        counts = data.observed["counts"][n].numpy().astype(int)
        total += stats.dirichlet_multinomial(alpha, counts.sum()).logpmf(counts)
        if data.labels[n] >= 0:
            total += np.log(share[data.labels[n]])
    assert float(density(both, {**sites, "w": w}, data, tau)) == pytest.approx(total, rel=1e-10)


def test_permuting_experts_changes_no_density() -> None:
    data, sites, w = prompts(), globals_(), simplex(1, N, K + 1)
    order = torch.tensor([2, 0, 1])
    full = torch.cat([order, torch.tensor([K])])
    values = {**sites, "w": w}
    permuted = {
        name: value[:, full]
        if name == "w"
        else value[full]
        if name == "pi"
        else value[order]
        if value.ndim == 2
        else value
        for name, value in values.items()
    }
    ranks = torch.argsort(order)
    labels = torch.where(data.labels >= 0, ranks[data.labels.clamp(min=0)], data.labels)

    def joint(point: dict[str, Tensor], some: Prompts) -> float:
        trace = poutine.trace(poutine.condition(both, point)).get_trace(some)
        assert {"pi", "kappa", "M", "s2", "lt", "Phi", "conc", "w", "labels", "hidden", "counts"} <= set(trace.nodes)
        return float(trace.log_prob_sum())

    assert joint(permuted, replace(data, labels=labels)) == pytest.approx(joint(values, data), rel=1e-12)
    assert joint(permuted, data) != pytest.approx(joint(values, data), rel=1e-6)


@pytest.mark.parametrize("view", ["hidden", "counts"])
def test_a_missing_view_is_an_absent_view(view: str) -> None:
    """Its density is that of the program without the view, whatever the missing rows hold."""
    data, sites, w = prompts(), globals_(), simplex(1, N, K + 1)
    lacking = replace(data, missing={**data.missing, view: torch.ones(N, dtype=torch.bool)})
    without = DispatchModel(K, tuple(v for v in both.views if v.name != view))
    point = {**sites, "w": w}
    assert float(density(both, point, lacking)) == pytest.approx(float(density(without, point, data)), rel=1e-12)


def test_labels_alone_are_conjugate() -> None:
    """Without views the posterior of w is Dirichlet(prior + one-hot): differences of log densities show it."""
    sites, a, b = globals_(), simplex(1, N, K + 1), simplex(2, N, K + 1)
    alone = DispatchModel(K, ())
    data = Prompts(torch.zeros(N), {}, {}, labels=torch.tensor([0, 1, 2, -1, -1, 0]))
    onehot = torch.cat([torch.eye(K + 1)[:K], torch.zeros(1, K + 1)])[data.labels]
    posterior = torch.distributions.Dirichlet(alone.prior_concentration(sites) + onehot)
    got = density(alone, {**sites, "w": a}, data) - density(alone, {**sites, "w": b}, data)
    expected = (posterior.log_prob(a) - posterior.log_prob(b)).sum()
    assert float(got) == pytest.approx(float(expected), abs=1e-3)  # the floor of w inside the likelihoods


def test_known_mixtures_enter_at_their_weights() -> None:
    data, sites = prompts(), globals_()
    known = simplex(3, N, K + 1)
    known[::2] = torch.nan
    data = replace(data, known=known, labels=None)
    a, b = simplex(1, N, K + 1), simplex(2, N, K + 1)
    b[::2] = a[::2]
    drawn = poutine.condition(both.sample_prompts, {"w": a})(sites, data)
    torch.testing.assert_close(drawn[1::2], known[1::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn[::2], a[::2], atol=1e-5, rtol=0)
    assert float(density(both, {**sites, "w": a}, data)) == pytest.approx(float(density(both, {**sites, "w": b}, data)))


def test_the_prior_keeps_its_floor() -> None:
    """The concentration sums to kappa, and each component has at least its share of 5%, for one kappa or many."""
    sites = globals_()
    for kappa in (torch.tensor(0.7), torch.tensor([0.2, 4.0])):
        concentration = both.prior_concentration({**sites, "kappa": kappa})
        torch.testing.assert_close(concentration.sum(-1), kappa)
        assert (concentration >= 0.05 / (K + 1) * kappa.unsqueeze(-1)).all()


def test_length_factor() -> None:
    """One at 50 tokens and where the length is unknown; short prompts are noisier, towards a limit."""
    for lt in (0.1, 12.0, 300.0):
        factors = length_factor(torch.tensor([50.0, 0.0, 1.0, 10.0, 100.0, 1e9]), torch.tensor(lt))
        assert factors[:2].tolist() == pytest.approx([1, 1])
        assert (factors[2:].diff() < 0).all()
        assert float(factors[-1]) == pytest.approx(1 / (1 + 0.4 * lt), rel=1e-4)


def test_ragged_counts() -> None:
    """Moments of 20,000 draws of each row against Dirichlet-multinomial theory.

    24 means and variances at 5 standard errors: false alarms in fewer than 1 of 10,000 seeds, and the seed is fixed.
    """
    totals = torch.tensor([0.0, 1.0, 7.0, 60.0])
    sites = globals_(4) | {"conc": torch.tensor(3.0)}
    weights, draws = simplex(5, 4, K + 1), 20_000
    data = Prompts(torch.zeros(4), {"counts": totals}, {})
    likelihood = CountsView(C).likelihood(sites, weights, data, torch.ones(4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        counts = likelihood.sample(torch.Size([draws]))
    assert counts.shape == (draws, 4, C)
    assert torch.equal(counts.sum(-1), totals.expand(draws, 4))
    assert (counts >= 0).all()
    alpha = likelihood.concentration
    strength = alpha.sum(-1, keepdim=True)
    p, n = alpha / strength, totals.unsqueeze(-1)
    variance = n * p * (1 - p) * (n + strength) / (1 + strength)
    for values, mean in ((counts, n * p), ((counts - n * p) ** 2, variance)):
        error = values.std(0) / draws**0.5
        assert ((values.mean(0) - mean).abs() <= 5 * error + 1e-9).all()


def test_labels_start_the_experts() -> None:
    """Experts start at the moments of their prompts; experts without prompts start apart and finite."""
    data = prompts()
    start = label_informed_start(both, replace(data, labels=torch.tensor([0, 0, 1, -1, -1, 1])))
    means = data.observed["hidden"][[0, 1, 2, 5]].reshape(2, 2, D).mean(1)
    torch.testing.assert_close(start["M"][:2], means, atol=1e-5, rtol=0)
    torch.testing.assert_close(start["Phi"].sum(-1), torch.ones(K))
    for labels in (None, data.labels):
        values = label_informed_start(both, replace(data, labels=labels))
        assert all(torch.isfinite(value).all() for value in values.values())
        assert all((values[name] > 0).all() for name in ("s2", "lt", "Phi", "conc", "pi", "kappa"))
        assert torch.pdist(values["M"]).min() > 0.1


def test_mini_batches_are_unbiased() -> None:
    """The density of a batch is scaled to all prompts: over all batches of one prompt it averages to the whole."""
    data, sites, w = prompts(), globals_(), simplex(1, N, K + 1)
    whole = density(both, {**sites, "w": w}, data)
    scaled = []
    for row in torch.arange(N).unsqueeze(-1):
        program = poutine.condition(replace(both, batch_size=1).sample_prompts, {"w": w[row]})
        substituted = poutine.condition(program, {"prompts": row})
        scaled.append(float(poutine.trace(substituted).get_trace(sites, data).log_prob_sum()))
    assert np.mean(scaled) == pytest.approx(float(whole), rel=1e-10)
