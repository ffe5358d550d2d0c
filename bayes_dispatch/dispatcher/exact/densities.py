"""The fitted program's densities of evidence at many weights of every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from bayes_dispatch.dispatcher.program.generative import WEIGHT_FLOOR
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View, length_factor

__all__ = ["ViewDensity"]


@dataclass(frozen=True, eq=False)
class ViewDensity:
    """One view's density, its globals summed up over their posterior.

    Args:
        view: the view.
        columns: ``(K+1, C)`` what weights mix, base last: means, variances, squares of means and
            variances of what the fit does not know of the means; or chances of classes.
        strength: how fast noise falls with length, or how strongly classes speak.
        mixing: what the variance of the experts' means adds to the noise of mixtures.
        temper: noise temper τ.
    """

    view: View
    columns: np.ndarray
    strength: float
    mixing: float
    temper: float

    @classmethod
    def of_views(
        cls, views: Sequence[View], draws: Sequence[Mapping[str, Tensor]], temper: float
    ) -> tuple[ViewDensity, ...]:
        """The views' densities under draws of the globals: their means, and how unsure the experts' means are.

        Densities under each of the draws would have to be averaged; means of the globals do nearly as well, since a
        fit knows them far better than a prompt's evidence is noisy.
        """
        made = []
        for view in views:
            columns = [
                np.stack([view.with_base(each, name).double().numpy() for each in draws]) for name in view.constants
            ]
            strength = mixing = 0.0
            if view.kind != "surprise":
                strength = _mean(draws, view.site("lt" if view.kind == "vectors" else "conc"))
            if view.kind == "vectors":
                mixing = _mean(draws, view.site("xi"))
            if view.kind in ("vectors", "surprise"):
                mean = columns[0].mean(0)
                columns = [mean, columns[1].mean(0), mean**2, columns[0].var(0)]
            else:
                columns = [columns[0].mean(0)]
            table = np.concatenate(columns, -1)
            # as the program floors the weights
            floored = (table + WEIGHT_FLOOR * table.sum(0)) / (1 + WEIGHT_FLOOR * len(table))
            made.append(cls(view, floored, strength, mixing, temper))
        return tuple(made)

    def add(self, prompts: Prompts, supports: np.ndarray, weights: np.ndarray, total: np.ndarray) -> None:
        """Add to ``total (N, G)`` the log densities of the evidence of N prompts, nats, where components
        ``supports (N, G, M)`` have ``weights (N, G, M)``; 0 where it is missing."""
        name = self.view.name
        missing, values = prompts.missing[name].numpy(), prompts.observed[name].double().numpy()
        if self.view.kind in ("vectors", "surprise"):
            mixing, noisier = self.mixing, np.ones(len(values))
            if self.view.kind == "vectors":
                lt = torch.tensor(self.strength, dtype=torch.float64, device="cpu")
                noisier = length_factor(prompts.lengths.double(), lt).numpy()
            _loops().add_student(
                np.ascontiguousarray(values),
                noisier,
                missing,
                self.columns,
                mixing,
                self.temper,
                supports,
                weights,
                total,
            )
            return
        add = _loops().add_counts
        if self.view.kind == "probabilities":
            add, values = _loops().add_probabilities, np.log(values)
        strength = self.strength / self.temper
        add(np.ascontiguousarray(values), missing, self.columns, strength, supports, weights, total)


@cache
def _loops() -> ModuleType:
    """The module, imported when it is first needed: numba is slow to import."""
    return import_module("bayes_dispatch.dispatcher.exact.loops")


def _mean(draws: Sequence[Mapping[str, Tensor]], site: str) -> float:
    return float(np.mean([float(each[site]) for each in draws]))
