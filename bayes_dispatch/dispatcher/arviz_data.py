"""Named arrays as arviz data; the only module that imports arviz, and it knows arrays alone.

Independent draws are one chain: several would fake r-hat ≈ 1.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_dispatch.errors import TensorError

__all__ = ["DRAWS", "as_dataset", "prompt_names", "to_inference_data", "weight_groups", "write_netcdf"]

DRAWS = ("chain", "draw")


def prompt_names(prompts: Sequence[str] | None, count: int) -> list[Any]:
    """A unique name of each of ``count`` prompts; their numbers by default.

    Raises:
        TensorError: another number of names, or one of them twice.
    """
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.0 at import
        import arviz as az
    tree = xr.DataTree.from_dict(dict(groups))
    return az.from_datatree(tree) if hasattr(az, "from_datatree") else tree


def write_netcdf(groups: Mapping[str, xr.Dataset] | xr.DataTree, path: Path) -> Path:
    """Write groups, or arviz data, to a NetCDF file, which appears under its name only when it is whole.

    Args:
        groups: datasets by name, as ``InferenceData`` and ``xarray.DataTree`` are too.
        path: of the file; its folder is made if need be.
    """
    tree = groups if isinstance(groups, xr.DataTree) else xr.DataTree.from_dict(dict(groups))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        tree.to_netcdf(temporary, engine="h5netcdf")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
