"""Section "peers": the models of a group side by side, in prefill, decode, training and its memory."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from rich.table import Table

from peers.contestant import Contestant, Entry, Group
from peers.memory import peak_of_training
from peers.ours import Ours
from peers.tasks import Scale, decode, filled, parameters, prefill, products, prompt, training
from peers.timing import Times, Work, interleaved

__all__ = ["comparison"]

PRODUCTS = "matrix products of the first"  # the least that prefill and decode take
BROKEN = 1e-3  # a cache that changes the largest logit by more of it
Record = dict[str, object]


@dataclass(frozen=True)
class Measure:
    """Times of one task, and the tokens that it takes."""

    name: str
    tokens: int
    times: Times


def comparison(group: Group, scale: Scale, threads: int) -> tuple[list[Table], list[Record]]:
    """Tables of the models and of their times, and the same as records."""
    contestants, missing = built(group.entries)
    models, records = describe(group, contestants, missing)
    measures = measured(group, contestants, scale)
    failed = measures[-1].times.failed
    memory = {
        name: peak_of_training(group.name, name, scale.batch, threads) for name in contestants if name not in failed
    }
    first = group.entries[0].name
    records += [record for measure in measures for record in _records(measure, first)]
    records += [{"measure": "training memory", "model": name, "bytes": peak} for name, peak in memory.items()]
    times = _table(group, contestants, measures, memory, threads)
    return [models, times], [{"group": group.name} | record for record in records]


def built(entries: tuple[Entry, ...]) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The models, in evaluation mode, and which package is missing for a peer."""
    contestants, missing = {}, {}
    for entry in entries:
        torch.manual_seed(0)
        try:
            contestants[entry.name] = entry.build()
            contestants[entry.name].module.eval()
        except ModuleNotFoundError as error:
            if entry.ours or (error.name or "").startswith(("bayes_dispatch", "peers")):
                raise
            missing[entry.name] = error.name or str(error)
    return contestants, missing


def measured(group: Group, contestants: dict[str, Contestant], scale: Scale) -> list[Measure]:
    """All tasks, the training step last."""
    ours = {entry.name for entry in group.entries if entry.ours}

    def measure(name: str, tokens: int, works: dict[str, Work]) -> Measure:
        works = {who: replace(work, fragile=who not in ours) for who, work in works.items()}
        return Measure(name, tokens, interleaved(works, f"{group.name}: {name}", scale.rounds))

    weights = cast(Ours, contestants[group.entries[0].name]).matrices()
    measures = []
    with torch.inference_mode():
        for n in scale.prefill:
            works = {who: prefill(c, n) for who, c in contestants.items()}
            measures.append(measure(f"prefill {n}", n, works | {PRODUCTS: products(weights, n, 1)}))
        for n in scale.after:
            works = {
                who: decode(c, lambda c=c, n=n: filled(c, n, scale.tokens), scale.tokens)  # type: ignore[misc]
                for who, c in contestants.items()
            }
            works[PRODUCTS] = products(weights, 1, scale.tokens)
            measures.append(measure(f"decode after {n}", scale.tokens, works))
    works = {who: training(c, scale.batch) for who, c in contestants.items()}
    return [*measures, measure("training step", scale.batch[0] * scale.batch[1], works)]


@torch.inference_mode()
def describe(group: Group, contestants: dict[str, Contestant], missing: dict[str, str]) -> tuple[Table, list[Record]]:
    """Sizes, and whether caches are right: for a prompt and then single tokens, and for a prompt in two parts.

    Raises:
        ValueError: the number of parameters of an entry is not that of the first, ±10 %.
    """
    columns = ("model", "blocks", "parameters", "÷ ours", "cache error, 48 + 16 × 1", "cache error, 32 + 32")
    table = Table(*columns, title=group.title)
    reference = parameters(contestants[group.entries[0].name])
    records: list[Record] = []
    for entry in group.entries:
        if entry.name in missing:
            table.add_row(entry.name, f"[red]not installed: {missing[entry.name]}[/]")
            continue
        count = parameters(contestants[entry.name])
        if not 0.9 <= count / reference <= 1.1:
            raise ValueError(f"expected {entry.name} to have {reference} parameters ± 10 %, got {count}")
        steps, parts = (cache_error(contestants[entry.name], pieces) for pieces in ([48] + [1] * 16, [32, 32]))
        size = (f"{count / 1e6:.2f}M", f"{count / reference:.2f}")
        table.add_row(entry.name, entry.blocks, *size, _verdict(steps), _verdict(parts))
        record = {"measure": "model", "model": entry.name, "blocks": entry.blocks, "parameters": count}
        records.append(record | {"cache_steps_error": steps, "cache_parts_error": parts})
    return table, records


