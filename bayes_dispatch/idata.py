"""Dispatcher posteriors as arviz data; the only module that imports arviz.

Independent draws are one chain: several would fake r-hat ≈ 1.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bayes_dispatch.errors import TensorError
from bayes_dispatch.posterior import DispatchPosterior

__all__ = ["to_datatree", "to_inference_data", "write_netcdf"]


def to_datatree(posterior: DispatchPosterior, prompts: Sequence[str] | None = None) -> xr.DataTree:
    """The draws as an xarray tree with one group, ``posterior``.

    Args:
        posterior: draws ``(draw, prompt, K+1)``.
        prompts: a unique name of each prompt; its number by default.

    Returns:
        A tree whose ``posterior/weights`` has dims chain (1, or those of NUTS), draw, prompt, expert.

    Raises:
        TensorError: another number of names than prompts.
    """
    draws, count, _ = posterior.weights.shape
    if prompts is not None and len(prompts) != count:
        raise TensorError(f"expected {count} prompt names, got {len(prompts)}")
    chains = getattr(posterior, "chains", 1)  # of NUTS; independent draws are one
    weights = xr.DataArray(
        posterior.weights.reshape(chains, -1, *posterior.weights.shape[1:]),
        dims=("chain", "draw", "prompt", "expert"),
        coords={
            "chain": np.arange(chains),
            "draw": np.arange(draws // chains),
            "prompt": np.arange(count) if prompts is None else list(prompts),
            "expert": list(posterior.experts),
        },
    )
    dataset = xr.Dataset({"weights": weights}, attrs={"inference_library": "bayes_dispatch"})
    return xr.DataTree.from_dict({"posterior": dataset})


def to_inference_data(posterior: DispatchPosterior, prompts: Sequence[str] | None = None) -> Any:
    """The draws as what the installed arviz works on: ``InferenceData`` on 0.x, the tree itself from 1.0 on."""
    tree = to_datatree(posterior, prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # arviz 0.23 announces 1.0 at import
        import arviz as az
    return az.from_datatree(tree) if hasattr(az, "from_datatree") else tree


def write_netcdf(posterior: DispatchPosterior, path: Path) -> Path:
    """Write the draws to ``path`` as NetCDF; the file appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        to_datatree(posterior).to_netcdf(temporary, engine="h5netcdf")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
