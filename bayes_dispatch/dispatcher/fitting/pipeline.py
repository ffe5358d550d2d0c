"""The fit of a dispatcher, stage by stage: projections, globals by SVI, noise temper, globals by known weights, and the
temper once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bayes_dispatch.arguments import SLACK
from bayes_dispatch.dispatcher.arrays import as_codes, as_numbers, distinct_rows
from bayes_dispatch.dispatcher.evidence.evidence import Evidence, as_evidence
from bayes_dispatch.dispatcher.evidence.projection import FeatureMap, FeatureSettings, fit_feature_map, spread_of
from bayes_dispatch.dispatcher.fitting.conditional import fit_conditionally
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher, as_prompts
from bayes_dispatch.dispatcher.fitting.svi import FitReport, SVISettings, fit_globals
from bayes_dispatch.dispatcher.fitting.temper import KnownPrompts, choose_temper
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.dispatcher.program.views import KINDS
from bayes_dispatch.errors import EvidenceError, TensorError

__all__ = ["TrainingSet", "fit_parts", "refit_parts"]

LIKE = 2_000  # prompts whose lengths and totals are kept for simulations


@torch.inference_mode(False)  # tensors made there have no gradients, ever
def fit_parts(
    experts: Sequence[str],
    program: Admixture,
    data: TrainingSet,
    svi: SVISettings,
    features: FeatureSettings,
    seed: int,
    progress: bool,
) -> tuple[FittedDispatcher, FitReport]:
    """Fit everything anew.

    Raises:
        EvidenceError: none of the views that the program reads, or a view that next to no prompt has.
        ConfigError: a fit that diverges.
    """
    maps: dict[str, FeatureMap] = {}
    mapped: dict[str, np.ndarray] = {}
    views = []
    for name, kind in program.kinds(list(data.evidence.views)).items():
        values, present = data.evidence.views[name], np.flatnonzero(~data.evidence.is_missing(name))
        if len(present) < 2:
            raise EvidenceError(f"expected at least 2 prompts with a view {name!r}, got {len(present)}")
        if kind in ("vectors", "surprise"):
            if kind == "vectors":
                maps[name], own = fit_feature_map(values[present], data.targets[present], features, seed)
            else:
                center, spread = values[present].mean(0), spread_of(values[present])
                maps[name], own = FeatureMap(center, np.diag(1 / spread)), (values[present] - center) / spread
            mapped[name] = maps[name](values)
            mapped[name][present] = own  # out-of-fold: as noisy as those of new prompts
        views.append(KINDS[kind](mapped.get(name, values).shape[1], name))
    model = program.model(experts, tuple(views))
    every = as_prompts(model, data.evidence, mapped, svi.dtype)
    posterior, report = fit_globals(model, data.observed(every), svi, seed, progress)
    rows = torch.linspace(0, len(every) - 1, min(len(every), LIKE), device=every.lengths.device).long()
    like = every.select(rows).to(torch.float32).blank()
    fitted = FittedDispatcher(model, posterior, maps, 1.0, like)
    return _told(fitted, report, data.known_prompts(every), program.temper, svi, seed, progress)


@torch.inference_mode(False)
def refit_parts(
    parts: FittedDispatcher, program: Admixture, data: TrainingSet, svi: SVISettings, seed: int, progress: bool
) -> tuple[FittedDispatcher, FitReport]:
    """Fit globals and temper to other evidence, from what is known of the globals; the projections stay, and the temper
    where next to no weights are known.

    Raises:
        EvidenceError: no prompts.
    """
    if not len(data.evidence):
        raise EvidenceError("expected at least 1 prompt, got none")
    every = parts.prompts(data.evidence).to(svi.dtype)
    before = parts.globals.to(svi.dtype)
    posterior, report = fit_globals(parts.model, data.observed(every), svi, seed, progress, before)
    refitted = replace(parts, globals=posterior)
    known = data.known_prompts(every)
    return _told(refitted, report, known, program.temper if known.tell else parts.temper, svi, seed, progress)


def _told(
    fitted: FittedDispatcher,
    report: FitReport,
    known: KnownPrompts,
    temper: float | None,
    svi: SVISettings,
    seed: int,
    progress: bool,
) -> tuple[FittedDispatcher, FitReport]:
    """With what prompts of known weights tell: the noise temper, unless it is given, the globals, and the temper that
    goes with these."""

    def with_temper(fitted: FittedDispatcher) -> FittedDispatcher:
        chosen = choose_temper(fitted.quadrature, known, np.random.default_rng(seed)) if temper is None else temper
        return replace(fitted, temper=chosen)

    fitted = with_temper(fitted)
    if not svi.conditional_steps or not known.tell:
        return fitted, report
    found = fit_conditionally(fitted, known, svi, seed, progress)
    if found is fitted.globals:
        return fitted, report
    return with_temper(replace(fitted, globals=found)), replace(report, conditional=True)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Evidence of N prompts, and what is known of them.

    Args:
        evidence: the prompts.
        labels: ``(N,)`` expert index, −1 where unknown or where the weights are known.
        known: ``(N, K+1)`` known weights, NaN rows where unknown.
    """

    evidence: Evidence
    labels: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, given: Evidence | np.ndarray, labels: object, mixtures: object, experts: Sequence[str]) -> TrainingSet:
        """Check what users give, ``None`` for no labels or mixtures; known mixtures win over labels.

        Labels are names, or numbers of components; that of base tells that the weights are known.

        Raises:
            EvidenceError: bad evidence.
            TensorError: labels outside −1 … K, or of other names; mixtures off the simplex, or another N.
        """
        evidence, count, base = as_evidence(given), len(experts), np.eye(len(experts) + 1)[-1]
        codes = np.full(len(evidence), -1)
        if labels is not None:
            codes = as_codes(labels, len(evidence), (*experts, "base"), least=-1)
        known = _mixtures(mixtures, len(evidence), count + 1)
        known[(codes == count) & ~np.isfinite(known).all(1)] = base
        return cls(evidence, np.where(np.isfinite(known).all(1), -1, codes), known)

    @property
    def targets(self) -> np.ndarray:
        """``(N, K+1)`` known weights, one-hot for labels, NaN rows where neither is known."""
        out, labelled = self.known.copy(), self.labels >= 0
        out[labelled] = np.eye(self.known.shape[1])[self.labels[labelled]]
        return out

    def known_prompts(self, prompts: Prompts) -> KnownPrompts:
        """The N prompts with what is known of their weights, in doubles."""
        seen = [*self.evidence.views.values(), self.evidence.known_lengths()]
        return KnownPrompts(prompts.to(torch.float64), self.targets, distinct_rows(*seen))

    def observed(self, prompts: Prompts) -> Prompts:
        """The N prompts with their labels and known weights."""
        known = torch.from_numpy(self.known).to(prompts.lengths.dtype)
        return replace(
            prompts,
            labels=torch.from_numpy(self.labels) if (self.labels >= 0).any() else None,
            known=known if torch.isfinite(known).any() else None,
        )


def _mixtures(mixtures: object, count: int, width: int) -> np.ndarray:
    if mixtures is None:
        return np.full((count, width), np.nan)
    known = as_numbers(mixtures, "mixtures")
    if known.shape != (count, width):
        raise TensorError(f"expected mixtures of shape {(count, width)}, base last, got {known.shape}")
    rows = known[~np.isnan(known).all(1)]
    if not (np.isfinite(rows).all() and (rows >= 0).all() and np.allclose(rows.sum(1), 1, atol=SLACK)):
        raise TensorError("expected mixtures on the simplex or rows of NaN, got rows that do not sum to 1")
    return known / known.sum(1, keepdims=True)
