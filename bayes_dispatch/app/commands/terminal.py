"""What the commands share: options that many of them take, checks of where they write, and how they print."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_dispatch.app.tables import visible
from bayes_dispatch.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import Console

    from bayes_dispatch.app.bulk import MapBlocks
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.dispatcher.gate import Gate
    from bayes_dispatch.experts.domains import Domain

__all__ = [
    "BLENDS_HELP",
    "SEED_HELP",
    "UNCALIBRATED",
    "BlendOption",
    "BundleOption",
    "DeviceOption",
    "DtypeOption",
    "DrawsOption",
    "JsonOption",
    "OwnJsonlOption",
    "OwnTextOption",
    "PackagesOption",
    "RayOption",
    "SampleOption",
    "SeedOption",
    "TemperatureOption",
    "TopKOption",
    "announce",
    "calibrated_by",
    "check_new_output",
    "components_of",
    "check_output",
    "mapped_on_ray",
    "named_paths",
    "open_bundle",
    "open_bundles",
    "open_console",
    "own_domains",
    "print_json",
    "refuse_unused",
    "say_aside",
    "typed",
    "use_one_thread",
    "with_options",
]

BLENDS_HELP = (
    "How the experts are blended: posterior_predictive, refined_mean, posterior_mean, best_expert, top_k or "
    "thompson_sample; settings may follow, as in top_k(3). Or base, or the name of an expert."
)
UNCALIBRATED = "without a gate and calibrated intervals: calibrate-gate makes them"
WIDTH = 140  # of output that goes to no terminal: the widest table of a report
LARGE = 20_000_000  # weights, from which on matrix products gain by more threads

BlendOption = Annotated[str, typer.Option("--blend", help=BLENDS_HELP)]
TopKOption = Annotated[
    int | None, typer.Option(min=1, help="With the blend top_k: how many experts it keeps; default: 2.")
]
DrawsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With posterior_predictive or refined_mean: how many rows of weights; default: one for each expert and "
        "base, and some more, from 16 to 32.",
    ),
]
SampleOption = Annotated[
    bool, typer.Option("--sample", help="Draw each token at random; without it the most probable one is taken.")
]
TemperatureOption = Annotated[
    float | None, typer.Option(help="With --sample: below 1 fewer surprises, above 1 more; default: 1.")
]
BundleOption = Annotated[
    Path | None,
    typer.Option("--bundle", help="Directory of the bundle to use, or smollm2; default: our own, which ships."),
]
SEED_HELP = "Makes random choices repeatable: the same number gives the same result."
SeedOption = Annotated[int, typer.Option(min=0, help=SEED_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on stdout.")]
RayOption = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="Do what takes long in a Ray cluster: RAY_ADDRESS, or one on this machine alone.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where the bundle's model of transformers runs: cpu, cuda, cuda:1.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Of the weights of a transformers model: float32, bfloat16, …; default: the bundle's own."
    ),
]
OwnTextOption = Annotated[
    list[str] | None,
    typer.Option("--text", help="NAME=FILE: the text of an expert of yours; its last tenth is held out. Repeatable."),
]
PackagesOption = Annotated[
    Path | None,
    typer.Option(
        "--packages", help="Where pip put packages of real documents, for experts of these (docs/domains.md)."
    ),
]
OwnJsonlOption = Annotated[
    list[str] | None,
    typer.Option("--jsonl", help='NAME=FILE, likewise, of lines {"prompt": …, "answer": …}, or of prompts alone.'),
]


def say_aside(kind: str, message: str) -> None:
    """One line on stderr."""
    print(f"bayes-dispatch: {kind}: {visible(' '.join(message.split()))}", file=sys.stderr)


def announce(stage: str) -> None:
    """A line on stderr as a stage begins that may take minutes; progress bars are for terminals alone."""
    print(f"bayes-dispatch: {stage}", file=sys.stderr, flush=True)


def calibrated_by(gate: "Gate") -> str:
    """What a bundle's calibration is of, in a sentence."""
    return (
        f"intervals, sets and gate are calibrated on held-out prompts, the gate on {len(gate.scores)} of them, "
        f"for false-alarm rates of {gate.least_rate_shown} and above"
    )


def refuse_unused(option: str, value: object, used: bool, needs: str, got: str = "it without") -> None:
    """Refuse an option that was given and that would do nothing.

    Args:
        option: as it is typed. value: what was given; ``None`` or ``False`` for nothing.
        used: whether it does something. needs: what it would need. got: what came instead.

    Raises:
        ConfigError: it was given and does nothing.
    """
    if not used and value is not None and value is not False:
        raise ConfigError(f"expected {option} {needs}, got {got}")


def named_paths(given: Sequence[str] | None, option: str, kind: str = "FILE") -> dict[str, Path]:
    """What an option was given as ``NAME=FILE``, by the names.

    Args:
        given: as it was typed, each time. option: its name. kind: what its help calls the path.

    Raises:
        ConfigError: without name or path, or a name twice.
    """
    found: dict[str, Path] = {}
    for each in given or ():
        name, _, path = each.partition("=")
        if not name or not path:
            raise ConfigError(f"expected {option} NAME={kind}, got {each!r}")
        if name in found:
            raise ConfigError(f"expected one {option} of each name, got two of {name}")
        found[name] = Path(path)
    return found


