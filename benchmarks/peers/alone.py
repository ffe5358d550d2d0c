"""Sections on our models alone: against their floor, against the length of the context, with and without the cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from bayes_dispatch.model.config import BlockKind
from bayes_dispatch.model.mambaformer import MambaFormerForCausalLM
from bayes_dispatch.model.svd_linear import SVDLinear
from peers.comparison import Scale, decode, parameters, prompt
from peers.contestant import Contestant
from peers.groups import mambaformer, pure
from peers.ours import Ours
from peers.timing import Times, Work, interleaved

__all__ = ["cache", "floor", "length"]

KINDS: tuple[BlockKind, ...] = ("mamba2", "mamba1")
PAIRS = 4  # nine blocks, 3.3M parameters
WINDOW = 256
PIECE = 1024  # long contexts are read in pieces


def _build(build: Callable[[], Contestant]) -> Ours:
    torch.manual_seed(0)
    contestant = cast(Ours, build())
    contestant.module.eval()
    return contestant


MAMBAFORMERS = {f"MambaFormer, {kind}": lambda kind=kind: mambaformer(kind, PAIRS) for kind in KINDS}
PURE = {f"{kind} alone": lambda kind=kind: pure(kind) for kind in KINDS}
WINDOWED = {
    f"MambaFormer, {kind}, window {WINDOW}": lambda kind=kind: mambaformer(kind, PAIRS, WINDOW) for kind in KINDS
}


def matrices(model: MambaFormerForCausalLM) -> list[Tensor]:
    """All weight matrices that the model multiplies by, in the order of their use, the head's last."""
    modules = [m for m in model.modules() if isinstance(m, SVDLinear | nn.Linear) and m is not model.head]
    return [m.weight for m in modules] + [model.embedding.weight if model.head is None else model.head.weight]


def floor(scale: Scale, threads: int) -> tuple[list[Table], list[dict[str, object]]]:
    """The model against its matrix products alone: what no implementation of it can be faster than."""
    title = f"share of the floor (its matrix products alone), threads: {threads}"
    columns = [f"prefill {n}" for n in scale.prefill] + [f"decode after {scale.after[0]}"]
    table = Table("model", "parameters", "in products", *columns, title=title)
    records: list[dict[str, object]] = []
    for name, build in (MAMBAFORMERS | PURE).items():
        ours = _build(build)
        weights = matrices(ours.module)
        count = parameters(ours)
        cells = []
        for column, n in zip(columns, [*scale.prefill, 1], strict=True):
            decoding = n == 1
            tokens = scale.tokens if decoding else n
            ids = prompt(n)
            works = {
                "model": decode(ours, scale.after[0], tokens) if decoding else Work(lambda _, i=ids: ours.prefill(i)),
                "floor": _products(weights, n, tokens if decoding else 1),
            }
            with torch.inference_mode():
                times = interleaved(works, f"{name}: {column}", scale.repeats, scale.budget)
            share, spread = times.ratio("floor", "model")
            rates = {which: tokens / times.median(which) for which in works}
            cells.append(f"{rates['model']:,.0f} of {rates['floor']:,.0f} = [bold]{share:.0%}[/] ±{spread:.0%}")
            records.append({"model": name, "measure": column, "share": share, "spread": spread} | rates)
        table.add_row(name, f"{count / 1e6:.2f}M", f"{sum(w.numel() for w in weights) / count:.1%}", *cells)
    return [table], records


def _products(weights: list[Tensor], tokens: int, times: int) -> Work:
    inputs = {w.shape[1]: torch.randn(1, tokens, w.shape[1]) for w in weights}

    def run(_: object) -> None:
        for _step in range(times):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

    return Work(run)


def length(scale: Scale, threads: int) -> tuple[list[Table], list[dict[str, object]]]:
    """What a decoded token costs after ever longer contexts, and what the cache holds."""
    title = f"decode after a context: µs per token, × the shortest, cache; threads: {threads}"
    table = Table("model", *(f"{n:,}" for n in scale.lengths), title=title)
    records: list[dict[str, object]] = []
    for name, build in (PURE | WINDOWED).items():
        ours = _build(build)
        with torch.inference_mode():
            states = {str(n): _filled(ours, n, scale) for n in scale.lengths}
            steps = prompt(scale.tokens).split(1, dim=1)
            works = {
                n: Work(lambda s: [ours.extend(t, s) for t in steps], lambda s=state: ours.clone(s))
                for n, state in states.items()
            }
            times = interleaved(works, f"{name}: length", scale.repeats, scale.budget)
        cells = []
        for n, state in states.items():
            ratio, spread = times.ratio(n, str(scale.lengths[0]))
            micro = times.median(n) / scale.tokens * 1e6
            nbytes = state.info().nbytes
            cells.append(f"{micro:,.0f} [bold]{ratio:.2f}×[/] ±{spread:.0%} {nbytes / 2**10:,.0f} KiB")
            record = {"model": name, "context": int(n), "microseconds": micro, "ratio": ratio, "spread": spread}
            records.append(record | {"cache_bytes": nbytes})
        table.add_row(name, *cells)
    return [table], records


def _filled(ours: Ours, context: int, scale: Scale):
    state = ours.start(context + scale.tokens)
    for piece in prompt(context).split(PIECE, dim=1):
        ours.extend(piece, state)
    return state


@dataclass(frozen=True)
class Generator:
    """A model that generates: new token ids for a number of them, with or without its cache."""

    name: str
    generate: Callable[[int, bool], Tensor]


def generators() -> list[Generator]:
    """The cases of ``cache``."""
    ids = prompt(32)
    cases = []
    for name, build in (MAMBAFORMERS | PURE).items():
        model = _build(build).module
        cases.append(Generator(name, lambda n, use, m=model: m.generate(ids, max_new_tokens=n, use_cache=use)))
    return cases


def cache(scale: Scale, threads: int) -> tuple[list[Table], list[dict[str, object]]]:
    """Greedy generation with the cache against without, and whether the tokens are the same."""
    title = f"generation with the cache: tokens/s, × without it, threads: {threads}"
    table = Table("model", *(f"{n} new tokens" for n in scale.generated), title=title)
    records: list[dict[str, object]] = []
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
    return interleaved(works, f"{case.name}: {tokens} tokens", scale.repeats, scale.budget)
