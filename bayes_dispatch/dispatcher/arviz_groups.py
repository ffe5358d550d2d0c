"""All that a fitted program says about some prompts, as named groups of arrays with named dimensions.

The groups are those of arviz: what the program expects before and after it was fitted (globals, weights, replicated
evidence), what was observed, and how likely that was. Dimensions are chain, draw, prompt, expert and, for a view
``v``, ``v_feature``. Draws are independent: one chain.
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

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher
from bayes_dispatch.dispatcher.fitting.svi import FitReport, isolated
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View
from bayes_dispatch.errors import TensorError

__all__ = ["fitted_groups", "globals_dataset", "pointwise_groups", "posterior_groups"]

DRAWS = ("chain", "draw")


def posterior_groups(posterior: DispatchPosterior, prompts: Sequence[str] | None = None) -> dict[str, xr.Dataset]:
    """The draws of the weights, and what is known of each prompt's draws.

    Args:
        posterior: draws ``(S, N, K+1)``.
        prompts: a unique name of each prompt; its number by default.

    Returns:
        ``posterior``: ``weights`` (chain, draw, prompt, expert); the chains are 1, or those of NUTS. Where the
        posterior has them also ``sample_stats``: ``k_hat`` and ``log_evidence`` (prompt).

    Raises:
        TensorError: another number of names than prompts.
    """
    draws, count, width = posterior.weights.shape
    if prompts is not None and len(prompts) != count:
        raise TensorError(f"expected {count} prompt names, got {len(prompts)}")
    chains = getattr(posterior, "chains", 1)
    weights = posterior.weights.reshape(chains, draws // chains, count, width)
    coords = _coordinates(posterior, prompts)
    groups = {"posterior": _dataset({"weights": ((*DRAWS, "prompt", "expert"), weights)}, coords)}
    found = {"k_hat": posterior.k_hat, "log_evidence": posterior.log_evidence}
    stats = {name: (("prompt",), values) for name, values in found.items() if values is not None}
    if stats:
        groups["sample_stats"] = _dataset(stats, coords)
    return groups


def fitted_groups(
    state: FittedDispatcher,
    evidence: Evidence,
    posterior: DispatchPosterior,
    report: FitReport | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Every group for N prompts, with as many draws of each kind as the posterior has of the weights.

    Draw s of the weights stands beside an independent draw s of the fitted globals: the guide's answer has them
    integrated out. A prior draw of the weights is made under its own globals.

    Args:
        state: the fitted program.
        evidence: of the N prompts.
        posterior: S draws of their weights.
        report: of the fit, for its trace; ``None`` where it is not known.
        prompts: a unique name of each prompt; its number by default.
        seed: of the globals and of replicated evidence.

    Returns:
        - ``prior``, ``posterior``: ``weights`` (chain, draw, prompt, expert), and globals such as ``M`` (chain, draw,
          expert, hidden_feature), in which base has the constants of the program;
        - ``prior_predictive``, ``posterior_predictive``: each view (chain, draw, prompt, v_feature), NaN where it is
          missing: they replicate what was observed;
        - ``log_likelihood``: each view (chain, draw, prompt) *given the prompt's weights*, nats, 0 where it is missing.
          What to compare programs by is :func:`bayes_dispatch.checks.program_comparison.compare_programs`;
        - ``observed_data``: each view as the program sees it, NaN where it is missing;
        - ``constant_data``: ``lengths`` (prompt), NaN where unknown;
        - ``sample_stats``: ``k_hat`` and ``log_evidence`` (prompt) of resampled draws, ``elbo`` (step), nats a prompt.

    Raises:
        EvidenceError: none of the program's views.
        TensorError: a view of another width, or another number of names than prompts.
    """
    observed, model = state.prompts(evidence), state.model
    coords = _coordinates(posterior, prompts) | {_feature(view): np.arange(view.width) for view in model.views}
    with isolated(seed, torch.float64), torch.no_grad():
        weights = torch.tensor(posterior.weights)  # (S, N, K+1)
        globals_ = state.globals.to(torch.float64)
        fitted = [globals_.draw() for _ in weights]
        prior = [model.sample_globals() for _ in weights]
        expected = [_replicate(state, sites, observed.blank()) for sites in prior]
        pairs = list(zip(fitted, weights, strict=True))
        replicated = [_replicate(state, sites, replace(observed.blank(), known=w)) for sites, w in pairs]
        likely = [model.log_likelihood(sites, w, observed, state.temper) for sites, w in pairs]
    groups = posterior_groups(posterior, prompts)
    groups["posterior"] = groups["posterior"].merge(globals_dataset(model, fitted, posterior.experts))
    drawn = {"weights": ((*DRAWS, "prompt", "expert"), _stack(expected, "weights"))}
    groups["prior"] = _dataset(drawn, coords).merge(globals_dataset(model, prior, posterior.experts))
    for name, parts in (("prior_predictive", expected), ("posterior_predictive", replicated)):
        views = {
            view.name: ((*DRAWS, "prompt", _feature(view)), _hidden(_stack(parts, view.name), observed, view))
            for view in model.views
        }
        groups[name] = _dataset(views, coords)
    densities = {view.name: ((*DRAWS, "prompt"), _stack(likely, view.name)) for view in model.views}
    groups["log_likelihood"] = _dataset(densities, coords)
    seen = {
        view.name: (("prompt", _feature(view)), _hidden(observed.observed[view.name].numpy(), observed, view))
        for view in model.views
    }
    groups["observed_data"] = _dataset(seen, coords)
    lengths = observed.lengths.numpy()
    groups["constant_data"] = _dataset({"lengths": (("prompt",), np.where(lengths > 0, lengths, np.nan))}, coords)
    if report is not None:
        trace = xr.Dataset({"elbo": (("step",), -report.losses)}, {"step": np.arange(len(report.losses))})
        trace.attrs = {"converged": int(report.converged), "elbo_rise": report.change}  # NetCDF has no bool
        groups["sample_stats"] = groups.get("sample_stats", xr.Dataset()).merge(trace).assign_attrs(trace.attrs)
    for dataset in groups.values():
        dataset.attrs |= {"inference_library": "bayes_dispatch", "temper": state.temper}
    return groups


