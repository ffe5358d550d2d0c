"""All that a fitted program says about some prompts, as named groups of arrays with named dimensions.

The groups are those of arviz: what the program expects before and after it was fitted (globals, weights, replicated
evidence) and what was observed. Dimensions are chain, draw, prompt, expert and, for a view ``v``, ``v_feature``. Draws
are independent: one chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from bayes_dispatch.dispatcher.arviz_data import DRAWS, as_dataset, prompt_names
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher
from bayes_dispatch.dispatcher.fitting.svi import FitReport, isolated
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View
from bayes_dispatch.errors import EvidenceError

__all__ = ["fitted_groups"]


def fitted_groups(
    state: FittedDispatcher,
    evidence: Evidence,
    posterior: DispatchPosterior,
    labels: Float[np.ndarray, " weight"],
    report: FitReport | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Every group for N prompts, with as many draws of each kind as the posterior has of the weights.

    Draw s of the weights stands beside an independent draw s of the fitted globals: the posterior has them
    integrated out. Prior weights are of the prior that the posterior is of, in which one, two or three components share
    a prompt, and not of the sparse Dirichlet that SVI has in its place; of ``pi`` and ``kappa`` they do not depend.

    There is no ``log_likelihood``, on purpose: ``az.loo`` would misread it. Each prompt has weights of its own, and
    without the prompt they lie so far elsewhere that importance sampling fails (Pareto k above .7 at four prompts of
    five). Compare programs of the same views by ``Dispatcher.log_evidence`` of held-out prompts, which has the weights
    integrated out, in ``paired_comparison``.

    Args:
        state: the fitted program.
        evidence: of the N prompts.
        posterior: S draws of their weights.
        labels: ``(K+1,)`` label shares of the posterior's prior.
        report: of the fit, for its trace; ``None`` where it is not known.
        prompts: a unique name of each prompt; its number by default.
        seed: of the globals and of replicated evidence.

    Returns:
        - ``prior``, ``posterior``: ``weights`` (chain, draw, prompt, expert), and globals such as ``M`` (chain, draw,
          expert, hidden_feature), base among the experts;
        - ``prior_predictive``, ``posterior_predictive``: each view (chain, draw, prompt, v_feature), NaN where it is
          missing: they replicate what was observed;
        - ``observed_data``: each view as the program sees it, NaN where it is missing;
        - ``constant_data``: ``lengths`` (prompt), NaN where unknown;
        - ``sample_stats``: ``log_evidence`` (prompt), ``elbo`` (step), nats a prompt.

    Raises:
        EvidenceError: no prompts, or none of the program's views.
        TensorError: a view of another width, another number of names than prompts, or one of them twice.
    """
    observed, model = state.prompts(evidence), state.model
    if not len(observed):
        raise EvidenceError("expected at least 1 prompt, got none")
    coords: dict[str, Any] = {
        "chain": [0],
        "draw": np.arange(len(posterior.weights)),
        "expert": list(posterior.experts),
    }
    coords |= {_feature(view): np.arange(view.width) for view in model.views}
    coords["prompt"] = prompt_names(prompts, len(posterior))
    with isolated(seed, torch.float64), torch.no_grad():
        weights = torch.tensor(posterior.weights)  # (S, N, K+1)
        globals_ = state.globals.to(torch.float64)
        fitted = [globals_.draw() for _ in weights]
        prior = [model.sample_globals() for _ in weights]
        before = state.quadrature.prior(labels)
        shares = before.draw(weights[..., 0].numel(), np.random.default_rng([seed, 1])).reshape(weights.shape)
        blanks = [replace(observed.blank(), known=w) for w in torch.tensor(shares)]
        expected = [_replicate(state, sites, blank) for sites, blank in zip(prior, blanks, strict=True)]
        pairs = list(zip(fitted, weights, strict=True))
        replicated = [_replicate(state, sites, replace(observed.blank(), known=w)) for sites, w in pairs]
    groups = posterior.groups(prompts)
    groups["posterior"] = groups["posterior"].merge(_globals(model, fitted, coords))
    drawn = {"weights": ((*DRAWS, "prompt", "expert"), shares[None])}
    groups["prior"] = as_dataset(drawn, coords).merge(_globals(model, prior, coords))
    for name, parts in (("prior_predictive", expected), ("posterior_predictive", replicated)):
        views = {
            view.name: ((*DRAWS, "prompt", _feature(view)), _hidden(_stack(parts, view.name), observed, view))
            for view in model.views
        }
        groups[name] = as_dataset(views, coords)
    seen = {
        view.name: (("prompt", _feature(view)), _hidden(observed.observed[view.name].numpy(), observed, view))
        for view in model.views
    }
    groups["observed_data"] = as_dataset(seen, coords)
    lengths = observed.lengths.numpy()
    groups["constant_data"] = as_dataset({"lengths": (("prompt",), np.where(lengths > 0, lengths, np.nan))}, coords)
    if report is not None:
        trace = xr.Dataset({"elbo": (("step",), -report.losses)}, {"step": np.arange(len(report.losses))})
        trace.attrs = {"converged": int(report.converged), "elbo_rise": report.change}  # NetCDF has no bool
        groups["sample_stats"] = groups.get("sample_stats", xr.Dataset()).merge(trace).assign_attrs(trace.attrs)
    for dataset in groups.values():
        dataset.attrs |= {"inference_library": "bayes_dispatch", "temper": state.temper}
    return groups


def _globals(model: DispatchModel, sites: Sequence[Mapping[str, Tensor]], coords: Mapping[str, Any]) -> xr.Dataset:
    """S draws of the globals: ``pi`` (chain, draw, expert), ``M`` (chain, draw, expert, hidden_feature) and so on;
    base is among the experts."""
    own = {view.site(name): (view, name) for view in model.views for name in view.constants}
    of_base = {view.site(f"base_{name}") for view in model.views for name in view.constants}  # within those
    variables: dict[str, Any] = {}
    for name in sites[0]:
        if name in of_base:
            continue
        if name in own:
            view, parameter = own[name]
            values = torch.stack([view.with_base(each, parameter) for each in sites]).unsqueeze(0).numpy()
            variables[name] = (*DRAWS, "expert", _feature(view)), values
        else:
            variables[name] = (*DRAWS, "expert") if name == "pi" else DRAWS, _stack(sites, name)
    return as_dataset(variables, coords)


def _feature(view: View) -> str:
    return f"{view.name}_feature"


def _stack(parts: Sequence[Mapping[str, Tensor]], name: str) -> np.ndarray:
    """S values as one chain ``(1, S, ·)``."""
    return torch.stack([part[name] for part in parts]).unsqueeze(0).numpy()


def _hidden(values: np.ndarray, prompts: Prompts, view: View) -> np.ndarray:
    """Values ``(·, N, D)``, NaN where the prompts lack the view."""
    return np.where(prompts.missing[view.name].numpy()[:, None], np.nan, values)


def _replicate(state: FittedDispatcher, sites: Mapping[str, Tensor], blank: Prompts) -> dict[str, Tensor]:
    """Views of prompts of known weights, of which nothing is observed."""
    trace: Any = poutine.trace(state.model.sample_prompts).get_trace(sites, blank, torch.tensor(state.temper))
    return {view.name: trace.nodes[view.name]["value"] for view in state.model.views}
