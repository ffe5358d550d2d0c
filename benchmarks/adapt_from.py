"""What quality costs, and what it saves, to leave the first blocks of the model unadapted (``adapt_from``).

    python benchmarks/adapt_from.py --work runs/adapt_from              # three seeds, half an hour each on one core
    python benchmarks/adapt_from.py --work runs/adapt_from --seeds 1    # one of them
    python benchmarks/adapt_from.py --quick                             # minutes; the numbers mean nothing

For each first block: an expert for each domain of the shipped bundle by the bundle's recipe, a dispatcher on evidence
pooled below the block (with 0: after the last), and both together on held-out documents. Dispatchers are fitted as the
bundle's is, which stands beside them. What is made is kept under ``--work``, seed by seed and block by block, and is
not made again; the tables are of all that was asked for.

Times are of CPU time of one thread, all systems in turn, in a last round of their own.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import torch
import typer
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.app.training.plans import TrainingPlan
from bayes_dispatch.model.adaptation import block_of
from bayes_dispatch.storage import read_json, write_json
from first_block.costs import costs
from first_block.measuring import FULL, QUICK, Scores, first_block_system, scored, shipped_scores
from first_block.reporting import quality_tables, tables

__all__ = ["main"]


def claim(work: Path, plan: TrainingPlan, base: str) -> None:
    """Make ``work`` that of a plan, whatever its seed, and a base model.

    Raises:
        BadParameter: it holds what another plan made, or what was made of another model.
    """
    recipe = {name: str(value) for name, value in asdict(plan.with_seed(0)).items()} | {"base model": base}
    found = read_json(work / "plan.json") if (work / "plan.json").exists() else None
    if found is None:
        write_json(work / "plan.json", recipe)
    elif found != recipe:
        differing = next(name for name in recipe | found if recipe.get(name) != found.get(name))
        raise typer.BadParameter(f"expected a directory of the same settings at {work}, got another {differing!r}")


def main(
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="the first of them")] = 0,
    block: Annotated[list[int] | None, typer.Option(help="only this first block, beside 0; may be repeated")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="of an expert's training; 80, as the bundle's")] = None,
    work: Annotated[Path | None, typer.Option(help="where all that is made is kept")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke test: one seed, a few steps and documents")] = False,
) -> None:
    """Train, judge and print Markdown tables: after each seed those of quality, last all of them with the curve."""
    torch.set_num_threads(1)
    model = bd.load_bundle().model
    depth = 1 + max(map(block_of, model.adaptable()))
    blocks = sorted({0, *(range(depth) if block is None else block)})
    if not 0 <= min(blocks) <= max(blocks) < depth:
        wrong = next(each for each in blocks if not 0 <= each < depth)
        raise typer.BadParameter(f"expected first blocks of 0 … {depth - 1}, got {wrong}")
    plan, name = (QUICK, "quick") if quick else (FULL, "full")
    if steps is not None:
        plan = replace(plan, experts=replace(plan.experts, steps=steps))
    work = work or Path(gettempdir()) / f"bayes-dispatch-adapt-from-{name}"
    claim(work, plan, model.fingerprint())
    found: dict[int, list[Scores]] = {each: [] for each in blocks}
    shipped, made = [], [plan.with_seed(first_seed + index) for index in range(1 if quick else seeds)]
    for seeded in made:
        for each in tqdm(blocks, f"seed {seeded.seed}", disable=None):
            found[each].append(scored(work, seeded, each))
        shipped.append(shipped_scores(work, seeded))
        if seeded != made[-1]:
            _print(quality_tables(found, shipped))
    spent = costs({each: first_block_system(work, made[0], each) for each in blocks}, 1 if quick else 41)
    _print(tables(found, shipped, spent))


def _print(made: Sequence[Table]) -> None:
    for table in made:
        print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
