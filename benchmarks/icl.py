"""Which architecture learns to learn what in context: ``python benchmarks/icl.py --preset default --seeds 3``.

The suite of "Can Mamba Learn How to Learn?" (Park et al. 2024, arXiv 2402.04248): a pure Mamba, a pure Transformer and
a MambaFormer of one size learn sparse parity, linear regression and vector-valued multi-query associative recall. All
train by one recipe on the same prompts, at one learning rate, or with ``--tune`` each at the best of ``GRID`` for its
task and model, chosen in runs whose seed is not reported.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bayes_dispatch.model.mambaformer.config import MambaFormerConfig, StateSpaceKind
from in_context.tasks import AssociativeRecall, LinearRegression, SparseParity, Task
from in_context.training import TEST_SEED, InContextModel, Outcome, Recipe, Sizes, judge, train

T = TypeVar("T")

GRID = (1e-3, 3e-3, 1e-2)
RATE = 3e-3  # where none is chosen
WIDTH = 120  # of output that goes to no terminal
TUNING_SEED = 2**40 + 2  # reported seeds count from 0


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What is trained, and how."""

    tasks: tuple[Task, ...]
    sizes: Sizes
    recipe: Recipe


PRESETS = {
    "smoke": Preset(
        tasks=(SparseParity(3, 2, 6), LinearRegression(2, 6), AssociativeRecall(3, 2, 4)),
        sizes=Sizes(d_model=16, n_heads=2, d_state=4, head_dim=16, pairs=2, mamba_blocks=4, layers=2, d_ff=64),
        recipe=Recipe(steps=4, batch=4, warmup=2, judged=32),
    ),
    "default": Preset(
        tasks=(SparseParity(6, 2, 20), LinearRegression(5, 15), AssociativeRecall(16, 8, 8)),
        sizes=Sizes(d_model=64, n_heads=4, d_state=16, head_dim=32, pairs=2, mamba_blocks=4, layers=2, d_ff=232),
        recipe=Recipe(steps=1500, batch=32),
    ),
    "gpu": Preset(
        tasks=(SparseParity(10, 2, 140), LinearRegression(20, 41), AssociativeRecall(32, 16, 20)),
        sizes=Sizes(d_model=256, n_heads=8, d_state=32, head_dim=64, pairs=4, mamba_blocks=7, layers=4, d_ff=672),
        recipe=Recipe(steps=100_000, batch=64, warmup=1000, judged=4096),
    ),
}


class Run(NamedTuple):
    """One model's training on one task at one rate, for one seed."""

    seed: int
    rate: float
    outcome: Outcome


@dataclass(frozen=True)
class Bench:
    """A preset on a device: trains and counts steps."""

    preset: Preset
    device: str
    bar: "tqdm[Any]"

    def run(self, task: Task, name: str, config: MambaFormerConfig, rate: float, seed: int) -> Run:
        self.bar.set_description(f"{task.name}, {name}, rate {rate:g}, {'tuning' if seed == TUNING_SEED else seed}")
        return Run(seed, rate, train(task, config, self.preset.recipe, rate, seed, self.device, self.bar.update)[1])

    def tune(self, task: Task, name: str, config: MambaFormerConfig) -> list[Run]:
        """One run for each rate of the grid, the best on validation prompts first."""
        runs = [self.run(task, name, config, rate, TUNING_SEED) for rate in GRID]
        return sorted(runs, key=lambda run: run.outcome.quarters[-1].loss)


def measure(bench: Bench, task: Task, configs: dict[str, MambaFormerConfig], seeds: int, tune: bool) -> dict[str, Any]:
    """All models and baselines on one task, as they go into the JSON file."""
    models: dict[str, Any] = {}
    for name, config in configs.items():
        tried = bench.tune(task, name, config) if tune else []
        rate = tried[0].rate if tried else RATE
        runs = [bench.run(task, name, config, rate, seed) for seed in range(seeds)]
        models[name] = {
            "parameters": InContextModel(config, task.width, task.outputs).parameter_count,
            "rate": rate,
            "loss": spread([run.outcome.test.loss for run in runs]),
            "score": spread([run.outcome.test.score for run in runs]),
            "three_quarters_loss": spread([run.outcome.quarters[2].loss for run in runs]),
            "seconds": spread([run.outcome.seconds for run in runs]),
            "runs": [as_json(run) for run in runs],
            "tuning": [as_json(run) for run in tried],
        }
    judged = bench.preset.recipe.judged
    baselines = {name: judge(task, answer, judged, TEST_SEED)._asdict() for name, answer in task.baselines.items()}
    return {"settings": asdict(task), "score_name": task.score_name, "baselines": baselines, "models": models}


