"""What the commands share: options that many of them take, and how they print."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["BundleOption", "JsonOption", "SeedOption", "open_console", "print_json", "typed", "use_one_thread"]

WIDTH = 130  # of output that goes to no terminal

BundleOption = Annotated[Path | None, typer.Option("--bundle", help="A bundle's directory; default: the shipped one.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of everything random.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on stdout.")]


def open_console() -> "Console":
    """Where tables are printed."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2, allow_nan=False))


def typed(text: str, escapes: bool) -> bytes:
    """The bytes that were typed, UTF-8 or not."""
    if escapes:
        text = "\\".join(part.replace("\\n", "\n") for part in text.split("\\\\"))
    return os.fsencode(text)


def use_one_thread() -> None:
    """More gain nothing with so small a model, cost much where cores are busy, and make rounding depend on them."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
