"""The fitted program's densities of evidence, in NumPy, at many weights of one prompt at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln
from torch import Tensor

from bayes_dispatch.dispatcher.program.generative import FLOOR
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View

__all__ = ["ViewDensity"]

FARTHEST = 1e300  # squared deviations, so that densities are finite
STUDENT = math.lgamma(3.5) - math.lgamma(3.0) - 0.5 * math.log(6.0 * math.pi)


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
            floored = (table + FLOOR * table.sum(0)) / (1 + FLOOR * len(table))  # as the program floors the weights
            made.append(cls(view, floored, strength, mixing, temper))
        return tuple(made)

    def __call__(self, prompts: Prompts, row: int, mixed: np.ndarray) -> np.ndarray:
        """``(G,)`` log density of the evidence of the prompt at ``row``, nats, where weights mix the columns to
        ``mixed (G, C)``; 0 where it is missing."""
        name = self.view.name
        if prompts.missing[name][row]:
            return np.zeros(len(mixed))
        values = prompts.observed[name][row].double().numpy()
        if self.view.kind in ("vectors", "surprise"):
            return self._student(values, float(prompts.lengths[row]), mixed)
        alpha = self.strength / self.temper * mixed + 1e-3
        if self.view.kind == "probabilities":
            constants = gammaln(alpha.sum(-1)) - gammaln(alpha).sum(-1)
            return constants + (alpha - 1) @ np.log(values)
        seen, total = np.flatnonzero(values), values.sum()
        own = alpha[:, seen]
        rising = (gammaln(own + values[seen]) - gammaln(own)).sum(-1)
        mass = alpha.sum(-1)
        constant = math.lgamma(total + 1) - gammaln(values[seen] + 1).sum()
        return constant + rising + gammaln(mass) - gammaln(mass + total)

    def _student(self, values: np.ndarray, length: float, mixed: np.ndarray) -> np.ndarray:
        means, noise, squares, unknown = np.split(mixed, 4, axis=-1)
        if self.view.kind == "vectors":
            if length > 0:
                noise = noise * (1 + 20 * self.strength / max(length, 1.0)) / (1 + 0.4 * self.strength)
            noise = noise + self.mixing * np.maximum(squares - means**2, 0.0)
        noise = self.temper * noise + unknown
        with np.errstate(over="ignore"):
            away = np.minimum((values - means) ** 2 / (6.0 * noise), FARTHEST)
        tails = 3.5 * np.log1p(away) + 0.5 * np.log(noise)
        return len(values) * STUDENT - tails.sum(-1)


def _mean(draws: Sequence[Mapping[str, Tensor]], site: str) -> float:
    return float(np.mean([float(each[site]) for each in draws]))
