"""What the commands share: options that many of them take, checks of where they write, and how they print."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_dispatch.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BLENDS_HELP",
    "BundleOption",
    "JsonOption",
    "OwnJsonlOption",
    "OwnTextOption",
    "SeedOption",
    "check_new_output",
    "check_output",
    "open_console",
    "print_json",
    "typed",
    "use_one_thread",
    "with_options",
]

BLENDS_HELP = "best_expert, posterior_mean, top_k, thompson_sample, posterior_predictive or refined_mean."
WIDTH = 130  # of output that goes to no terminal

BundleOption = Annotated[Path | None, typer.Option("--bundle", help="A bundle's directory; default: the shipped one.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of everything random.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on stdout.")]
OwnTextOption = Annotated[
    list[str] | None,
    typer.Option("--text", help="name=path: the text of an expert of yours; its last tenth is held out. Repeatable."),
]
OwnJsonlOption = Annotated[
    list[str] | None,
    typer.Option("--jsonl", help='name=path, likewise, of lines {"prompt": …, "answer": …}, or of prompts alone.'),
]


def open_console() -> "Console":
    """Where tables are printed."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2, allow_nan=False))


def check_output(path: Path) -> None:
    """Refuse, before any work, a directory that could not be written later.

    Raises:
        ConfigError: it is a file, or its place is not writable.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"expected a directory for the output, got the file {path}")
    parent = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigError(f"expected a writable place for {path}, got {parent}: {error.strerror}") from None


def check_new_output(path: Path, index: str) -> None:
    """Refuse, too, a directory that holds anything but an earlier save with this index.

    Raises:
        ConfigError: as :func:`check_output`. BundleError: it is a link, or holds something else.
    """
    from bayes_dispatch.storage import check_directory

    check_output(path)
    check_directory(path, index)


def typed(text: str, escapes: bool) -> bytes:
    """The bytes that were typed, UTF-8 or not."""
    if escapes:
        text = "\\".join(part.replace("\\n", "\n") for part in text.split("\\\\"))
    return os.fsencode(text)


def with_options(blend: str, top_k: int, draws: int) -> str:
    """The name of a blend with the settings that the options give."""
    from bayes_dispatch.inference.two_pass.blends import ALIASES

    settings = {"top_k": top_k, "posterior_predictive": draws, "refined_mean": draws}
    name = ALIASES.get(blend, blend)
    return f"{name}({settings[name]})" if name in settings else blend


def use_one_thread() -> None:
    """More gain nothing with so small a model, cost much where cores are busy, and make rounding depend on them."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
