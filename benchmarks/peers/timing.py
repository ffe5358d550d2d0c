"""Times of several pieces of work that take turns, so that a slow phase of the machine hits all of them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

__all__ = ["Rounds", "Times", "Work", "interleaved"]


@dataclass(frozen=True)
class Rounds:
    """How often works take turns.

    Attributes:
        repeats: rounds after the first, which warms up.
        budget: seconds; there are fewer rounds where they would take longer, but at least three. A work of more than a
            third of it runs once, in the round that warms up for the others.
        clock: what is measured: wall time, or time of this process on the CPU.
    """

    repeats: int = 7
    budget: float = 60.0
    clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Work:
    """``run`` is timed; ``prepare`` is not, and makes what ``run`` takes. Only fragile work may fail."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    fragile: bool = False

    def seconds(self, clock: Callable[[], float]) -> float:
        """Time of one run."""
        prepared = self.prepare()
        start = clock()
        self.run(prepared)
        return clock() - start


@dataclass
class Times:
    """Seconds of each piece of work by round, and why a piece of fragile work has none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Half the distance between the quartiles, as a share of the median; 0 for a single round."""
        return _half_range(self.seconds[name])

    def ratios(self, name: str, reference: str) -> list[float]:
        """Seconds of ``name`` over those of ``reference``, round by round; of medians if one has a single round."""
        of, to = self.seconds[name], self.seconds[reference]
        if min(len(of), len(to)) == 1:
            return [self.median(name) / self.median(reference)]
        return [a / b for a, b in zip(of, to, strict=True)]

    def ratio(self, name: str, reference: str) -> tuple[float, float]:
        """Median of ``ratios`` and their spread."""
        ratios = self.ratios(name, reference)
        return statistics.median(ratios), _half_range(ratios)


def interleaved(works: dict[str, Work], title: str, rounds: Rounds) -> Times:
    """Run all works in turn, again and again; the progress bar says ``title``."""
    times = Times()
    warm: dict[str, float] = {}
    for name, work in tqdm(works.items(), f"{title}, first round", leave=False, disable=None):
        try:
            warm[name] = work.seconds(rounds.clock)
        except Exception as error:
            if not work.fragile:
                raise
            times.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    slow = {name for name, spent in warm.items() if spent > rounds.budget / 3}
    times.seconds = {name: [spent] if name in slow else [] for name, spent in warm.items()}
    quick = [name for name in warm if name not in slow]
    affordable = int(rounds.budget / max(sum(warm[name] for name in quick), 1e-9))
    for _ in tqdm(range(max(3, min(rounds.repeats, affordable))), title, leave=False, disable=None):
        for name in quick:
            times.seconds[name].append(works[name].seconds(rounds.clock))
    return times


def _half_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle
