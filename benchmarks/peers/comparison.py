"""Section "peers": the models of a group side by side, in prefill, decode, training and its memory."""

import math
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from peers.contestant import Contestant, Entry, Group
from peers.memory import peak_of_training, training_step
from peers.timing import Times, Work, interleaved

__all__ = ["Scale", "built", "comparison", "decode", "parameters", "prompt"]


@dataclass(frozen=True)
class Scale:
    """How much to measure: prompt lengths, tokens per timed decode, batch and length of a training step, rounds."""

    prefill: tuple[int, ...] = (512, 4096)
    after: tuple[int, ...] = (32, 4096)
    tokens: int = 64
    batch: tuple[int, int] = (4, 256)
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    generated: tuple[int, ...] = (10, 20, 50, 500)
    repeats: int = 7
    budget: float = 60.0

    @classmethod
    def quick(cls) -> "Scale":
        """Short prompts only, for a look while working."""
        return cls(
            prefill=(512,), after=(32,), tokens=32, lengths=(1024, 4096), generated=(10, 50), repeats=3, budget=15
        )


def prompt(length: int, batch: int = 1) -> Tensor:
    """Random bytes, the same in every call."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(length))


def parameters(contestant: Contestant) -> int:
    """Numbers in its weights; tied ones count once."""
    return sum(p.numel() for p in contestant.module.parameters())


def built(entries: tuple[Entry, ...]) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The models in evaluation mode, and why a peer is missing."""
    contestants, missing = {}, {}
    for entry in entries:
        torch.manual_seed(0)
        try:
            contestants[entry.name] = entry.build()
        except ModuleNotFoundError as error:
            if entry.ours or (error.name or "").startswith(("bayes_dispatch", "peers")):
                raise
            missing[entry.name] = f"not installed: {error.name}"
            continue
        contestants[entry.name].module.eval()
    return contestants, missing


def decode(contestant: Contestant, after: int, tokens: int) -> Work:
    """Work that reads ``tokens`` one by one from a cache that holds ``after``; filling and copying it is not timed."""
    steps = prompt(tokens).split(1, dim=1)
    filled = None

    def prepare() -> object:
        nonlocal filled
        if filled is None:
            filled = contestant.start(after + tokens)
            contestant.extend(prompt(after), filled)
        return contestant.clone(filled)

    def run(state: object) -> None:
        for token in steps:
            contestant.extend(token, state)

    return Work(run, prepare)


def cache_error(contestant: Contestant, pieces: list[int]) -> float | str:
    """Largest difference between logits read in pieces with a cache and all at once without, over the largest logit."""
    ids = prompt(sum(pieces))
    whole = contestant.logits(ids)
    try:
        state = contestant.start(ids.shape[1])
        read = torch.cat([contestant.extend(piece, state) for piece in ids.split(pieces, dim=1)], dim=1)
    except Exception as error:  # a peer's; ours are tested elsewhere
        return f"fails: {type(error).__name__}"
    return float((read - whole).abs().max() / whole.abs().max())


def comparison(group: Group, scale: Scale, threads: int) -> tuple[list[Table], list[dict[str, object]]]:
    """Tables of the models and of their times, and the same as records."""
    contestants, missing = built(group.entries)
    ours = {entry.name for entry in group.entries if entry.ours}
    with torch.inference_mode():
        models, records = _models(group, contestants, missing)
        measures = {
            f"prefill {n}": _prefill(contestants, ours, n, scale, f"{group.name}: prefill {n}") for n in scale.prefill
        }
        for n in scale.after:
            works = {name: decode(contestant, n, scale.tokens) for name, contestant in contestants.items()}
            works = {name: Work(w.run, w.prepare, fragile=name not in ours) for name, w in works.items()}
            times = interleaved(works, f"{group.name}: decode after {n}", scale.repeats, scale.budget)
            measures[f"decode after {n}"] = times, scale.tokens
    measures["training step"] = _training(contestants, ours, scale, f"{group.name}: training")
    memory = {
        name: peak_of_training(group.name, name, scale.batch, threads)
        for name in contestants
        if name not in measures["training step"][0].failed
    }
    table = _times(group, contestants, measures, memory, threads)
    for measure, (times, tokens) in measures.items():
        records += _records(measure, times, tokens, next(iter(contestants)))
    records += [{"measure": "training memory", "model": name, "bytes": peak} for name, peak in memory.items()]
    return [models, table], [{"group": group.name} | record for record in records]


def _prefill(
    contestants: dict[str, Contestant], ours: set[str], length: int, scale: Scale, title: str
) -> tuple[Times, int]:
    ids = prompt(length)
    works = {
        name: Work(lambda _, c=contestant: c.prefill(ids), fragile=name not in ours)  # type: ignore[misc]
        for name, contestant in contestants.items()
    }
    return interleaved(works, title, scale.repeats, scale.budget), length


