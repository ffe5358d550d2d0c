"""What a dispatcher costs: serving beside a classifier and NUTS, and how a fit grows with prompts and experts.

    python benchmarks/dispatch_cost.py            # ten minutes on one core, most of them NUTS's
    python benchmarks/dispatch_cost.py --quick    # a minute

Times are of this process on the CPU, one thread; works take turns, and ratios are taken round by round. Fits are
shorter than a user's (``FIT``), so that the largest ones are affordable; notes below the tables say how short.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Annotated

import torch
import typer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.reference import reference_posterior
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from dispatching.classifiers import encoded, targets
from dispatching.data import Sizes, simulated
from dispatching.stages import REST, STAGES, FitCost, fit_cost
from peers.timing import Rounds, Work, interleaved

__all__ = ["main"]

DRAWS = 64
WARM_UP = 200  # of NUTS: one chain, which costs the least and is too short to converge
REFERENCE = "posterior"
FIT = SVISettings(steps=100, rounds=1)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        batches: prompts at a time of serving. repeats: rounds. nuts: whether NUTS runs.
        prompts: sizes of fits at ``experts[0]`` experts. experts: of fits at ``among`` prompts.
    """

    batches: tuple[int, ...] = (1, 256)
    repeats: int = 15
    nuts: bool = True
    prompts: tuple[int, ...] = (400, 10_000, 100_000)
    experts: tuple[int, ...] = (8, 100, 500)
    among: int = 10_000


FULL = Plan()
QUICK = Plan(batches=(1, 16), repeats=3, prompts=(200, 400), experts=(8, 16), among=400, nuts=False)


def serving(plan: Plan) -> Iterator[Table]:
    """Time of the posterior of some prompts, beside other ways to an answer."""
    sizes = Sizes(pure=50, mixed=100, judged=max(1, max(plan.batches) // 8), mixtures=20)
    problem = simulated(0, sizes)
    train = problem.train
    dispatcher = Dispatcher(problem.experts, svi=FIT)
    dispatcher.fit(train.evidence, train.labels, train.mixtures)
    scaler = StandardScaler().fit(encoded(train.evidence))
    classes = targets(train).argmax(1)
    logistic = LogisticRegression(max_iter=1000).fit(scaler.transform(encoded(train.evidence)), classes)
    answers: dict[str, Callable[[Evidence], object]] = {
        REFERENCE: lambda evidence: dispatcher.posterior(evidence, DRAWS),
        "LogisticRegression.predict_proba": lambda evidence: logistic.predict_proba(
            scaler.transform(encoded(evidence))
        ),
    }
    for count in plan.batches:
        evidence = problem.pure[128].evidence.select(slice(count))
        works = {name: Work(partial(_call, answer, evidence)) for name, answer in answers.items()}
        times = interleaved(works, f"{count} prompts", Rounds(plan.repeats, clock=time.process_time))
        rows = [
            [name, _milliseconds(times.median(name), times.spread(name)), _times(*times.ratio(name, REFERENCE))]
            for name in works
        ]
        if plan.nuts:
            calls = zip(("NUTS, compiling", "NUTS, compiled"), _nuts(dispatcher, count), strict=True)
            for name, (seconds, converged) in calls:
                shown = f"{name}; {converged} of {count} converged"
                rows.append([shown, _milliseconds(seconds), f"{seconds / times.median(REFERENCE):.0f}"])
        heads = ["", "ms on the CPU", "times the posterior"]
        note = (
            f"{DRAWS} draws a prompt. Medians ± half the interquartile range. NUTS: one chain, compiling in wall time."
        )
        yield Table(f"Serving, prompts at a time: {count}", heads, rows, note)


def _call(answer: Callable[[Evidence], object], evidence: Evidence, prepared: None) -> object:
    return answer(evidence)


def _nuts(dispatcher: Dispatcher, count: int) -> list[tuple[float, int]]:
    """Wall seconds of a first call, which compiles, CPU seconds of a second one for other prompts, and how many of the
    prompts of each converged."""
    found = []
    problem = simulated(0, Sizes(pure=2, mixed=2, judged=1, mixtures=2 * count))
    for call, clock in enumerate((time.perf_counter, time.process_time)):
        evidence = problem.mixed.evidence.select(slice(call * count, (call + 1) * count))
        start = clock()
        posterior = reference_posterior(dispatcher, evidence, DRAWS, chains=1, warmup=WARM_UP)
        found.append((clock() - start, int(posterior.converged.sum())))
    return found


def fits(plan: Plan, svi: SVISettings) -> Iterator[Table]:
    """Cost of fits of several sizes, by stage, and the slope of its growth."""
    few = plan.experts[0]
    by_prompts = [fit_cost(count, few, svi) for count in plan.prompts]
    yield _growth(f"Fits at K = {few}", "N", plan.prompts, by_prompts, svi)
    known = {(cost.prompts, cost.experts): cost for cost in by_prompts}
    by_experts = [known.get((plan.among, count)) or fit_cost(plan.among, count, svi) for count in plan.experts]
    yield _growth(f"Fits at N = {plan.among:,}", "K", plan.experts, by_experts, svi)


def _growth(title: str, what: str, sizes: Sequence[int], costs: Sequence[FitCost], svi: SVISettings) -> Table:
    stages = [*STAGES.values(), REST]
    rows = []
    for size, cost in zip(sizes, costs, strict=True):
        cells = [f"{cost.stages[name].seconds:.2f} s, {cost.stages[name].peak / 2**20:.0f} MiB" for name in stages]
        rows.append([f"{what} = {size:,}", *cells, f"{sum(stage.seconds for stage in cost.stages.values()):.1f} s"])
    slopes = [_slope(sizes, [cost.stages[name].seconds for cost in costs]) for name in stages]
    total = _slope(sizes, [sum(stage.seconds for stage in cost.stages.values()) for cost in costs])
    rows.append([f"time ~ {what}^", *slopes, total])
    note = f"Peak memory above that before the fit. {svi.steps} steps of SVI; exponents of the last two sizes."
    return Table(title, ["", *stages, "all"], rows, note)


def _slope(sizes: Sequence[int], seconds: Sequence[float]) -> str:
    """Log-log slope between the last two sizes."""
    if len(sizes) < 2 or min(seconds[-2:]) <= 0:
        return "–"
    return f"{math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2]):.2f}"


def _milliseconds(seconds: float, spread: float | None = None) -> str:
    value = f"{1e3 * seconds:.3g}"
    return value if spread is None else f"{value} ± {100 * spread:.0f}%"


def _times(ratio: float, spread: float) -> str:
    return f"{ratio:.2f} ± {100 * spread:.0f}%"


def main(
    quick: Annotated[bool, typer.Option(help="smaller sizes, without NUTS")] = False,
    only: Annotated[str | None, typer.Option(help="serving or fits; both by default")] = None,
) -> None:
    """Measure and print Markdown tables."""
    torch.set_num_threads(1)
    if only not in (None, "serving", "fits"):
        raise typer.BadParameter(f"expected serving or fits, got {only!r}")
    plan = QUICK if quick else FULL
    svi = replace(FIT, steps=20) if quick else FIT
    parts = {"serving": serving(plan), "fits": fits(plan, svi)}
    for table in chain.from_iterable(part for name, part in parts.items() if only in (None, name)):
        print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
