"""Time and memory of each stage of a fit, in a process of its own."""

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.fitting import pipeline
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from dispatching.data import World

__all__ = ["STAGES", "FitCost", "Stage", "fit_cost"]

STAGES = {
    "fit_feature_map": "projections",
    "fit_globals": "globals",
    "choose_temper": "temper",
    "fit_conditionally": "known weights",
}
REST = "rest"
STATUS = Path("/proc/self/status")


@dataclass
class Stage:
    """Seconds on the CPU, and bytes at the highest above those in use before the fit (0 where there is no /proc)."""

    seconds: float = 0.0
    peak: int = 0


@dataclass(frozen=True)
class FitCost:
    """Cost of one fit.

    Attributes:
        prompts: N. experts: K. stages: by name of :data:`STAGES`, and the rest.
    """

    prompts: int
    experts: int
    stages: dict[str, Stage] = field(default_factory=dict)


def fit_cost(prompts: int, experts: int, svi: SVISettings) -> FitCost:
    """Fit to simulated evidence in a fresh process: half of the prompts labelled, one in ten a known mixture."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_fit, prompts, experts, svi).result()


def _fit(prompts: int, experts: int, svi: SVISettings) -> FitCost:
    torch.set_num_threads(1)
    _dispatcher(120, 4, SVISettings(steps=2, rounds=1))()  # loads and compiles what is loaded on first use
    fit = _dispatcher(prompts, experts, svi)
    stages: dict[str, Stage] = {}
    before = _kilobytes("VmRSS")
    with _measured(REST, stages, before), ExitStack() as stack:
        for name, title in STAGES.items():
            stack.enter_context(_watched(name, title, stages, before))
        fit()
    stages[REST].seconds -= sum(stages[title].seconds for title in STAGES.values())
    return FitCost(prompts, experts, stages)


def _dispatcher(prompts: int, experts: int, svi: SVISettings) -> Callable[[], object]:
    """A fit of evidence that is drawn already."""
    rng = np.random.default_rng(0)
    world = World(experts, 0)
    rows = np.arange(prompts)
    mixed = rows % 10 == 9
    weights = np.where(mixed[:, None], rng.dirichlet(np.full(experts + 1, 0.1), prompts), 0.0)
    weights[~mixed] = np.eye(experts + 1)[rows[~mixed] % experts]
    evidence = world.draw(weights, rng.integers(16, 257, prompts), 1)
    labels = np.where(~mixed & (rng.random(prompts) < 0.5), rows % experts, -1)
    known = np.where(mixed[:, None], weights, np.nan)
    dispatcher = Dispatcher([f"expert {k}" for k in range(experts)], 0, svi=svi)
    return lambda: dispatcher.fit(evidence, labels, known)


@contextmanager
def _watched(name: str, title: str, stages: dict[str, Stage], before: int) -> Iterator[None]:
    """While this lasts, calls of a stage of the pipeline are measured; they run as ever."""
    call: Callable[..., Any] = getattr(pipeline, name)

    def run(*args: Any) -> Any:
        with _measured(title, stages, before):
            return call(*args)

    setattr(pipeline, name, run)
    try:
        yield
    finally:
        setattr(pipeline, name, call)


@contextmanager
def _measured(title: str, stages: dict[str, Stage], before: int) -> Iterator[None]:
    if STATUS.exists() and title != REST:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is in use now
    start = time.process_time()
    yield
    stage = stages.setdefault(title, Stage())
    stage.seconds += time.process_time() - start
    stage.peak = max(stage.peak, 1024 * (_kilobytes("VmHWM") - before))


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return 0 if found is None else int(found.group(1))