def as_json(run: Run) -> dict[str, Any]:
    outcome = run.outcome
    quarters = [judgement._asdict() for judgement in outcome.quarters]
    return {
        "seed": run.seed,
        "rate": run.rate,
        **outcome.test._asdict(),
        "quarters": quarters,
        "seconds": outcome.seconds,
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error over seeds; one seed has none."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "se": error}


def table(name: str, result: dict[str, Any]) -> Table:
    """One task: what is known without training, then the models."""
    sizes = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    columns = ("parameters", "rate", "loss at ¾ of steps", "loss", result["score_name"], "seconds a run")
    rows = Table("model", title=f"{name} ({sizes})")
    for column in columns:
        rows.add_column(column, justify="right")
    for baseline, value in result["baselines"].items():
        rows.add_row(baseline, "", "", "", f"{value['loss']:.4f}", f"{value['score']:.3f}", "", style="dim")
    for model, value in result["models"].items():
        numbers = (("three_quarters_loss", 4), ("loss", 4), ("score", 3))
        before, loss, score = (show(value[key], digits) for key, digits in numbers)
        seconds = f"{value['seconds']['mean']:.0f}"
        rows.add_row(model, f"{value['parameters']:,}", f"{value['rate']:g}", before, loss, score, seconds)
    return rows


def show(value: dict[str, float | None], digits: int) -> str:
    return " ± ".join(f"{number:.{digits}f}" for number in (value["mean"], value["se"]) if number is not None)


def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "default",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to average over.")] = 1,
    mixer: Annotated[StateSpaceKind, typer.Option(help="The state-space block of Mamba and MambaFormer.")] = "mamba2",
    tune: Annotated[
        bool, typer.Option("--tune", help=f"Choose each learning rate from {GRID}; else it is {RATE}.")
    ] = False,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(min=4, help="Training steps, instead of the preset's.")] = None,
    device: Annotated[str, typer.Option(help="Where models train: cpu, cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", dir_okay=False, help="A file for all numbers.")] = None,
) -> None:
    """Train the models on the in-context tasks; a table for each has loss and score, ± standard errors over seeds."""
    begun = time.perf_counter()
    if json_file is not None and not json_file.parent.is_dir():
        raise typer.BadParameter(f"expected a file in a directory that exists, got {json_file}")
    torch.set_num_threads(threads)
    chosen = pick({preset}, PRESETS, "preset")[preset]
    recipe = replace(chosen.recipe, steps=steps or chosen.recipe.steps)
    tasks = pick(task, {each.name: each for each in chosen.tasks}, "task")
    configs = pick(model, chosen.sizes.configs(mixer), "model")
    runs = len(tasks) * len(configs) * (seeds + len(GRID) * tune)
    report: dict[str, Any] = {"preset": preset, "mixer": mixer, "seeds": seeds, "device": device, "threads": threads}
    report |= {"torch": torch.__version__, "sizes": asdict(chosen.sizes), "recipe": asdict(recipe), "tasks": {}}
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with tqdm(total=runs * recipe.steps, unit="step", disable=None) as bar:
        bench = Bench(replace(chosen, recipe=recipe), device, bar)
        for name, each in tasks.items():
            report["tasks"][name] = measure(bench, each, configs, seeds, tune)
            bar.clear()
            console.print(table(name, report["tasks"][name]))
            if json_file is not None:  # after each task: a long run that is stopped leaves what it has
                json_file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{seeds} seed(s), {recipe.steps} steps of {recipe.batch} prompts, {time.perf_counter() - begun:.0f} s")


def pick(names: Iterable[str] | None, known: dict[str, T], what: str) -> dict[str, T]:
    """The named ones, or all.

    Raises:
        typer.BadParameter: a name that is not known.
    """
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"expected a {what} of {', '.join(known)}, got {name!r}")
    return {name: value for name, value in known.items() if not names or name in names}


if __name__ == "__main__":
    typer.run(main)