def _training(contestants: dict[str, Contestant], ours: set[str], scale: Scale, title: str) -> tuple[Times, int]:
    batch, length = scale.batch
    ids = prompt(length, batch)
    for contestant in contestants.values():
        contestant.module.train()
    works = {
        name: Work(lambda _, c=contestant: training_step(c, ids), fragile=name not in ours)  # type: ignore[misc]
        for name, contestant in contestants.items()
    }
    return interleaved(works, title, scale.repeats, scale.budget), batch * length


def _models(
    group: Group, contestants: dict[str, Contestant], missing: dict[str, str]
) -> tuple[Table, list[dict[str, object]]]:
    """Sizes, and whether caches are right: a prompt and then single tokens, and a prompt in two parts."""
    table = Table("model", "blocks", "parameters", "÷ ours", "cache: 48 + 16 × 1", "cache: 32 + 32", title=group.title)
    reference = parameters(next(iter(contestants.values())))
    records: list[dict[str, object]] = []
    for entry in group.entries:
        if entry.name in missing:
            table.add_row(entry.name, missing[entry.name])
            continue
        contestant = contestants[entry.name]
        count = parameters(contestant)
        if not 0.9 <= count / reference <= 1.1:
            raise ValueError(f"expected {entry.name} to have {reference} parameters ± 10 %, got {count}")
        errors = [cache_error(contestant, pieces) for pieces in ([48] + [1] * 16, [32, 32])]
        shown = [error if isinstance(error, str) else f"{error:.0e}" for error in errors]
        marked = [f"[red]{s}[/]" if isinstance(e, str) or e > 1e-3 else s for e, s in zip(errors, shown, strict=True)]
        table.add_row(entry.name, entry.blocks, f"{count / 1e6:.2f}M", f"{count / reference:.2f}", *marked)
        about = {"parameters": count, "cache_steps_error": errors[0], "cache_parts_error": errors[1]}
        records.append({"measure": "model", "model": entry.name} | about)
    return table, records


def _times(
    group: Group,
    contestants: dict[str, Contestant],
    measures: dict[str, tuple[Times, int]],
    memory: dict[str, int | None],
    threads: int,
) -> Table:
    """Tokens per second, their spread, and how many times as fast ours is."""
    first = next(iter(contestants))
    table = Table("model", *measures, "training memory", title=f"{group.title}: tokens/s, × ours, threads: {threads}")
    for name in contestants:
        cells = [_cell(times, tokens, name, first) for times, tokens in measures.values()]
        peak = memory.get(name)
        ratio = f" {peak / memory[first]:.2f}×" if peak and memory[first] else ""
        table.add_row(name, *cells, f"{peak / 2**20:.0f} MiB{ratio}" if peak else "—")
    table.add_section()
    peers = [entry.name for entry in group.entries if entry.name in contestants and not entry.ours]
    for name in [entry.name for entry in group.entries if entry.ours]:
        best = [_best(times, peers, name) for times, _ in measures.values()]
        least = min((memory[p] or math.inf for p in peers if p in memory), default=math.inf)
        mine = memory[name]
        table.add_row(f"{name} against best peer", *best, f"{least / mine:.2f}×" if mine and least < math.inf else "—")
    return table


def _cell(times: Times, tokens: int, name: str, reference: str) -> str:
    if name in times.failed:
        return f"[red]{times.failed[name].split(':')[0]}[/]"
    ratio, spread = times.ratio(name, reference)
    once = "once" if len(times.seconds[name]) == 1 else f"±{times.spread(name):.0%}"
    return f"{tokens / times.median(name):,.0f} {once}" + ("" if name == reference else f"  {ratio:.2f}× ±{spread:.0%}")


def _best(times: Times, peers: list[str], mine: str) -> str:
    ratios = {name: times.ratio(name, mine) for name in peers if name in times.seconds}
    if not ratios:
        return "—"
    name = min(ratios, key=lambda peer: ratios[peer][0])
    return f"[bold]{ratios[name][0]:.2f}×[/] ({name})"


def _records(measure: str, times: Times, tokens: int, reference: str) -> list[dict[str, object]]:
    records: list[dict[str, object]] = [
        {"measure": measure, "model": name, "failed": reason} for name, reason in times.failed.items()
    ]
    for name, seconds in times.seconds.items():
        ratio, spread = times.ratio(name, reference)
        rate = tokens / times.median(name)
        about = {"seconds": seconds, "tokens_per_second": rate, "ratio": ratio, "ratio_spread": spread}
        records.append({"measure": measure, "model": name} | about)
    return records
