"""The dispatcher beside classifiers, on the same splits of simulated and of real evidence.

    python benchmarks/dispatch.py --work /tmp/evidence            # three seeds, half an hour on one core
    python benchmarks/dispatch.py --work /tmp/evidence --quick    # seconds; the numbers mean nothing

``simulated``: prompts of a program that is drawn for each seed from the prior. ``shipped``: documents of the shipped
bundle's domains, read by its model, as the bundle's own dispatcher is trained and judged; they are computed once and
kept under ``--work``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.paired import paired_comparison
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from dispatching.classifiers import FITS, fit_classifier
from dispatching.data import Problem, Sizes, shipped, simulated
from dispatching.judging import SCORES, Judgement, judge, on_simulations
from dispatching.methods import Method, Ours

__all__ = ["FULL", "QUICK", "Budget", "compare", "main"]

REFERENCE = "ours"


@dataclass(frozen=True)
class Budget:
    """How many prompts, and how long the fits take."""

    sizes: Sizes = field(default_factory=Sizes)
    svi: SVISettings = field(default_factory=SVISettings)


FULL = Budget()
QUICK = Budget(Sizes(pure=15, mixed=30, judged=5, mixtures=30), SVISettings(steps=20, rounds=1))

Data = Callable[[int, Sizes, Path], Problem]

DATA: dict[str, Data] = {"simulated": lambda seed, sizes, work: simulated(seed, sizes), "shipped": shipped}


def compare(problem: Problem, budget: Budget, seed: int) -> dict[str, Judgement]:
    """Fit and judge every method on one problem."""
    train = problem.train
    dispatcher = Dispatcher(problem.experts, seed, program=problem.program, svi=budget.svi)
    dispatcher.fit(train.evidence, train.labels, train.mixtures)
    methods: dict[str, Method] = {REFERENCE: Ours(dispatcher)}
    methods |= {name: fit_classifier(fit, train, seed) for name, fit in FITS.items()}
    found = {name: judge(method, problem) for name, method in methods.items()}
    found[REFERENCE].scores.update(on_simulations(dispatcher, problem))
    return found


def tables(title: str, seeds: Sequence[Mapping[str, Judgement]]) -> list[Table]:
    """Scores, mean ± standard error over seeds, and Brier scores paired with ours."""
    names = list(seeds[0])
    rows = []
    for score in SCORES:
        row = [score]
        for name in names:
            row.append(_number([found[name].scores[score] for found in seeds if score in found[name].scores]))
        rows.append(row)
    note = "Mean ± standard error over seeds." if len(seeds) > 1 else "One seed."
    scores = Table(title, ["", *names], rows, note)
    clusters = np.concatenate([np.full(len(found[REFERENCE].errors), seed) for seed, found in enumerate(seeds)])
    ours = np.concatenate([found[REFERENCE].errors for found in seeds])
    differences = []
    for name in names:
        if name == REFERENCE:
            continue
        theirs = np.concatenate([found[name].errors for found in seeds])
        pair = paired_comparison(theirs, ours, clusters if len(seeds) > 1 else None)
        differences.append([name, f"{pair.difference:+.4f} ± {pair.standard_error:.4f}"])
    independent = "seeds" if len(seeds) > 1 else "prompts"
    heads = ["", f"Brier score on mixes minus that of {REFERENCE}"]
    return [scores, Table(f"{title}: paired", heads, differences, f"± standard error, {independent} as clusters.")]


def _number(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}"


def main(
    seeds: Annotated[int, typer.Option(help="seeds, from 0")] = 3,
    data: Annotated[list[str] | None, typer.Option(help=f"data sets of {', '.join(DATA)}; all by default")] = None,
    work: Annotated[Path | None, typer.Option(help="where evidence is kept")] = None,
    quick: Annotated[bool, typer.Option(help="a smoke test: few prompts, few steps")] = False,
) -> None:
    """Fit, judge and print Markdown tables."""
    torch.set_num_threads(1)
    if unknown := [name for name in data or () if name not in DATA]:
        raise typer.BadParameter(f"expected data sets of {', '.join(DATA)}, got {unknown[0]!r}")
    budget, kept = QUICK if quick else FULL, work or Path(gettempdir()) / "bayes-dispatch-evidence"
    for name in data or list(DATA):
        found = []
        for seed in tqdm(range(seeds), name, disable=None):
            found.append(compare(DATA[name](seed, budget.sizes, kept), budget, seed))
        for table in tables(name, found):
            print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
