"""Experts by likelihood and by REINFORCE, with and without the KL penalty, from the same base model.

    python benchmarks/objectives.py                               # every convention, three seeds: hours on one core
    python benchmarks/objectives.py --domain sort --seeds 1       # minutes
    python benchmarks/objectives.py --quick                       # seconds; the numbers mean nothing

The shipped base model; judged by held-out documents of 128 prompt bytes and as many after them. Exact match: answers
whose every byte greedy decoding gets right.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.tables import Table
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import CONVENTIONS, Convention
from bayes_dispatch.experts.objectives import Likelihood, Objective, Reinforce
from bayes_dispatch.experts.training import ExpertSettings, train_expert
from bayes_dispatch.experts.vectors import BASE
from bayes_dispatch.inference.scoring.evaluation import expert_report
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

__all__ = ["OBJECTIVES", "Budget", "Outcome", "main", "run"]

OBJECTIVES: dict[str, Objective] = {
    "likelihood": Likelihood(),
    "REINFORCE, KL .2": Reinforce(kl=0.2),
    "REINFORCE, KL 0": Reinforce(kl=0.0),
}


@dataclass(frozen=True)
class Budget:
    """Steps of training, and documents that judge: of the expert's own domain, and of each other."""

    steps: int
    own: int
    others: int


FULL, QUICK = Budget(80, 64, 24), Budget(1, 2, 2)


@dataclass(frozen=True)
class Outcome:
    """One expert beside the base model.

    Attributes:
        base, exact: exact match of both on the own domain, with standard errors over documents.
        harm: NLL in nats per byte that the expert adds on the other domains, their mean. seconds: of training.
    """

    base: tuple[float, float]
    exact: tuple[float, float]
    harm: float
    seconds: float


def run(model: MambaFormerForCausalLM, domain: Convention, objective: Objective, seed: int, budget: Budget) -> Outcome:
    """Train an expert and judge it."""
    begun = time.perf_counter()
    settings = ExpertSettings(steps=budget.steps, seed=seed, objective=objective)
    expert = train_expert(model, domain, settings, progress=False)
    seconds = time.perf_counter() - begun
    bank = ExpertBank([expert])
    own = expert_report(model, bank, domain, budget.own, seed + 1)
    base, exact = (tuple(own[name]["exact_match"]) for name in (BASE, domain.name))
    others = [expert_report(model, bank, other, budget.others, seed + 1) for other in CONVENTIONS if other != domain]
    harm = np.mean([report[domain.name]["nll"][0] - report[BASE]["nll"][0] for report in others])
    return Outcome(base, exact, float(harm), seconds)


def tables(found: Mapping[str, Mapping[str, Sequence[Outcome]]]) -> list[Table]:
    """For each domain and objective its outcomes, one for each seed."""
    exact, harm, seconds = [], [], []
    for domain, outcomes in found.items():
        base = _number([outcome.base for outcome in next(iter(outcomes.values()))])
        exact.append([domain, base, *(_number([outcome.exact for outcome in each]) for each in outcomes.values())])
        harm.append([domain, *(_number([(outcome.harm, 0.0) for outcome in each]) for each in outcomes.values())])
        seconds.append([domain, *(f"{np.mean([o.seconds for o in each]):.0f}" for each in outcomes.values())])
    seeds = len(next(iter(next(iter(found.values())).values())))
    note = f"Mean ± standard error over {seeds} seeds." if seeds > 1 else "One seed; ± over documents."
    return [
        Table("Held-out exact match on the expert's own domain", ["domain", "base", *OBJECTIVES], exact, note),
        Table("NLL added on the other conventions, nats per byte of answers", ["domain", *OBJECTIVES], harm),
        Table("Seconds of training", ["domain", *OBJECTIVES], seconds),
    ]


def _number(values: Sequence[tuple[float, float]]) -> str:
    means = [mean for mean, _ in values]
    error = np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else values[0][1]
    return f"{np.mean(means):.3f} ± {error:.3f}" if error else f"{np.mean(means):.3f}"


def main(
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="the first of them")] = 0,
    domain: Annotated[list[str] | None, typer.Option(help="only this convention; may be repeated")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps; 80 by default")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke test: one step, two documents")] = False,
) -> None:
    """Train, judge and print Markdown tables, after each domain those of all so far."""
    torch.set_num_threads(1)
    named = {convention.name: convention for convention in CONVENTIONS}
    if unknown := [name for name in domain or () if name not in named]:
        raise typer.BadParameter(f"expected domains of {', '.join(named)}, got {unknown[0]!r}")
    budget = QUICK if quick else FULL
    budget = Budget(steps or budget.steps, budget.own, budget.others)
    model = load_bundle().model
    found: dict[str, dict[str, list[Outcome]]] = {}
    for name in domain or named:
        found[name] = {objective: [] for objective in OBJECTIVES}
        for seed in tqdm(range(first_seed, first_seed + seeds), name, disable=None):
            for title, objective in OBJECTIVES.items():
                found[name][title].append(run(model, named[name], objective, seed, budget))
        for table in tables(found):
            print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
