"""Sections on our models alone: against their floor, against the length of the context, with and without the cache."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from rich.table import Table
from torch import Tensor

from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.config import BlockKind
from peers.contestant import Contestant
from peers.groups import mambaformer, pure
from peers.ours import Ours
from peers.tasks import Scale, decode, filled, parameters, prefill, products, prompt
from peers.timing import Times, Work, interleaved

__all__ = ["cache", "floor", "length"]

KINDS: tuple[BlockKind, ...] = ("mamba2", "mamba1")
PAIRS = 4  # nine blocks, 3.3M parameters
WINDOW = 256
PIECE = 1024  # long contexts are read in pieces
Record = dict[str, object]
Build = Callable[[], Contestant]
MAMBAFORMERS: dict[str, Build] = {f"MambaFormer, {kind}": partial(mambaformer, kind, PAIRS) for kind in KINDS}
PURE: dict[str, Build] = {f"{kind} alone": partial(pure, kind) for kind in KINDS}
WINDOWED: dict[str, Build] = {
    f"MambaFormer, {kind}, window {WINDOW}": partial(mambaformer, kind, PAIRS, WINDOW) for kind in KINDS
}


def _build(build: Build) -> Ours:
    torch.manual_seed(0)
    contestant = cast(Ours, build())
    contestant.module.eval()
    return contestant


def floor(scale: Scale, threads: int) -> tuple[list[Table], list[Record]]:
    """The model against its matrix products alone: what no implementation of it can be faster than."""
    after, tokens = scale.after[0], scale.tokens
    columns = [f"prefill {n}" for n in scale.prefill] + [f"decode after {after}"]
    title = f"tokens/s of the model, of its matrix products alone, and share of these; threads: {threads}"
    table = Table("model", "parameters", "in products", *columns, title=title)
    records: list[Record] = []
    for name, build in (MAMBAFORMERS | PURE).items():
        ours = _build(build)
        weights = ours.matrices()
        tasks = [(n, prefill(ours, n), products(weights, n, 1)) for n in scale.prefill]
        step = decode(ours, lambda ours=ours: filled(ours, after, tokens), tokens)  # type: ignore[misc]
        tasks.append((tokens, step, products(weights, 1, tokens)))
        cells = []
        for column, (number, model, alone) in zip(columns, tasks, strict=True):
            with torch.inference_mode():
                works = {"model": model, "products": alone}
                times = interleaved(works, f"{name}: {column}", scale.rounds)
            share, spread = times.ratio("products", "model")
            rates = {which: number / times.median(which) for which in works}
            cells.append(f"{rates['model']:,.0f} / {rates['products']:,.0f} = [bold]{share:.0%}[/] ±{spread:.0%}")
            records.append({"model": name, "measure": column, "share": share, "spread": spread} | rates)
        count = parameters(ours)
        table.add_row(name, f"{count / 1e6:.2f}M", f"{sum(w.numel() for w in weights) / count:.1%}", *cells)
    return [table], records


def length(scale: Scale, threads: int) -> tuple[list[Table], list[Record]]:
    """What a decoded token costs after ever longer contexts, and what the cache holds."""
    title = f"decode after a context: µs per token, × the shortest, size of the cache; threads: {threads}"
    table = Table("model", *(f"{n:,}" for n in scale.lengths), title=title)
    shortest = str(scale.lengths[0])
    records: list[Record] = []
    for name, build in (PURE | WINDOWED).items():
        ours = _build(build)
        with torch.inference_mode():
            states = {str(n): filled(ours, n, scale.tokens, PIECE) for n in scale.lengths}
            works = {n: decode(ours, lambda s=s: s, scale.tokens) for n, s in states.items()}  # type: ignore[misc]
            times = interleaved(works, f"{name}: length", scale.rounds)
        cells = []
        for n, state in states.items():
            ratio, spread = times.ratio(n, shortest)
            micro = times.median(n) / scale.tokens * 1e6
            says, holds = state.info().nbytes, held(state)
            size = f"{says / 2**10:,.0f} KiB" + ("" if says == holds else f" [red]but holds {holds / 2**10:,.0f}[/]")
            cells.append(f"{micro:,.0f}  [bold]{ratio:.2f}×[/] ±{spread:.0%}  {size}")
            record = {"model": name, "context": int(n), "microseconds": micro, "ratio": ratio, "spread": spread}
            records.append(record | {"cache_info_bytes": says, "cache_held_bytes": holds})
        table.add_row(name, *cells)
    return [table], records


def held(cache: Cache) -> int:
    """Bytes of all memory that a cache's tensors lie in, whatever part of it they use."""
    storages = (tensor.untyped_storage() for state in cache.states for tensor in state.tensors().values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Generator:
    """A model that generates: new token ids for a number of them, with or without its cache."""

    name: str
    generate: Callable[[int, bool], Tensor]


def generators() -> list[Generator]:
    """The cases of ``cache``."""
    return [Generator(name, partial(_continue, _build(build))) for name, build in (MAMBAFORMERS | PURE).items()]


def _continue(ours: Ours, tokens: int, use_cache: bool) -> Tensor:
    return ours.module.generate(prompt(32), max_new_tokens=tokens, use_cache=use_cache)


def cache(scale: Scale, threads: int) -> tuple[list[Table], list[Record]]:
    """Greedy generation with the cache against without, and whether the tokens are the same."""
    title = f"generation with the cache: tokens/s, × without it, threads: {threads}"
    table = Table("model", *(f"{n} new tokens" for n in scale.generated), title=title)
    records: list[Record] = []
    for case in generators():
        cells = []
        for n in scale.generated:
            outputs: dict[bool, Tensor] = {}
            times = _both(case, n, outputs, scale)
            same = torch.equal(outputs[True], outputs[False])
            ratio, spread = times.ratio("uncached", "cached")
            verdict = "same ids" if same else "[red]other ids[/]"
            cells.append(f"{n / times.median('cached'):,.0f} [bold]{ratio:.1f}×[/] ±{spread:.0%} {verdict}")
            record = {"model": case.name, "tokens": n, "ratio": ratio, "spread": spread, "identical": same}
            records.append(record | {"seconds": times.seconds})
        table.add_row(case.name, *cells)
    return [table], records


def _both(case: Generator, tokens: int, outputs: dict[bool, Tensor], scale: Scale) -> Times:
    def work(use_cache: bool) -> Work:
        def run(_: object) -> None:
            outputs[use_cache] = case.generate(tokens, use_cache)

        return Work(run)

    works = {"cached": work(True), "uncached": work(False)}
    return interleaved(works, f"{case.name}: {tokens} tokens", scale.rounds)
