"""Few-shot adaptation: posterior and point estimates of the blend weights, given 1 to 16 questions with answers.

    python benchmarks/few_shot.py                                      # three seeds, an hour on one core
    python benchmarks/few_shot.py --seeds 1 --given 4 --coupling 20    # weights by layer, about shared ones
    python benchmarks/few_shot.py --quick                              # a smoke test; the numbers mean nothing

Pairs are of one convention, or of two in turn. Every method sees the same pairs and is judged on the same other ones.
"Best single" takes the expert, or base, that makes the given answers most probable.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.experts.domains import CONVENTIONS, Convention, Split
from bayes_dispatch.inference.few_shot.answers import AnswerLikelihood
from bayes_dispatch.inference.few_shot.methods import (
    CrossEntropy,
    ImportanceSampling,
    SequentialMonteCarlo,
    VariationalInference,
)
from bayes_dispatch.inference.few_shot.program import PRECISION, FewShotFit, FewShotMethod, FewShotProgram

__all__ = ["FULL", "QUICK", "Budget", "main"]

PURE = tuple((convention.name,) for convention in CONVENTIONS)
MIXED = (("no_carry", "sort"), ("reversed_add", "shift"), ("add", "reverse"), ("reverse", "sort"))
LEVEL = 0.9


@dataclass(frozen=True)
class Budget:
    """How many pairs are given and judged, and how long the methods take."""

    given: tuple[int, ...] = (1, 2, 4, 8, 16)
    judged: int = 32
    draws: int = 32  # of the posterior predictive
    methods: tuple[FewShotMethod, ...] = (
        SequentialMonteCarlo(64),
        ImportanceSampling(512, 256),
        VariationalInference(steps=40, particles=8, draws=128),
        CrossEntropy(64, 10, 12),
    )
    simulations: int = 40
    coupling: float | None = None  # of the program: weights by layer are judged, where it is given


FULL = Budget()
QUICK = Budget(
    (1, 2),
    4,
    8,
    (
        SequentialMonteCarlo(8, moves=1),
        ImportanceSampling(25, 10),
        VariationalInference(2, 2, draws=25),
        CrossEntropy(4, 2, 2),
    ),
    2,
)


@dataclass(frozen=True)
class Result:
    """One method on one task: nats per byte of the judged answers, CPU seconds, whether intervals hold the shares."""

    seconds: float
    nll: dict[str, float]
    covered: tuple[bool, ...] = ()


def pairs_of(
    conventions: Sequence[Convention], count: int, rng: np.random.Generator, split: Split
) -> list[tuple[str, str]]:
    """Questions with their answers, of the conventions in turn."""
    questions = [(c := conventions[i % len(conventions)], c.surface.question(rng, split)) for i in range(count)]
    return [(question, f"{convention.answer(question)}\n") for convention, question in questions]


def judge(
    method: FewShotMethod,
    given: AnswerLikelihood,
    judged: AnswerLikelihood,
    truth: np.ndarray,
    budget: Budget,
    seed: int,
) -> Result:
    """Infer the weights from the given pairs, and judge them on the others."""
    start = time.process_time()
    found = method.infer(FewShotProgram(given, coupling=budget.coupling), seed)
    seconds = time.process_time() - start
    state = torch.from_numpy(found.state)
    state = state[:, 0] if budget.coupling is None else state[:, 1:]  # (S, K + 1) or (S, layers, K + 1)
    nll = {f"{method.name}, mean": _nll(judged, state.mean(0)[None])}
    if len(state) > 1:
        chosen = np.linspace(0, len(state) - 1, budget.draws).astype(int)
        nll[f"{method.name}, predictive"] = _nll(judged, state[chosen])
    return Result(seconds, nll, _covered(found, truth))


def _covered(found: FewShotFit, truth: np.ndarray) -> tuple[bool, ...]:
    """For the components with a share: whether the 90% interval holds it; nothing of a point estimate.

    A share of 1 does not count: no interval inside the simplex holds it.
    """
    if len(found.state) == 1:
        return ()
    low, high = found.posterior.interval(LEVEL)[:, 0]
    return tuple(bool(low[k] <= truth[k] <= high[k]) for k in np.flatnonzero((truth > 0.02) & (truth < 0.98)))


@torch.no_grad()
def _nll(judged: AnswerLikelihood, weights: torch.Tensor) -> float:
    """Nats per byte of each answer's probability, averaged over the weights (S, K + 1) or (S, layers, K + 1)."""
    logs = judged.by_pair(weights).logsumexp(0) - np.log(len(weights))
    return float(-logs.sum()) / judged.answer_bytes


def task(bundle: bd.Bundle, names: tuple[str, ...], count: int, budget: Budget, seed: int) -> list[Result]:
    """All methods on one set of pairs."""
    conventions = [convention for name in names for convention in CONVENTIONS if convention.name == name]
    rng = np.random.default_rng([seed, count, *names[0].encode()])
    given, judged = (
        AnswerLikelihood(bundle.model, bundle.experts, pairs_of(conventions, n, rng, split))
        for n, split in ((count, "train"), (budget.judged, "held_out"))
    )
    components = bundle.experts.components
    truth = np.array([names.count(name) / len(names) for name in components])
    results = [judge(method, given, judged, truth, budget, seed) for method in budget.methods]
    vertices = torch.eye(len(components)).double()
    with torch.no_grad():
        best = vertices[given(vertices).argmax()]
    point = {
        "best single": best,
        "uniform": torch.full((len(components),), 1 / len(components)).double(),
        "base": vertices[-1],
        "true shares": torch.from_numpy(truth),
    }
    return [*results, Result(0.0, {name: _nll(judged, weights[None]) for name, weights in point.items()})]


