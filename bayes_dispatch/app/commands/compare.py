"""``bayes-dispatch compare``: blends, and two bundles, on the same documents, held-out ones or the user's own."""

import os
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_dispatch.app.commands.terminal import (
    BLENDS_HELP,
    BundleOption,
    DeviceOption,
    DrawsOption,
    DtypeOption,
    JsonOption,
    RayOption,
    SeedOption,
    TopKOption,
    components_of,
    mapped_on_ray,
    open_bundles,
    open_console,
    print_json,
    with_options,
)
from bayes_dispatch.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import pandas

    from bayes_dispatch.app.bulk import MapBlocks
    from bayes_dispatch.app.bundle import Bundle
    from bayes_dispatch.app.tables import Table
    from bayes_dispatch.inference.scoring.scores import Comparison

__all__ = ["compare"]

LONGEST = 4096  # bytes of a document
DEFAULT_BLENDS = ("base", "best_expert", "top_k", "posterior_mean", "thompson_sample", "posterior_predictive")
DEFAULT_DOCUMENTS = 8
OURS, THEIRS = "bundle", "other"


def compare(
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Held-out documents: pure, mixed, switching, foreign, or one domain; default: all."),
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help='Documents of your own: lines of {"text": …, "prompt_bytes": …}.')
    ] = None,
    blends: Annotated[
        list[str] | None,
        typer.Option(
            "--blend",
            help=f"{BLENDS_HELP} Repeatable; default: six of them.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The blend that the others are compared with; default: posterior_predictive, or the first."),
    ] = None,
    other: Annotated[
        Path | None, typer.Option(help="Directory of another bundle, to compare with --bundle under each blend.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=2, help=f"How many of each held-out domain; default: {DEFAULT_DOCUMENTS}.")
    ] = None,
    top_k: TopKOption = None,
    draws: DrawsOption = None,
    csv: Annotated[Path | None, typer.Option(help="Write a row for each document and blend to this file.")] = None,
    ray: RayOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    bundle: BundleOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Compare blends on documents: NLL, exact match, calibration, entropy and cost, with paired differences."""
    if jsonl is not None and (sets or documents is not None):
        raise ConfigError(f"expected --jsonl, or --set and --documents, got both: {jsonl} beside held-out documents")
    from bayes_dispatch.experts.domains import EXPERT_DOMAINS
    from bayes_dispatch.inference.two_pass.blends import ALIASES, as_blend, full_name

    compared = with_options(blends or DEFAULT_BLENDS, top_k, draws)
    components = components_of(bundle)
    if jsonl is None and not sets and not {domain.name for domain in EXPERT_DOMAINS} & set(components):
        wanted = f"expected --jsonl FILE, documents for {', '.join(components[:-1])}, got none"
        raise ConfigError(f"{wanted}: held-out ones are of the experts that ship")
    names = [as_blend(name, components).name for name in compared]
    # an expert of an old bank may be called as a blend is
    typed = [name if name in components else ALIASES.get(name, name) for name in blends or DEFAULT_BLENDS]
    settings = dict(zip(typed, names, strict=True))
    if reference is not None:  # as it was named, or in full
        known = reference if reference in components else ALIASES.get(reference, reference)
        reference = settings.get(known) or full_name(reference, components)
    if reference is not None and reference not in names:
        raise UnknownNameError(f"expected a --reference of {', '.join(names)}, got {reference!r}")
    if other is not None and reference is not None:
        raise ConfigError(f"expected --reference or --other, got both: {reference} and {other}")
    usual = next((name for name in names if name.partition("(")[0] == "posterior_predictive"), names[0])
    against = OURS if other is not None else reference or usual
    if csv is not None:
        _check_file(csv)
    cluster = mapped_on_ray(device) if ray else None
    from bayes_dispatch.experts.document_files import read_documents
    from bayes_dispatch.inference.scoring.compare import compare_systems
    from bayes_dispatch.inference.scoring.held_out import KINDS, held_out_sets

    places = {OURS: bundle} if other is None else {OURS: bundle, THEIRS: other}
    systems = dict(zip(places, open_bundles(list(places.values()), device, dtype), strict=True))
    if jsonl is None:
        given = held_out_sets(list(dict.fromkeys(sets or KINDS)), documents or DEFAULT_DOCUMENTS, seed)
    elif len(own := read_documents(jsonl, LONGEST)) < 2:
        raise ConfigError(f"expected at least 2 documents in {jsonl}, got {len(own)}")
    else:
        given = {jsonl.name: own}
    console = open_console()
    frames: dict[str, pandas.DataFrame] = {}
    printed: dict[str, Any] = {}
    with _scoring(systems, places, device, dtype, cluster) as (score, named):
        for name, texts in given.items():
            asked = (texts, compared, seed, sys.stderr.isatty())
            found = score(named[OURS], *asked) if other is None else compare_systems(named, *asked, score)
            frames[name], summary, differences = found.to_frame(), found.summary(), found.differences(against)
            printed[name] = {"summary": summary.to_dict("records"), "differences": differences.to_dict("records")}
            if not as_json:
                console.print(_summary_table(name, summary).to_rich())
                if len(differences):
                    console.print(_difference_table(name, differences, against).to_rich())
    if csv is not None:
        _write(csv, frames)
    if as_json:
        print_json({"seed": seed, "reference": against, "sets": printed})


@contextmanager
def _scoring(
    systems: "Mapping[str, Bundle]",
    places: Mapping[str, Path | None],
    device: str,
    dtype: str | None,
    cluster: "AbstractContextManager[MapBlocks] | None",
) -> "Iterator[tuple[Callable[..., Comparison], Mapping[str, Any]]]":
    """What scores documents, and the systems as it takes them: here, or in a cluster."""
    from bayes_dispatch.inference.scoring.compare import compare_blends

    if cluster is None:
        yield compare_blends, systems
        return
    from bayes_dispatch.app.bulk import compare_in_blocks
    from bayes_dispatch.app.bundle_at import BundleAt

    named = {system: BundleAt.here(place, device, dtype) for system, place in places.items()}
    with cluster as mapped:
        yield partial(compare_in_blocks, mapped), named


def _summary_table(name: str, summary: "pandas.DataFrame") -> "Table":
    from bayes_dispatch.app.tables import Cell, Table, visible

    rows: list[list[Cell | str]] = []
    for row in summary.to_dict("records"):
        means = [f"{row[metric]:.3f} ± {row[f'{metric}_se']:.3f}" for metric in ("nll", "exact_match")]
        parts = [f"{row[metric]:.3f}" for metric in ("ece", "entropy", "aleatoric", "mutual_information")]
        best = row["nll"] == summary.nll.min()
        label = " ".join(row[key] for key in ("system", "blend") if key in row)
        rows.append([label, Cell(means[0], "best" if best else "plain"), means[1], *parts, str(row["rows"])])
    heads = ["blend", "NLL", "exact match", "ECE", "entropy", "aleatoric", "epistemic", "rows"]
    note = (
        f"{summary.documents.iloc[0]} documents; ± standard error. NLL and entropy: nats per scored byte. Exact: "
        "answers whose every byte is right. ECE: of the most probable byte. Rows: of the model, run at once."
    )
    return Table(visible(name), heads, rows, note)


def _difference_table(name: str, differences: "pandas.DataFrame", reference: str) -> "Table":
    from bayes_dispatch.app.tables import Cell, Table, visible

    keys = [key for key in ("system", "blend") if key in differences]
    rows: list[list[Cell | str]] = []
    for labels, part in differences.groupby(keys, sort=False):
        by_metric = part.set_index("metric")
        cells = [
            f"{by_metric.difference[metric]:+.3f} [{by_metric.low[metric]:+.3f}, {by_metric.high[metric]:+.3f}]"
            for metric in ("nll", "exact_match", "ece")
        ]
        rows.append([" ".join(map(str, labels)), *cells])
    note = "Paired by document, with 95% intervals. ECE: of each document's own bytes."
    return Table(f"{visible(name)}: minus {reference}", ["blend", "NLL", "exact match", "ECE"], rows, note)


def _check_file(path: Path) -> None:
    """Refuse, before any work, a file that could not be written later."""
    if path.is_dir():
        raise ConfigError(f"expected a file for --csv, got the directory {path}")
    parent = Path(os.path.realpath(path)).parent
    if not path.exists() and not parent.is_dir():
        raise ConfigError(f"expected an existing directory for {path}, got {parent}, which is none")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise ConfigError(f"expected a writable place for {path}, got one that takes no new content")


def _write(path: Path, frames: "dict[str, pandas.DataFrame]") -> None:
    """All rows after a column ``set``."""
    import pandas

    from bayes_dispatch.storage import write_output

    table = pandas.concat([frame.assign(set=name) for name, frame in frames.items()], ignore_index=True)
    columns = ["set", *[column for column in table.columns if column != "set"]]
    write_output(path, table[columns].to_csv(index=False).encode())
