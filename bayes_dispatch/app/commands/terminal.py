"""What the commands share: options that many of them take, checks of where they write, and how they print."""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_dispatch.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BLENDS_HELP",
    "BlendOption",
    "BundleOption",
    "DrawsOption",
    "JsonOption",
    "OwnJsonlOption",
    "OwnTextOption",
    "SampleOption",
    "SeedOption",
    "TemperatureOption",
    "TopKOption",
    "check_new_output",
    "check_output",
    "open_console",
    "print_json",
    "refuse_unused",
    "refuse_unused_settings",
    "typed",
    "use_one_thread",
    "with_options",
]

BLENDS_HELP = (
    "How the experts are blended: posterior_predictive, refined_mean, posterior_mean, best_expert, top_k or "
    "thompson_sample; settings may follow, as in top_k(3)."
)
WIDTH = 130  # of output that goes to no terminal

BlendOption = Annotated[str, typer.Option("--blend", "--blending-mode", help=BLENDS_HELP)]
TopKOption = Annotated[int, typer.Option(min=1, help="How many experts the blend top_k keeps.")]
DrawsOption = Annotated[
    int, typer.Option(min=1, help="How many draws of the weights posterior_predictive and refined_mean run.")
]
SampleOption = Annotated[
    bool, typer.Option("--sample", help="Draw each byte at random; without it the most probable one is taken.")
]
TemperatureOption = Annotated[float, typer.Option(help="With --sample: below 1 fewer surprises, above 1 more.")]
BundleOption = Annotated[
    Path | None, typer.Option("--bundle", help="Directory of the bundle to use; without it, the one that ships.")
]
SeedOption = Annotated[
    int, typer.Option(min=0, help="Makes random choices repeatable: the same number gives the same result.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on stdout.")]
OwnTextOption = Annotated[
    list[str] | None,
    typer.Option("--text", help="name=path: the text of an expert of yours; its last tenth is held out. Repeatable."),
]
OwnJsonlOption = Annotated[
    list[str] | None,
    typer.Option("--jsonl", help='name=path, likewise, of lines {"prompt": …, "answer": …}, or of prompts alone.'),
]


def refuse_unused(context: typer.Context, used: Mapping[str, bool], why: str) -> None:
    """Refuse options that were given and that would do nothing.

    Args:
        context: of the command. used: parameter → whether it does something. why: what it would need.

    Raises:
        ConfigError: one was given and does nothing.
    """
    for name, does in used.items():
        source = context.get_parameter_source(name)
        if not does and source is not None and source.name != "DEFAULT":
            raise ConfigError(f"expected --{name.replace('_', '-')} {why}, got it without")


def refuse_unused_settings(context: typer.Context, blends: Iterable[str]) -> None:
    """Refuse ``--top-k`` and ``--draws`` beside blends that have no such setting, or that state it themselves."""
    from bayes_dispatch.inference.two_pass.blends import ALIASES

    names = {ALIASES.get(blend, blend) for blend in blends}
    refuse_unused(context, {"top_k": "top_k" in names}, "with the blend top_k")
    refuse_unused(
        context,
        {"draws": not names.isdisjoint({"posterior_predictive", "refined_mean"})},
        "with the blend posterior_predictive or refined_mean",
    )


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
