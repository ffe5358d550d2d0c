"""Scores of a method on the prompts of a problem."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import log_loss

from bayes_dispatch.checks.coverage import coverage_curve
from bayes_dispatch.checks.detection import ood_auroc
from bayes_dispatch.checks.reliability import expected_calibration_error
from bayes_dispatch.dispatcher.estimator import Dispatcher
from dispatching.data import LENGTHS_JUDGED, Problem
from dispatching.methods import Method

__all__ = ["LEVELS", "SCORES", "Judgement", "judge", "on_simulations"]

LEVELS = (0.5, 0.9)

SCORES = (
    *(f"accuracy {length}" for length in LENGTHS_JUDGED),
    *(f"ECE {length}" for length in LENGTHS_JUDGED),
    "log loss",
    "Brier, mixes",
    "50% covers",
    "50% covers on simulations",
    "90% covers",
    "90% covers on simulations",
    "AUROC, share",
    "AUROC, density",
)


@dataclass(frozen=True, eq=False)
class Judgement:
    """How a method did on one problem.

    Attributes:
        scores: by name of :data:`SCORES`, those that the method has.
        errors: ``(N,)`` squared error of each held-out mixture, summed over components.
    """

    scores: dict[str, float]
    errors: np.ndarray


def judge(method: Method, problem: Problem) -> Judgement:
    """Every score that the method has.

    Accuracy, ECE and log loss are of P(largest share) on pure prompts, by length and over all lengths; Brier and
    coverage are of mixtures; AUROC tells foreign prompts from pure ones of their length.
    """
    scores: dict[str, float] = {}
    best, labels, inside = [], [], None
    for length, known in problem.pure.items():
        inside = method(known.evidence)
        right = inside.best.argmax(1) == known.labels
        scores[f"accuracy {length}"] = float(right.mean())
        scores[f"ECE {length}"] = expected_calibration_error(inside.best, known.labels)
        best.append(inside.best)
        labels.append(known.labels)
    every = np.concatenate(best)
    scores["log loss"] = log_loss(np.concatenate(labels), every, labels=range(every.shape[1]))
    mixed, foreign = method(problem.mixed.evidence), method(problem.foreign.evidence)
    errors = ((mixed.shares - problem.mixed.mixtures) ** 2).sum(1)
    scores["Brier, mixes"] = float(errors.mean())
    if mixed.posterior is not None:
        values = coverage_curve(mixed.posterior, problem.mixed.mixtures, LEVELS).values
        scores |= {f"{level:.0%} covers": float(value) for level, value in zip(LEVELS, values, strict=True)}
    assert inside is not None
    scores["AUROC, share"] = ood_auroc(inside.foreign, foreign.foreign).value
    if inside.surprise is not None and foreign.surprise is not None:
        scores["AUROC, density"] = ood_auroc(inside.surprise, foreign.surprise).value
    return Judgement(scores, errors)


def on_simulations(dispatcher: Dispatcher, problem: Problem, draws: int = 256) -> dict[str, float]:
    """Coverage on simulations from the fitted program at the same mixtures, by name of a score."""
    truth = problem.mixed.mixtures
    drawn, posterior = dispatcher.simulate(len(truth), draws, 0, truth)
    values = coverage_curve(posterior, drawn, LEVELS).values
    return {f"{level:.0%} covers on simulations": float(value) for level, value in zip(LEVELS, values, strict=True)}
