"""Our blends beside those who blend adapters today, on documents of real language.

    python benchmarks/real_documents.py --json build/real.jsonl                  # three seeds of 64 a set: a day
    python benchmarks/real_documents.py --json build/real.jsonl --only tables    # of what was scored so far
    python benchmarks/real_documents.py --bundle runs/lora --only cost
    python benchmarks/real_documents.py --quick    # a smoke test on a tiny model; the numbers mean nothing

What a file of scores has is not scored again: a run that was stopped goes on, one of other sets or methods adds to it,
and files of several runs may be joined, line by line. All methods read the same tokens, the prompt's among them; exact
match is what greedy decoding would answer after the true text before. Fixed blends in hindsight are chosen for each
document by its own scored part.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from bayes_dispatch.app.tables import Table
from bayes_dispatch.inference.scoring.document_reader import TokenDocument
from peers.timing import Rounds, Work, interleaved
from real.methods import GROUPS, ROUTERS, Contest, contest
from real.parts import real_parts
from real.records import Record, Records, bank_of, tables
from real.sets import HALF, DocumentSet, document_sets

__all__ = ["costs", "main", "run"]

AT_ONCE = 4  # documents that are read together, and kept together


def run(
    contested: Contest,
    sets: Sequence[DocumentSet],
    groups: Sequence[str],
    seeds: Sequence[int],
    count: int,
    kept: Records,
) -> list[Record]:
    """The records of all these documents; what is not kept is scored."""
    bundle, found = contested.bundle, []
    bank = bank_of(bundle)
    numbers = [(each, seed, start) for each in sets for seed in seeds for start in range(0, count, AT_ONCE)]
    for each, seed, start in tqdm(numbers, disable=None):
        keys = {n: (bank, each.name, seed, n) for n in range(start, min(start + AT_ONCE, count))}
        unscored: dict[tuple[str, ...], list[int]] = {}
        for n, key in keys.items():
            done = kept[key].groups if key in kept else []
            unscored.setdefault(tuple(group for group in groups if group not in done), []).append(n)
        for lacking, own in unscored.items():
            if not lacking:
                continue
            cases = [each.case(seed, n) for n in own]
            for n, case, scores in zip(own, cases, contested.scores(cases, lacking, seed), strict=True):
                text = TokenDocument.of(case.document, bundle.tokenizer)
                place, names = (bank, each.name, each.kind, seed, n), list(bundle.experts.components)
                kept.add(Record(*place, names, text.scored_bytes, len(text.places), list(lacking), scores))
        found += [kept[key] for key in keys.values()]
    return found


def costs(contested: Contest, each: DocumentSet, repeats: int) -> Table:
    """Seconds to read one document under each method, beside base: its prompt, and what follows, which is given."""
    case = each.case(0, 0)
    works = {name: Work(lambda _, own=name: contested.scores([case], [own], 0)) for name in ("base", *GROUPS)}
    for name in ROUTERS.keys() - contested.routers.keys():
        del works[name]
    times = interleaved(works, "methods", Rounds(repeats, 600))
    rows = []
    for name in works:
        ratio, spread = times.ratio(name, "base")
        rows.append([name, f"{times.median(name):.2f}", f"{ratio:.2f} ± {ratio * spread:.2f}"])
    tokens = len(contested.bundle.tokenizer.tokenize(case.document.data).ids)
    note = f"{tokens} tokens; medians ± half the interquartile range. First pass, posterior and search are part of it."
    return Table("Reading one document under each method", ["", "seconds", "beside base"], rows, note)


def main(
    bundle: Annotated[Path, typer.Option(help="Its experts are named after their domains.")] = Path("smollm2"),
    model: Annotated[str | None, typer.Option(help="Its base model, where it lies elsewhere by now.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Where pip put the packages of the texts.")] = None,
    json: Annotated[Path | None, typer.Option(help="Lines of scores, kept and added to.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where evidence that hard routing is fitted on is kept.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A name or kind; may be repeated. All.")] = None,
    methods: Annotated[list[str] | None, typer.Option("--method", help=f"Of {', '.join(GROUPS)}; all.")] = None,
    documents: Annotated[int, typer.Option(min=2, help="Of each set and seed.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of the model's weights.")] = "float32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    only: Annotated[str, typer.Option(help="cost, or tables of what --json has.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test on a tiny model.")] = False,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(threads)
    if only not in ("", "cost", "tables"):
        raise typer.BadParameter(f"expected cost or tables, got {only!r}")
    kept = Records(json)
    if only == "tables":
        if len(banks := {bank for bank, *_ in kept}) != 1:
            raise typer.BadParameter(f"expected scores of one bundle in --json, got those of {len(banks)}")
        return _print(tables(kept.values()))
    groups = _chosen(methods, GROUPS, "method")
    with TemporaryDirectory() as scratch:
        if quick:
            from real.quick import SETTINGS, quick_bundle, quick_domains

            documents, seeds, bundle, settings = 2, 1, Path(scratch), SETTINGS
            parts = (quick_bundle(bundle), *quick_domains())
        else:
            parts, settings = real_parts(bundle, model, dtype, texts), None
        known = document_sets(*parts[1:], 150 if quick else HALF)
        names = _chosen(sets, [name for each in known for name in (each.kind, each.name)], "set")
        chosen = [each for each in known if each.name in names or each.kind in names]
        evidence = work or Path(gettempdir()) / "bayes-dispatch-evidence"
        contested = contest(parts[0], bundle, list(parts[1].values()), groups, evidence, settings)
    if only == "cost":
        several = next((each for each in chosen if len(each.domains) > 1), chosen[0])  # pairs are of these
        return _print([costs(contested, several, 3 if quick else 7)])
    _print(tables(run(contested, chosen, groups, range(seeds), documents, kept)))


def _chosen(names: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    if unknown := [name for name in names or () if name not in known]:
        raise typer.BadParameter(f"expected a {what} of {', '.join(dict.fromkeys(known))}, got {unknown[0]!r}")
    return list(names or known)


def _print(made: Sequence[Table]) -> None:
    for table in made:
        print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
