"""The fit of a dispatcher, stage by stage: projections, globals by SVI (and collapsed), temper and guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from bayes_dispatch.dispatcher.evidence.projection import FeatureMap, FeatureSettings, fit_feature_map
from bayes_dispatch.dispatcher.fitting.collapsed import check_collapsed, fit_collapsed
from bayes_dispatch.dispatcher.fitting.concatenations import RealPrompts
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher, as_prompts
from bayes_dispatch.dispatcher.fitting.sleep import fit_guide
from bayes_dispatch.dispatcher.fitting.svi import FitReport, SVISettings, fit_globals
from bayes_dispatch.dispatcher.fitting.training_set import TrainingSet
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import DirichletMixtures
from bayes_dispatch.dispatcher.guide.guides import GuideSettings
from bayes_dispatch.dispatcher.program.generative import DispatchModel, OneLabelModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.dispatcher.program.views import KINDS
from bayes_dispatch.errors import EvidenceError

__all__ = ["fit_parts", "refit_parts"]

LIKE = 2_000  # prompts whose lengths and totals are kept for simulations


def fit_parts(
    experts: Sequence[str],
    program: Admixture,
    data: TrainingSet,
    svi: SVISettings,
    guide: GuideSettings,
    features: FeatureSettings,
    seed: int,
    progress: bool,
) -> tuple[FittedDispatcher, FitReport]:
    """Fit everything anew.

    Raises:
        EvidenceError: none of the views that the program reads, or a view that next to no prompt has.
    """
    maps: dict[str, FeatureMap] = {}
    mapped: dict[str, np.ndarray] = {}
    views = []
    for name, kind in program.kinds(list(data.evidence.views)).items():
        values = data.evidence.views[name]
        if kind in ("vectors", "surprise"):
            present = np.flatnonzero(~data.evidence.is_missing(name))
            if len(present) < 2:
                raise EvidenceError(f"expected at least 2 prompts with a view {name!r}, got {len(present)}")
            if kind == "vectors":
                maps[name], own = fit_feature_map(values[present], data.targets[present], features, seed)
            else:
                center, spread = values[present].mean(0), values[present].std(0) + 1e-8
                maps[name], own = FeatureMap(center, np.diag(1 / spread)), (values[present] - center) / spread
            mapped[name] = maps[name](values)
            mapped[name][present] = own  # out-of-fold: as noisy as those of new prompts
        views.append(KINDS[kind](mapped.get(name, values).shape[1], name))
    model = program.model(experts, tuple(views))
    _check(model, svi)
    every = as_prompts(model, data.evidence, mapped, svi.dtype)
    posterior, report = fit_globals(model, data.observed(every), svi, seed, progress)
    like = every.select(torch.linspace(0, len(every) - 1, min(len(every), LIKE)).long())
    parts = FittedDispatcher(model, posterior, maps, None, guide, 1.0, like.to(torch.float32).blank())
    return _finished(parts, report, data, every, svi, seed, progress)


def refit_parts(
    parts: FittedDispatcher, data: TrainingSet, svi: SVISettings, seed: int, progress: bool
) -> tuple[FittedDispatcher, FitReport]:
    """Fit globals, temper and guide to other evidence, from the globals as they are; the projections stay."""
    _check(parts.model, svi)
    every = parts.prompts(data.evidence).to(svi.dtype)
    start = parts.globals.to(svi.dtype)
    posterior, report = fit_globals(parts.model, data.observed(every), svi, seed, progress, start)
    return _finished(replace(parts, globals=posterior), report, data, every, svi, seed, progress)


def _check(model: DispatchModel, svi: SVISettings) -> None:
    """Raise ``ConfigError`` where the program cannot be fitted as these settings ask."""
    if svi.collapsed:
        check_collapsed(model)


def _finished(
    parts: FittedDispatcher,
    report: FitReport,
    data: TrainingSet,
    every: Prompts,
    svi: SVISettings,
    seed: int,
    progress: bool,
) -> tuple[FittedDispatcher, FitReport]:
    """The parts with a guide, and where that is asked for with collapsed globals and a guide for these."""
    if not svi.collapsed:
        return _with_guide(parts, data, every, seed + 1, progress), report
    parts = _with_guide(parts, data, every, seed + 1, progress)
    shares = parts.model.prior_of_shares().double()
    answer = parts.answer(every.to(torch.float64), (shares / shares.sum()).numpy())
    assert isinstance(answer, DirichletMixtures)
    posterior, losses = fit_collapsed(parts.model, parts.globals, data.observed(every), answer, svi, seed + 2, progress)
    parts = replace(parts, globals=posterior.to(svi.dtype))
    return _with_guide(parts, data, every, seed + 1, progress), replace(report, collapsed=losses)


def _with_guide(
    parts: FittedDispatcher, data: TrainingSet, every: Prompts, seed: int, progress: bool
) -> FittedDispatcher:
    """The parts with a guide and a temper of their own; the one-label program needs neither."""
    if isinstance(parts.model, OneLabelModel):
        return parts
    real = RealPrompts(every.to(torch.float32), torch.as_tensor(data.targets, dtype=torch.float32))
    single = parts.globals.to(torch.float32)
    guide, temper = fit_guide(parts.model, single, parts.like, real, parts.settings, seed, progress)
    return replace(parts, guide=guide, temper=temper)
