"""Draws of NUTS, and what tells whether they can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float, Shaped

from bayes_dispatch.dispatcher.arrays import as_rows
from bayes_dispatch.dispatcher.arviz_data import bulk_ess, rank_r_hat
from bayes_dispatch.dispatcher.exact.cells import RESOLUTION
from bayes_dispatch.dispatcher.posterior import DispatchPosterior

__all__ = ["ReferencePosterior"]

R_HAT, ESS = 1.01, 400  # at most, and at least, of a run that counts


@dataclass(frozen=True, eq=False, repr=False)
class ReferencePosterior(DispatchPosterior):
    """NUTS draws of the weights, chain after chain, with what tells whether they can be trusted: ``converged``.

    Args:
        weights: ``(chain * draw, prompt, K+1)``.
        experts: the K+1 names, base last.
        k_hat, log_evidence, chains: as in :class:`DispatchPosterior`.
        divergences: ``(prompt,)`` divergent transitions; of the joint chains, the same number for every prompt.
        steps: ``(prompt,)`` mean leapfrog steps of a draw.
        globals: site → ``(chain * draw, ·)`` draws of the globals that were free.

    Raises:
        TensorError, ConfigError: as :class:`DispatchPosterior`.
    """

    divergences: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    globals: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def r_hat(self) -> Float[np.ndarray, "prompt expert"]:
        """``(prompt, K+1)`` split r-hat of rank-normalised weights (Vehtari et al. 2021).

        Weights below a thousandth count as a thousandth, and those near 1 likewise: their logs wander over hundreds of
        nats that no blend tells apart. NaN where nothing else was drawn, or the weight is known.
        """
        return self._diagnose(rank_r_hat)

    @property
    def ess(self) -> Float[np.ndarray, "prompt expert"]:
        """``(prompt, K+1)`` bulk effective sample size over all chains, of the same weights as ``r_hat``."""
        return self._diagnose(bulk_ess)

    @property
    def converged(self) -> Bool[np.ndarray, " prompt"]:
        """``(prompt,)`` whether r-hat ≤ 1.01 and bulk ESS ≥ 400 of every weight that moves, by a thousandth or more, in
        any chain: only such draws are a reference.

        Vehtari et al. (2021) give these bounds. A single chain has no r-hat: where a weight moves, it has never
        converged. Weights that are known, or nearer to 0 or 1 than a thousandth in all draws, have nothing to reach.
        """
        well = (self.r_hat <= R_HAT) & (self.ess >= ESS)
        return np.asarray((well | ~self._moves).all(axis=1))

    def select(self, indices: Shaped[np.ndarray, " selected"] | Sequence[int] | slice) -> ReferencePosterior:
        """The prompts at ``indices``, in that order; raises as :meth:`DispatchPosterior.select`."""
        rows = as_rows(indices, len(self))
        own = {"divergences": self.divergences, "steps": self.steps}
        found = {name: values[rows] for name, values in own.items() if len(values)}  # neither has to be given
        return replace(cast(ReferencePosterior, super().select(rows)), **found)

    @classmethod
    def concatenate(cls, parts: Sequence[DispatchPosterior]) -> ReferencePosterior:
        """As :meth:`DispatchPosterior.concatenate`; draws of the globals are kept where all are of the same chains."""
        whole, given = cast(ReferencePosterior, super().concatenate(parts)), cast("Sequence[ReferencePosterior]", parts)
        found: dict[str, Any] = {}
        for name in ("divergences", "steps"):
            own = [getattr(part, name) for part in given]
            some = all(len(values) == len(part) for values, part in zip(own, given, strict=True))
            found[name] = np.concatenate(own) if some else own[0][:0]
        same = all(part.globals is given[0].globals for part in given)
        return replace(whole, **found, globals=given[0].globals if same else {})

    @property
    def _resolved(self) -> np.ndarray:
        return np.clip(self.weights, RESOLUTION, 1 - RESOLUTION)

    @property
    def _moves(self) -> np.ndarray:
        return np.ptp(self._resolved, axis=0) > 0

    def _diagnose(self, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        draws = self._resolved.reshape(self.chains, -1, *self.weights.shape[1:])
        return np.where(self._moves, statistic(draws), np.nan)
