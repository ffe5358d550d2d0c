"""How fast the models are, side by side with other people's in one run: ``python benchmarks/model.py``.

Four sections: "peers" (prefill, decode, training step and its memory, against models of the same width, state and
number of parameters: ``peers/groups.py`` says which, and why that is fair), "floor" (against the model's own matrix
products), "length" (decode after ever longer contexts) and "cache" (generation with the cache against without it).

Batch 1 and float32 unless said otherwise. All that is compared takes turns in one process, and ratios are taken round
by round, so only they mean something: times vary from machine to machine. ± is half the distance between the quartiles.
Peers that are not installed are left out, and named: ``pip install transformers mambapy minimamba`` brings all of them.
"""

import json
import platform
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import typer
from peers.alone import cache, floor, length
from peers.comparison import Scale, comparison
from peers.groups import GROUPS
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "transformers", "mambapy", "minimamba")
SECTIONS = {"floor": floor, "length": length, "cache": cache}  # and "peers", once for each group


class Section(StrEnum):
    """A part of the benchmark."""

    peers = "peers"
    floor = "floor"
    length = "length"
    cache = "cache"


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


def run(
    section: str, groups: set[str], scale: Scale, threads: int
) -> list[tuple[list[Table], list[dict[str, object]]]]:
    """Tables and records of a section."""
    if section == "peers":
        return [comparison(group, scale, threads) for group in GROUPS if group.name in groups]
    return [SECTIONS[section](scale, threads)]


def main(
    threads: Annotated[list[int] | None, typer.Option(help="Threads of a run; repeat it for more runs.")] = None,
    only: Annotated[list[Section] | None, typer.Option(help="Sections to run; all of them by default.")] = None,
    group: Annotated[list[GroupName] | None, typer.Option(help="Groups of peers; all of them by default.")] = None,
    repeats: Annotated[int | None, typer.Option(min=3, help="Rounds after the one that warms up.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds for a measure, above which it has fewer rounds.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short prompts and few rounds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all readings to this file.")] = None,
) -> None:
    """Measure our models beside their peers."""
    scale = Scale.quick() if quick else Scale()
    scale = replace(scale, repeats=repeats or scale.repeats, budget=budget or scale.budget)
    sections = [str(section) for section in (only or list(Section))]
    groups = {str(name) for name in (group or list(GroupName))}
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(versions())
    readings: list[dict[str, object]] = []
    for count in threads or [1]:
        torch.set_num_threads(count)
        for section in sections:
            for tables, records in run(section, groups, scale, count):
                console.print(*tables, sep="\n")
                readings += [{"threads": count, "section": section} | record for record in records]
                if json_file is not None:  # as soon as there is something, since a full run is long
                    json_file.write_text(json.dumps({"versions": versions(), "readings": readings}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
