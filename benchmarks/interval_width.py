"""How wide intervals of known mixtures are at the coverage that they reach: a dispatcher's, and a classifier's.

    python benchmarks/interval_width.py --on simulated                # three seeds, three minutes on one core
    python benchmarks/interval_width.py --on shipped --work /tmp/evidence
    python benchmarks/interval_width.py --quick                       # seconds; the numbers mean nothing

*Posterior* and *calibrated* are the dispatcher's. LogisticRegression is fitted to the same prompts, mixtures by their
shares; its probabilities are taken for weights, with split-conformal intervals about them: as wide everywhere
(*absolute*), or as √(p (1 − p)) + .05 is (*scaled*). All that is calibrated is so on one half of the held-out mixtures,
by bins of length, and judged on the other.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from tqdm import tqdm

from bayes_dispatch.app.tables import Table
from bayes_dispatch.dispatcher.conformal import COUNTED, Conformal
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.inference.scoring.evidence_sets import KnownEvidence
from dispatch import DATA, FULL, QUICK
from dispatching.classifiers import FITS, fit_classifier

__all__ = ["SCALES", "Scores", "compare", "conformal", "main", "scores"]

LEVELS, DRAWS = (0.5, 0.9), 500

Intervals = Callable[[float], np.ndarray]  # a level to the lower and upper ends (2, N, K + 1)
Scale = Callable[[np.ndarray], np.ndarray]
SCALES: dict[str, Scale] = {"absolute": np.ones_like, "scaled": lambda p: 1 + np.sqrt(p * (1 - p)) / 0.05}


class Scores(NamedTuple):
    """Of intervals at one level; all prompts count alike.

    Attributes:
        covers, width: of components whose mean by the method is above .05, the share of true weights inside, and the
            mean width. covers_present, width_present, score: of those whose true share is; the last is the interval
            score, which the interval of the true distribution makes least (Gneiting and Raftery 2007).
    """

    covers: float
    width: float
    covers_present: float
    width_present: float
    score: float


def scores(ends: np.ndarray, level: float, mean: np.ndarray, truth: np.ndarray) -> Scores:
    """Scores of closed intervals ``(2, N, K+1)``; ``mean`` and ``truth`` are ``(N, K+1)``."""
    inside, width = (ends[0] <= truth) & (truth <= ends[1]), ends[1] - ends[0]
    missed = np.maximum(ends[0] - truth, 0) + np.maximum(truth - ends[1], 0)

    def over(values: np.ndarray, chosen: np.ndarray) -> float:
        return float(np.ma.array(values, mask=chosen <= COUNTED).mean(1).mean())

    present = (over(each, truth) for each in (inside, width, width + 2 / (1 - level) * missed))
    return Scores(over(inside, mean), over(width, mean), *present)


def conformal(
    scale: Scale, known: tuple[np.ndarray, np.ndarray], own: np.ndarray, means: np.ndarray, lengths: np.ndarray
) -> Intervals:
    """Split-conformal intervals about ``means (N, K+1)`` of prompts of ``lengths (N,)``, with residuals over ``scale``.

    ``known`` has means and true weights ``(n, K+1)`` of prompts of lengths ``own (n,)``, which calibrate as in
    ``Dispatcher.calibrate``.
    """
    given, truth = known
    random = np.random.default_rng(0).random(given.shape)  # which of a prompt's counted components is judged by
    chosen = np.where(given >= np.minimum(COUNTED, given.max(1, keepdims=True)), random, -1).argmax(1)
    residuals = (np.abs(truth - given) / scale(given))[np.arange(len(chosen)), chosen]
    found = Conformal(np.eye(given.shape[1])[0], residuals, 0 * residuals, own)

    def ends(level: float) -> np.ndarray:
        half = found.quantiles("levels", lengths, level) * scale(means)
        return np.clip([means - half, means + half], 0, 1)

    return ends


def compare(
    train: KnownEvidence, held_out: KnownEvidence, program: Admixture, svi: SVISettings, seed: int
) -> dict[str, dict[float, Scores]]:
    """Method → level → its scores; held-out prompts are halved by the seed."""
    truth = held_out.mixtures
    one, other = np.split(np.random.default_rng([seed, 9]).permutation(len(truth)), [len(truth) // 2])
    first, second = held_out.evidence.select(one), held_out.evidence.select(other)
    dispatcher = Dispatcher([f"expert {k}" for k in range(truth.shape[1] - 1)], seed, svi=svi, program=program)
    dispatcher.fit(train.evidence, train.labels, train.mixtures).calibrate(first, mixtures=truth[one], seed=seed)
    posterior, mean = dispatcher.posterior(second, DRAWS, seed), dispatcher.mean(second)
    found = {"posterior": (mean, posterior.interval), "calibrated": (mean, posterior.calibrated_interval)}
    classify = fit_classifier(FITS["LogisticRegression"], train, seed)
    own, lengths = first.known_lengths(), second.known_lengths()
    given, shares = (classify(evidence).shares for evidence in (first, second))
    for name, scale in SCALES.items():
        intervals = conformal(scale, (given, truth[one]), own, shares, lengths)
        found[f"LogisticRegression, {name}"] = shares, intervals
    return {name: {p: scores(ends(p), p, of, truth[other]) for p in LEVELS} for name, (of, ends) in found.items()}


def table(title: str, level: float, found: Sequence[Mapping[str, Mapping[float, Scores]]]) -> Table:
    """Means ± standard errors over seeds."""
    heads = ["", "covers", "width", "covers, present", "width, present", "score, present"]
    note = f"Components of a mean above {COUNTED:g}; present: of a true share above it. Seeds: {len(found)}."
    rows = []
    for name in found[0]:
        values = np.array([each[name][level] for each in found])  # (seeds, scores)
        errors = [""] * 5 if len(values) == 1 else [f" ± {e:.3f}" for e in values.std(0, ddof=1) / len(values) ** 0.5]
        rows.append([name, *(f"{mean:.3f}{error}" for mean, error in zip(values.mean(0), errors, strict=True))])
    return Table(f"{level:.0%} intervals, {title}", heads, rows, note)


def main(
    on: Annotated[str, typer.Option(help=f"One of {', '.join(DATA)}.")] = "simulated",
    work: Annotated[Path | None, typer.Option(help="Where evidence of the shipped model is kept.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: one seed, few prompts, few steps.")] = False,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    if on not in DATA:
        raise typer.BadParameter(f"expected one of {', '.join(DATA)}, got {on!r}")
    budget, kept, found = QUICK if quick else FULL, work or Path(gettempdir()) / "bayes-dispatch-evidence", []
    for seed in tqdm(range(1 if quick else seeds), "seeds", disable=None):
        problem = DATA[on](seed, budget.sizes, kept)
        found.append(compare(problem.train, problem.mixed, problem.program, budget.svi, seed))
    for level in LEVELS:
        print(f"{table(on, level, found).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
