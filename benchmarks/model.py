"""How fast the models are, side by side with other people's in one run: ``python benchmarks/model.py``.

Four sections: "peers" (prefill, decode, training step and its memory, against models of the same width, state and
number of parameters: ``peers/groups.py`` says which, and why that is fair), "floor" (against the model's own matrix
products), "length" (decode after ever longer contexts) and "cache" (generation with the cache against without it).

Batch 1 and float32 unless said otherwise. All that is compared takes turns in one process, and ratios are taken round
by round, so only they mean something: times vary from machine to machine. ± is half the distance between the quartiles.
Peers that are not installed are left out, and named: ``pip install -e '.[bench]'`` brings all of them.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from peers.alone import cache, floor, length
from peers.comparison import comparison
from peers.groups import GROUPS
from peers.tasks import Scale
from peers.timing import Rounds

PACKAGES = ("torch", "transformers", "mambapy", "minimamba")
Result = tuple[list[Table], list[dict[str, object]]]
ALONE: dict[str, Callable[[Scale, int], Result]] = {"floor": floor, "length": length, "cache": cache}


class Section(StrEnum):
    """A part of the benchmark."""

    peers = "peers"
    floor = "floor"
    length = "length"
    cache = "cache"


class Clock(StrEnum):
    """What is measured."""

    wall = "wall"
    cpu = "cpu"


CLOCKS = {Clock.wall: time.perf_counter, Clock.cpu: time.process_time}
GroupName = StrEnum("GroupName", [group.name for group in GROUPS])  # type: ignore[misc]


def versions() -> dict[str, str]:
    """Of Python and the packages that are compared."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def run(section: str, groups: set[str], scale: Scale, threads: int) -> Iterator[Result]:
    """Tables and records of a section, part by part."""
    if section in ALONE:
        yield ALONE[section](scale, threads)
        return
    yield from (comparison(group, scale, threads) for group in GROUPS if group.name in groups)


def main(
    threads: Annotated[list[int] | None, typer.Option(help="Threads of a run; repeat it for more runs.")] = None,
    only: Annotated[list[Section] | None, typer.Option(help="Sections to run; all of them by default.")] = None,
    group: Annotated[list[GroupName] | None, typer.Option(help="Groups of peers; all of them by default.")] = None,
    repeats: Annotated[int | None, typer.Option(min=3, help="Rounds after the one that warms up.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds for a measure, above which it has fewer rounds.")
    ] = None,
    clock: Annotated[
        Clock, typer.Option(help="Wall time, or CPU time: for one thread of a busy machine.")
    ] = Clock.wall,
    quick: Annotated[bool, typer.Option("--quick", help="Short prompts and few rounds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all readings to this file.")] = None,
) -> None:
    """Measure our models beside their peers."""
    scale = Scale.quick() if quick else Scale()
    rounds = Rounds(repeats or scale.rounds.repeats, budget or scale.rounds.budget, CLOCKS[clock])
    scale = replace(scale, rounds=rounds)
    sections = [str(section) for section in only or Section]
    groups = {str(name) for name in group or GroupName}
    console = Console() if sys.stdout.isatty() else Console(width=200)
    report: dict[str, Any] = {"versions": versions(), "clock": clock, "readings": []}
    console.print(report["versions"], f"clock: {clock}")
    for count in threads or [1]:
        torch.set_num_threads(count)
        for section in sections:
            for tables, records in run(section, groups, scale, count):
                console.print(*tables, sep="\n")
                report["readings"] += [{"threads": count, "section": section} | record for record in records]
                if json_file is not None:  # after each part, since a full run is long
                    json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
