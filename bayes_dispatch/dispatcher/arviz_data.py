"""Draws as arviz data; the only module that imports arviz.

Independent draws are one chain: several would fake r-hat ≈ 1.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from bayes_dispatch.dispatcher.arviz_groups import posterior_groups
from bayes_dispatch.dispatcher.posterior import DispatchPosterior

__all__ = ["rank_by_loo", "to_datatree", "to_inference_data", "write_netcdf"]


def to_datatree(posterior: DispatchPosterior, prompts: Sequence[str] | None = None) -> xr.DataTree:
    """The draws as an xarray tree, by :func:`bayes_dispatch.dispatcher.arviz_groups.posterior_groups`.

    Args:
        posterior: draws ``(draw, prompt, K+1)``.
        prompts: a unique name of each prompt; its number by default.

    Raises:
        TensorError: another number of names than prompts.
    """
    return xr.DataTree.from_dict(posterior_groups(posterior, prompts))


def to_inference_data(groups: Mapping[str, xr.Dataset]) -> Any:
    """Groups as what the installed arviz works on: ``InferenceData`` on 0.x, ``xarray.DataTree`` from 1.0 on."""
    tree, az = xr.DataTree.from_dict(dict(groups)), _arviz()
    return az.from_datatree(tree) if hasattr(az, "from_datatree") else tree


def write_netcdf(data: Any, path: Path) -> Path:
    """Write arviz data to a NetCDF file, which appears under its name only when it is whole.

    Args:
        data: ``InferenceData`` or ``xarray.DataTree``.
        path: of the file; its folder is made if need be.
    """
    tree = data if isinstance(data, xr.DataTree) else data.to_datatree()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tree.to_netcdf(temporary, engine="h5netcdf")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def rank_by_loo(groups: Mapping[str, Mapping[str, xr.Dataset]], view: str) -> Any:
    """arviz's comparison by PSIS-LOO (Vehtari, Gelman and Gabry 2017), with the same columns on every arviz.

    Args:
        groups: by name the groups ``posterior`` and ``log_likelihood`` of each model.
        view: the variable of ``log_likelihood``.

    Returns:
        A ``pandas.DataFrame``, a row for each name, best first: rank, elpd, p (effective parameters), elpd_diff (below
        the best, ≥ 0), weight (stacking), se, dse, warning (arviz distrusts the importance weights).
    """
    models, az = {name: to_inference_data(each) for name, each in groups.items()}, _arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of high k-hats, which the table tells, and of pandas' plans
        if hasattr(az, "from_datatree"):
            found = az.compare(models, var_name=view)
            table = found.rename(columns={"elpd_loo": "elpd", "p_loo": "p"})
        else:
            found = az.compare(models, var_name=view, round_to="none")
            table = found.assign(warning=found["diag_elpd"].astype(str).str.len() > 0)
    table["elpd_diff"] = table["elpd"].max() - table["elpd"]  # 0.x and 1.x disagree about its sign
    return table[["rank", "elpd", "p", "elpd_diff", "weight", "se", "dse", "warning"]]


def _arviz() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.0 at import
        import arviz
    return arviz