def own_domains(bundle: Path | None, text: Sequence[str] | None, jsonl: Sequence[str] | None) -> "dict[str, Domain]":
    """Domains of the files that ``--text`` and ``--jsonl`` gave, each of an expert of the bundle, which is not loaded.

    Raises:
        ConfigError: files that cannot be used. UnknownNameError: one of no expert. BundleError: as ``components_of``.
    """
    from bayes_dispatch.app.held_out import check_owners, read_own

    own = read_own(named_paths(text, "--text"), named_paths(jsonl, "--jsonl"))
    if own:
        check_owners(own, components_of(bundle)[:-1])
    return own


def with_options(blends: Sequence[str], top_k: int | None, draws: int | None) -> list[str]:
    """Names of blends with the settings that ``--top-k`` and ``--draws`` give; settings in a name stay.

    Raises:
        ConfigError: an option was given that none of the blends takes.
    """
    from bayes_dispatch.inference.two_pass.blends import ALIASES

    names = [ALIASES.get(blend, blend) for blend in blends]  # told apart by these; ``as_blend`` reads what was typed
    sampled = ("posterior_predictive", "refined_mean")
    others = f"it with {', '.join(blends)}"
    refuse_unused("--top-k", top_k, "top_k" in names, "with the blend top_k", others)
    refuse_unused(
        "--draws", draws, not set(sampled).isdisjoint(names), f"with the blend {' or '.join(sampled)}", others
    )
    given = {"top_k": top_k, **dict.fromkeys(sampled, draws)}
    settings = [given.get(name) for name in names]
    return [blend if each is None else f"{blend}({each})" for blend, each in zip(blends, settings, strict=True)]


def open_console() -> "Console":
    """Where tables are printed: stdout as it is now."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)


def print_json(document: Any) -> None:
    """One JSON document on stdout, with ``null`` for numbers that are NaN or infinite."""
    from bayes_dispatch.storage import finite

    print(json.dumps(finite(document), indent=2, allow_nan=False))


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


def check_new_output(path: Path, index: str, changed: Path | None = None) -> None:
    """Refuse, too, a directory that holds anything, but for the bundle that the command changes.

    Args:
        path: the directory. index: of the save that is to be written. changed: the bundle that the command changes,
            which may be written in its own place.

    Raises:
        ConfigError: as :func:`check_output`. BundleError: it is a link, or holds something else.
    """
    from bayes_dispatch.storage import check_directory, check_unused

    check_output(path)
    if changed is not None and changed.exists() and path.exists() and path.samefile(changed):
        check_directory(path, index)
    else:
        check_unused(path)


def typed(text: str, escapes: bool) -> bytes:
    """The bytes that were typed, UTF-8 or not."""
    if escapes:
        text = "\\".join(part.replace("\\n", "\n") for part in text.split("\\\\"))
    return os.fsencode(text)


def mapped_on_ray(device: str) -> "AbstractContextManager[MapBlocks]":
    """A Ray cluster, not yet begun, in which blocks are scored and read.

    Args:
        device: where the bundles run.

    Raises:
        ConfigError: another one than the CPU: blocks are given cores, and no GPU. MissingDependencyError: Ray is not
            installed.
    """
    if device != "cpu":
        raise ConfigError(f"expected --device cpu with --ray, whose blocks have a core each, got {device:.80}")
    try:
        from bayes_dispatch.serving.ray.bulk import blocks_on_ray
    except ImportError as error:
        raise MissingDependencyError.of("ray", error) from None
    return blocks_on_ray()


def components_of(bundle: Path | None) -> tuple[str, ...]:
    """Names of a bundle's experts, and base, of which no model and no expert is read.

    Raises:
        BundleError: there is none, or its lists are damaged.
    """
    from bayes_dispatch.app.bundle import read_index
    from bayes_dispatch.app.shipped import bundle_directory
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.storage import read_saved

    def read(place: Path) -> tuple[str, ...]:
        read_index(place)
        return ExpertBank.load(place / "experts").components

    return read_saved(bundle_directory(bundle), "bundle.json", read)


def open_bundle(path: Path | None, device: str = "cpu", dtype: str | None = None) -> "Bundle":
    """See ``open_bundles``."""
    return open_bundles([path], device, dtype)[0]


def open_bundles(paths: Sequence[Path | None], device: str = "cpu", dtype: str | None = None) -> "list[Bundle]":
    """Load bundles, and use as many threads as the largest model gains by, unless ``OMP_NUM_THREADS`` tells.

    Args:
        paths, device, dtype: as for ``load_bundle``.

    Raises:
        BundleError: see ``load_bundle``.
    """
    from bayes_dispatch.app.bundle import load_bundle

    bundles = [load_bundle(path, device=device, dtype=dtype) for path in paths]
    if all(sum(out * width for out, width in each.model.linears().values()) < LARGE for each in bundles):
        use_one_thread()
    return bundles


def use_one_thread() -> None:
    """More gain nothing with a small model, cost much where cores are busy, and make rounding depend on them."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