def simulated_coverage(bundle: bd.Bundle, budget: Budget, seed: int) -> list[float]:
    """Of each simulation, the share of 90% intervals that hold weights drawn from the prior, given eight answers that
    the blend itself wrote."""
    rng = np.random.default_rng([seed, 77])
    bank, model, width = bundle.experts, bundle.model, len(bundle.experts.components)
    method, held = budget.methods[0], []
    for simulation in range(budget.simulations):
        weights = rng.dirichlet(np.full(width, PRECISION / width))
        scales = bank.blend(torch.tensor(weights).to(model.dtype))
        conventions = [CONVENTIONS[i] for i in rng.integers(len(CONVENTIONS), size=8)]
        questions = [convention.surface.question(rng, "train") for convention in conventions]
        pairs = [(question, _answer(model, scales, question, rng)) for question in questions]
        likelihood = AnswerLikelihood(model, bank, pairs)
        low, high = method.infer(FewShotProgram(likelihood), simulation).posterior.interval(LEVEL)[:, 0]
        held.append(float(((low <= weights) & (weights <= high)).mean()))
    return held


@torch.no_grad()
def _answer(model: bd.MambaFormerForCausalLM, scales: bd.Adaptation, question: str, rng: np.random.Generator) -> bytes:
    """Bytes drawn from the adapted model until the line ends."""
    row = [256, *question.encode()]
    while len(row) < 1 + len(question) + 8:
        logits = model(torch.tensor([row]), adaptation=scales).logits[0, -1, :128]  # of ASCII
        p = logits.double().softmax(-1).numpy()
        row.append(int(rng.choice(128, p=p / p.sum())))
        if row[-1] == 10:
            break
    return bytes(row[1 + len(question) :])


def table(title: str, budget: Budget, found: dict[int, list[list[Result]]]) -> list[Table]:
    """NLL by method and number of pairs, mean ± standard error over tasks and seeds; seconds, and coverage."""
    names = [name for result in found[budget.given[0]][0] for name in result.nll]

    def cell(values: Sequence[float]) -> str:
        spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return f"{np.mean(values):.3f} ± {spread:.3f}"

    rows = []
    for name in names:
        cells = [[r.nll[name] for results in found[n] for r in results if name in r.nll] for n in budget.given]
        rows.append([name, *map(cell, cells)])
    heads = ["nats per byte", *(f"{n} pairs" for n in budget.given)]
    note = f"Mean ± standard error over {len(found[budget.given[0]])} tasks, {budget.judged} judged pairs each."
    others = []
    for place, method in enumerate(budget.methods):
        chosen = [[results[place] for results in found[n]] for n in budget.given]
        seconds = [f"{np.median([r.seconds for r in results]):.1f} s" for results in chosen]
        covered = [[c for r in results for c in r.covered] for results in chosen]
        others.append([f"{method.name}: CPU time", *seconds])
        if covered[0]:
            others.append([f"{method.name}: 90% intervals hold", *(f"{np.mean(c):.2f}" for c in covered)])
    return [Table(title, heads, rows, note), Table(f"{title}: cost and coverage of the shares", heads, others)]


def coverage_told(held: Sequence[float]) -> str:
    """The mean of what the simulations' intervals hold: the weights of one sum to 1, and are no independent trials."""
    error = np.std(held, ddof=1) / len(held) ** 0.5
    return f"Simulated answers: 90% intervals hold {np.mean(held):.3f} ± {error:.3f} in {len(held)} simulations."


def main(
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="the first of them")] = 0,
    given: Annotated[list[int] | None, typer.Option(min=1, help="only this many pairs; may be repeated")] = None,
    coupling: Annotated[float | None, typer.Option(help="infer weights by layer, of this precision")] = None,
    quick: Annotated[bool, typer.Option(help="a smoke test")] = False,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    budget, bundle = QUICK if quick else FULL, bd.load_bundle()
    budget = replace(budget, given=tuple(given or budget.given), coupling=coupling)
    chosen = range(first_seed, first_seed + seeds)
    kinds: dict[str, tuple[tuple[str, ...], ...]] = {"one convention": PURE, "two conventions in turn": MIXED}
    if quick:
        kinds = {title: sets[:1] for title, sets in kinds.items()}
    for title, sets in kinds.items():
        found = {
            count: [task(bundle, names, count, budget, seed) for seed in chosen for names in sets]
            for count in tqdm(budget.given, title, disable=None)
        }
        for each in table(title, budget, found):
            print(f"{each.to_markdown()}\n", flush=True)
    if coupling is not None:
        return
    print(coverage_told([held for seed in chosen for held in simulated_coverage(bundle, budget, seed)]))


if __name__ == "__main__":
    typer.run(main)