def cache_error(contestant: Contestant, pieces: list[int]) -> float | str:
    """Largest difference between logits read in pieces with a cache and all at once without, over the largest logit."""
    ids = prompt(sum(pieces))
    whole = contestant.logits(ids)
    try:
        state = contestant.start(ids.shape[1])
        read = torch.cat([contestant.extend(piece, state) for piece in ids.split(pieces, dim=1)], dim=1)
        return float((read - whole).abs().max() / whole.abs().max())
    except Exception as error:  # of a peer: our own would fail in the measures too
        return f"{type(error).__name__}: {error}"


def _verdict(error: float | str) -> str:
    if isinstance(error, str):
        return f"[red]{error}[/]"
    return f"{error:.0e}" if error <= BROKEN else f"[red]{error:.0e}, wrong[/]"


def _table(
    group: Group,
    contestants: dict[str, Contestant],
    measures: list[Measure],
    memory: dict[str, int | None],
    threads: int,
) -> Table:
    """Tokens per second and their spread; and by how much ours is faster, or needs less memory."""
    first = group.entries[0].name
    title = f"{group.title}: tokens/s, and × what {first} takes; threads: {threads}"
    table = Table("model", *(measure.name for measure in measures), "training memory", title=title)
    for name in (*contestants, PRODUCTS):
        table.add_row(name, *(_cell(m, name, first) for m in measures), _megabytes(memory, name, first))
    table.add_section()
    peers = [entry.name for entry in group.entries if entry.name in contestants and not entry.ours]
    for name in (entry.name for entry in group.entries if entry.ours):
        least = [peak for peer in peers if (peak := memory.get(peer)) is not None]
        mine = memory[name]
        saved = f"[bold]{min(least) / mine:.2f}×[/]" if least and mine else "—"
        table.add_row(f"best peer against {name}", *(_best(m.times, peers, name) for m in measures), saved)
    return table


def _cell(measure: Measure, name: str, first: str) -> str:
    times = measure.times
    if name == PRODUCTS and name not in times.seconds:
        return "—"
    if name in times.failed:
        return f"[red]{times.failed[name].partition(':')[0]}[/]"
    rate = f"{measure.tokens / times.median(name):,.0f}"
    rate += " once" if len(times.seconds[name]) == 1 else f" ±{times.spread(name):.0%}"
    ratio, spread = times.ratio(name, first)
    return rate if name == first else f"{rate}  {ratio:.2f}× ±{spread:.0%}"


def _best(times: Times, peers: list[str], ours: str) -> str:
    ratios = {name: times.ratio(name, ours)[0] for name in peers if name in times.seconds}
    if not ratios:
        return "—"
    best = min(ratios, key=lambda name: ratios[name])
    return f"[bold]{ratios[best]:.2f}×[/] ({best})"


def _megabytes(memory: dict[str, int | None], name: str, first: str) -> str:
    peak, reference = memory.get(name), memory.get(first)
    if peak is None or reference is None:
        return "—"
    return f"{peak / 2**20:,.0f} MiB" + ("" if name == first else f"  {peak / reference:.2f}×")


def _records(measure: Measure, first: str) -> list[Record]:
    times = measure.times
    records: list[Record] = [
        {"measure": measure.name, "model": name, "failed": reason} for name, reason in times.failed.items()
    ]
    for name, seconds in times.seconds.items():
        ratio, spread = times.ratio(name, first)
        rate = measure.tokens / times.median(name)
        record: Record = {"measure": measure.name, "model": name, "tokens_per_second": rate}
        records.append(record | {"ratio": ratio, "ratio_spread": spread, "seconds": seconds})
    return records
