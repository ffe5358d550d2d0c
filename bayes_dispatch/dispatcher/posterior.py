"""The dispatcher's answer: posterior draws of the expert weights of each prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped

from bayes_dispatch.errors import ConfigError, TensorError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DispatchPosterior"]


@dataclass(frozen=True, eq=False)
class DispatchPosterior:
    """Independent posterior draws of the weights ``w`` of N prompts over K experts and base.

    Args:
        weights: ``(draw, prompt, K+1)``, each row on the simplex, base last.
        experts: the K+1 names in order; the last is ``"base"``.
        k_hat: ``(prompt,)`` Pareto shape of the importance weights behind the draws, ``None`` where there were none.
            Above .7 the draws of the prompt are not to be trusted.
        log_evidence: ``(prompt,)`` log density of the prompt's evidence under the fitted program, nats, or ``None``.

    Raises:
        TensorError: another shape, or rows off the simplex.
    """

    weights: np.ndarray
    experts: tuple[str, ...]
    k_hat: np.ndarray | None = None
    log_evidence: np.ndarray | None = None

    def __post_init__(self) -> None:
        weights = np.array(self.weights, dtype=np.float64)
        if weights.ndim != 3 or weights.shape[0] == 0 or weights.shape[2] != len(self.experts):
            raise TensorError(f"expected weights (draw, prompt, {len(self.experts)}), got shape {weights.shape}")
        if weights.size and not (weights.min() >= 0 and np.abs(weights.sum(-1) - 1).max() <= 1e-6):  # NaN fails both
            raise TensorError("expected weights on the simplex, got rows that are negative or do not sum to 1")
        weights.setflags(write=False)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "experts", tuple(self.experts))

    def __len__(self) -> int:
        return self.weights.shape[1]

    @property
    def mean(self) -> Float[np.ndarray, "prompt expert"]:
        """``(prompt, K+1)`` posterior mean E[w]: the expected fraction of each expert."""
        return self.weights.mean(axis=0)

    @property
    def probability_best(self) -> Float[np.ndarray, "prompt expert"]:
        """``(prompt, K+1)`` share of draws in which each expert has the largest weight."""
        best = self.weights.argmax(axis=-1)  # (draw, prompt)
        return (best[..., None] == np.arange(len(self.experts))).mean(axis=0)

    @property
    def entropy(self) -> Float[np.ndarray, " prompt"]:
        """``(prompt,)`` entropy of the posterior mean, in nats."""
        mean = self.mean
        return -(mean * np.log(np.maximum(mean, 1e-300))).sum(axis=-1)

    def interval(self, probability: float = 0.9) -> Float[np.ndarray, "2 prompt expert"]:
        """Equal-tailed intervals ``(2, prompt, K+1)``: lower and upper ends of the given posterior probability."""
        if not 0 < probability < 1:
            raise ConfigError(f"expected a probability between 0 and 1, got {probability}")
        return np.quantile(self.weights, [(1 - probability) / 2, (1 + probability) / 2], axis=0)

    def select(self, indices: Shaped[np.ndarray, " selected"] | Sequence[int] | slice) -> DispatchPosterior:
        """The posterior of the prompts at ``indices``, in that order."""
        k_hat = None if self.k_hat is None else self.k_hat[indices]
        log_evidence = None if self.log_evidence is None else self.log_evidence[indices]
        return DispatchPosterior(self.weights[:, indices], self.experts, k_hat, log_evidence)

    def to_arviz(self, prompts: Sequence[str] | None = None) -> Any:
        """The draws as arviz data: ``posterior["weights"]`` with dims chain, draw, prompt, expert.

        Where the posterior has ``k_hat`` and ``log_evidence``, they are in ``sample_stats``. The rest of what a fitted
        program knows comes from ``Dispatcher.to_arviz``.

        Args:
            prompts: names of the prompts for plots; numbers by default.

        Returns:
            ``arviz.InferenceData`` on arviz 0.x, ``xarray.DataTree`` from 1.0 on.
        """
        from bayes_dispatch.dispatcher.arviz_data import to_inference_data
        from bayes_dispatch.dispatcher.arviz_groups import posterior_groups

        return to_inference_data(posterior_groups(self, prompts))

    def to_netcdf(self, path: str | Path) -> Path:
        """Write :meth:`to_arviz` to a NetCDF file, under a temporary name until it is whole."""
        from bayes_dispatch.dispatcher.arviz_data import to_datatree, write_netcdf

        return write_netcdf(to_datatree(self), Path(path))