def globals_dataset(model: DispatchModel, sites: Sequence[Mapping[str, Tensor]], experts: Sequence[str]) -> xr.Dataset:
    """S draws of the globals: ``pi`` (chain, draw, expert), ``M`` (chain, draw, expert, hidden_feature) and so on.

    Args:
        model: the program.
        sites: its globals, S draws.
        experts: K+1 names, base last; it has constants in place of draws.
    """
    own = {name: (view, value) for view in model.views for name, value in view.base().items()}
    variables: dict[str, Any] = {}
    for name in sites[0]:
        values = _stack(sites, name)  # (1, S, ·)
        if name in own:
            view, base = own[name]
            last = np.broadcast_to(base.numpy().astype(values.dtype), (1, len(sites), 1, view.width))
            variables[name] = ((*DRAWS, "expert", _feature(view)), np.concatenate([values, last], axis=2))
        else:
            variables[name] = ((*DRAWS, "expert") if name == "pi" else DRAWS, values)
    features = {_feature(view): np.arange(view.width) for view in model.views}
    return _dataset(variables, {"chain": [0], "draw": np.arange(len(sites)), "expert": list(experts)} | features)


def pointwise_groups(
    model: DispatchModel,
    sites: Sequence[Mapping[str, Tensor]],
    experts: Sequence[str],
    view: str,
    log_density: Float[np.ndarray, "draw prompt"],
) -> dict[str, xr.Dataset]:
    """``posterior`` with S draws of the globals, and ``log_likelihood`` of a view ``(S, N)`` under each, for LOO."""
    draws, count = log_density.shape
    coords = {"chain": [0], "draw": np.arange(draws), "prompt": np.arange(count)}
    return {
        "posterior": globals_dataset(model, sites, experts),
        "log_likelihood": _dataset({view: ((*DRAWS, "prompt"), log_density[None])}, coords),
    }


def _coordinates(posterior: DispatchPosterior, prompts: Sequence[str] | None) -> dict[str, Any]:
    draws, count, _ = posterior.weights.shape
    chains = getattr(posterior, "chains", 1)
    return {
        "chain": np.arange(chains),
        "draw": np.arange(draws // chains),
        "prompt": np.arange(count) if prompts is None else list(prompts),
        "expert": list(posterior.experts),
    }


def _dataset(variables: Mapping[str, Any], coords: Mapping[str, Any]) -> xr.Dataset:
    """A dataset with those of the coordinates that its variables have."""
    used = {dim for dims, _ in variables.values() for dim in dims}
    kept = {name: values for name, values in coords.items() if name in used}
    return xr.Dataset(variables, kept, {"inference_library": "bayes_dispatch"})


def _feature(view: View) -> str:
    return f"{view.name}_feature"


def _stack(parts: Sequence[Mapping[str, Tensor]], name: str) -> np.ndarray:
    """S values as one chain ``(1, S, ·)``."""
    return torch.stack([part[name] for part in parts]).unsqueeze(0).numpy()


def _hidden(values: np.ndarray, prompts: Prompts, view: View) -> np.ndarray:
    """Values ``(·, N, D)``, NaN where the prompts lack the view."""
    return np.where(prompts.missing[view.name].numpy()[:, None], np.nan, values)


def _replicate(state: FittedDispatcher, sites: Mapping[str, Tensor], blank: Prompts) -> dict[str, Tensor]:
    """Weights (the known ones, or drawn) and views of prompts of which nothing is observed."""
    trace: Any = poutine.trace(state.model.sample_prompts).get_trace(sites, blank, torch.tensor(state.temper))
    drawn = {view.name: trace.nodes[view.name]["value"] for view in state.model.views}
    return {"weights": trace.nodes["_RETURN"]["value"], **drawn}
