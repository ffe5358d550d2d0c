"""Named arrays as arviz data; the only module that imports arviz, and it knows arrays alone.

Independent draws are one chain: several would fake r-hat ≈ 1.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_dispatch.errors import TensorError
from bayes_dispatch.storage import write_output

__all__ = [
    "DRAWS",
    "as_dataset",
    "bulk_ess",
    "pareto_smoothed",
    "prompt_names",
    "rank_r_hat",
    "to_inference_data",
    "weight_groups",
    "write_netcdf",
]

DRAWS = ("chain", "draw")


def prompt_names(prompts: Sequence[str] | None, count: int) -> list[Any]:
    """A unique name of each of ``count`` prompts; their numbers by default.

    Raises:
        TensorError: another number of names, or one of them twice.
    """
    if isinstance(prompts, str):
        raise TensorError(f"expected {count} prompt names, got the text {prompts!r}")
    names: list[Any] = list(range(count)) if prompts is None else list(prompts)
    if len(names) != count:
        raise TensorError(f"expected {count} prompt names, got {len(names)}")
    if len(set(names)) < count:
        twice = next(name for name in names if names.count(name) > 1)
        raise TensorError(f"expected unique prompt names, got {twice!r} {names.count(twice)} times")
    return names


def weight_groups(
    weights: Float[np.ndarray, "draw prompt expert"],
    experts: Sequence[str],
    prompts: Sequence[str] | None = None,
    chains: int = 1,
    statistics: Mapping[str, Float[np.ndarray, " prompt"] | None] | None = None,
) -> dict[str, xr.Dataset]:
    """Draws of weights, chain after chain, and what is known of each prompt's draws.

    Args:
        weights: ``(S, N, K+1)``.
        experts: K+1 names.
        prompts: a unique name of each prompt; its number by default.
        chains: that the S draws are of.
        statistics: by name ``(N,)``; ``None`` where there is none.

    Returns:
        ``posterior``: ``weights`` (chain, draw, prompt, expert), and ``sample_stats`` (prompt) where there are any.

    Raises:
        TensorError: another number of names than prompts, or one of them twice.
    """
    draws, count, _ = weights.shape
    split = weights.reshape(chains, draws // chains, count, len(experts))
    coords = {"chain": np.arange(chains), "draw": np.arange(draws // chains), "expert": list(experts)}
    coords |= {"prompt": prompt_names(prompts, count)}
    groups = {"posterior": as_dataset({"weights": ((*DRAWS, "prompt", "expert"), split)}, coords)}
    found = {name: (("prompt",), values) for name, values in (statistics or {}).items() if values is not None}
    return groups | ({"sample_stats": as_dataset(found, coords)} if found else {})


def as_dataset(variables: Mapping[str, Any], coords: Mapping[str, Any]) -> xr.Dataset:
    """A dataset with those of the coordinates that its variables have."""
    used = {dim for dims, _ in variables.values() for dim in dims}
    kept = {name: values for name, values in coords.items() if name in used}
    return xr.Dataset(variables, kept, {"inference_library": "bayes_dispatch"})


def to_inference_data(groups: Mapping[str, xr.Dataset]) -> Any:
    """Groups as what the installed arviz works on: ``InferenceData`` on 0.x, ``xarray.DataTree`` from 1.0 on."""
    tree, az = xr.DataTree.from_dict(dict(groups)), _arviz()
    return az.from_datatree(tree) if hasattr(az, "from_datatree") else tree


def write_netcdf(groups: Mapping[str, xr.Dataset] | xr.DataTree, path: Path) -> Path:
    """Write groups, or arviz data, to a NetCDF file, as :func:`bayes_dispatch.storage.write_output` writes all.

    Args:
        groups: datasets by name, as ``InferenceData`` and ``xarray.DataTree`` are too.
        path: of the file; its folder is made if need be.
    """
    tree = groups if isinstance(groups, xr.DataTree) else xr.DataTree.from_dict(dict(groups))
    with tempfile.TemporaryDirectory() as directory:
        tree.to_netcdf(Path(directory, "data.nc"), engine="h5netcdf")
        write_output(path, Path(directory, "data.nc").read_bytes())
    return path


def pareto_smoothed(
    log_ratios: Float[np.ndarray, "prompt proposal"],
) -> tuple[Float[np.ndarray, "prompt proposal"], Float[np.ndarray, " prompt"]]:
    """Pareto-smoothed normalised log weights for log importance ratios, and k-hat of each row (PSIS)."""
    if not len(log_ratios):
        return log_ratios, np.zeros(0)
    az = _arviz()
    if hasattr(az, "psislw"):  # 0.x
        log_weights, k_hat = az.psislw(log_ratios.copy())
    else:  # 1.x, which takes log likelihoods: the ratios of leave-one-out are their negatives
        log_weights, k_hat = importlib.import_module("arviz_stats.base").array_stats.psislw(-log_ratios)
    return np.asarray(log_weights), np.asarray(k_hat).reshape(len(log_ratios))


def rank_r_hat(draws: Float[np.ndarray, "chain draw *rest"]) -> Float[np.ndarray, "*rest"]:
    """Rank-normalised split r-hat of bulk and tails (Vehtari et al. 2021); NaN of a single chain."""
    return _of_chains("rhat", draws, "rank") if len(draws) > 1 else np.full(draws.shape[2:], np.nan)


def bulk_ess(draws: Float[np.ndarray, "chain draw *rest"]) -> Float[np.ndarray, "*rest"]:
    """Effective sample size of rank-normalised draws over all chains (Vehtari et al. 2021)."""
    return _of_chains("ess", draws, "bulk")


def _of_chains(statistic: str, draws: np.ndarray, method: str) -> np.ndarray:
    rest = [f"axis {axis}" for axis in range(draws.ndim - 2)]
    data = as_dataset({"draws": ((*DRAWS, *rest), draws)}, {})  # what every arviz takes, and gives back
    with np.errstate(invalid="ignore", divide="ignore"):  # where all draws are one number
        return np.asarray(getattr(_arviz(), statistic)(data, method=method)["draws"])


def _arviz() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.0 at import
        import arviz
    return arviz
