"""What less precise caches and pruned ones cost: bytes of memory, and nats per token, with the shipped model.

    python benchmarks/precision.py            # half a minute
    python benchmarks/precision.py --markdown
    python benchmarks/precision.py --checkpoint DIR --documents 8    # a model of transformers, in our core

Held-out documents of the base model's domains (of a checkpoint: prose and code) are read 16 tokens at a time, so that
nearly every one is predicted from states that were stored. Tokens of the shipped model are bytes.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bayes_dispatch as bd
from bayes_dispatch.experts.domains import BASE_TEXTS, CONVENTIONS, Domain
from bayes_dispatch.model.mambaformer.cache import Cache

LENGTH, PIECE = 512, 16


@dataclass(frozen=True)
class Variant:
    """A kind of cache: options of ``init_cache``, and how it is pruned before each piece."""

    name: str
    options: dict[str, Any]
    prune: dict[str, int] | None = None


VARIANTS = (
    Variant("float32", {}),
    Variant("keys and values in bfloat16", {"kv_dtype": torch.bfloat16}),
    Variant("keys and values in int8", {"kv_dtype": torch.int8}),
    Variant("all states in bfloat16", {"dtype": torch.bfloat16}),
    Variant("states in bfloat16, keys and values in int8", {"dtype": torch.bfloat16, "kv_dtype": torch.int8}),
    Variant("pruned to the last 256 tokens and 4 sinks", {}, {"keep": 256, "sinks": 4}),
    Variant("pruned to the last 128 tokens and 4 sinks", {}, {"keep": 128, "sinks": 4}),
    Variant("pruned to the last 128 tokens", {}, {"keep": 128, "sinks": 0}),
    Variant("pruned to the last 64 tokens and 4 sinks", {}, {"keep": 64, "sinks": 4}),
)


def documents(count: int, tokenizer: Any, domains: Sequence[Domain]) -> Tensor:
    """(count, LENGTH + 1) ids of held-out documents."""
    rng, rows = np.random.default_rng(0), []
    for index in range(count):
        ids: list[int] = []
        while len(ids) <= LENGTH:  # items end early
            data = domains[index % len(domains)].document(rng, 0, LENGTH, "held_out").data + b"\n"
            ids += tokenizer.tokenize(data, begin=not ids).ids
        rows.append(ids[: LENGTH + 1])
    return torch.tensor(rows)


@torch.inference_mode()
def read_in_pieces(model: bd.MambaFormerForCausalLM, ids: Tensor, variant: Variant) -> tuple[Tensor, Cache]:
    """Log-probabilities (document, token, next token), and the cache after the last."""
    slots = ids.shape[1] if variant.prune is None else sum(variant.prune.values()) + PIECE
    cache = model.init_cache(len(ids), slots, **variant.options)
    logits = []
    for piece in ids.split(PIECE, dim=1):
        if variant.prune is not None:
            cache.prune(**variant.prune)
        logits.append(model(piece, cache=cache).logits)
    return torch.cat(logits, dim=1).log_softmax(-1), cache


def exactness(model: bd.MambaFormerForCausalLM, ids: Tensor) -> str:
    """How far cached logits are from one pass over the document, beside how far rounding alone takes that pass."""
    lines = [f"Largest difference of logits to one pass without a cache, {len(ids)} documents:"]
    passes = {}
    for dtype in (torch.float32, torch.float64):
        copy = deepcopy(model).to(dtype)
        with torch.inference_mode():
            whole = passes[dtype] = copy(ids[:, :-1]).logits
        for name, size in ((f"{PIECE} tokens at a time", PIECE), ("one by one", 1)):
            with torch.inference_mode():
                cache = copy.init_cache(len(ids), LENGTH)
                pieces = [copy(piece, cache=cache).logits for piece in ids[:, :-1].split(size, dim=1)]
            error = float((torch.cat(pieces, dim=1) - whole).abs().max())
            lines.append(f"  {str(dtype).removeprefix('torch.')}, {name}: {error:.1e}")
    rounding = float((passes[torch.float32] - passes[torch.float64]).abs().max())
    lines.append(
        f"  float32 in one pass, to float64 in one pass: {rounding:.1e}, for logits up to {whole.abs().max():.0f}"
    )
    return "\n".join(lines)


def main(
    count: Annotated[int, typer.Option("--documents", help="How many.")] = 64,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A directory of a model that `from_transformers` reads; default: the shipped one."),
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if checkpoint is None:
        model, domains = bd.load_bundle().model, [*CONVENTIONS, *BASE_TEXTS]
    else:
        model, domains = bd.MambaFormerForCausalLM.from_transformers(checkpoint, dtype=torch.float32), [*BASE_TEXTS]
    ids = documents(count, model.tokenizer, domains)
    exact, _ = read_in_pieces(model, ids[:, :-1], VARIANTS[0])
    targets = ids[:, 1:, None]
    rows = []
    for variant in VARIANTS:
        found, cache = read_in_pieces(model, ids[:, :-1], variant)
        loss = (exact - found).gather(-1, targets)[..., 0]
        per_document = loss.mean(1)
        divergence = (exact.exp() * (exact - found)).sum(-1).mean()
        error = per_document.std() / len(ids) ** 0.5
        rows.append(
            (
                variant.name,
                f"{cache.nbytes / len(ids) / 1024:.0f}",
                f"{float(per_document.mean()):+.1e} ± {float(error):.0e}",
                f"{float(divergence):.1e}",
            )
        )
    differences = exactness(model, ids[: min(count, 8)]) if checkpoint is None else ""
    header = ("cache", "KiB a row", "NLL lost, nats a token", "KL to exact, nats")
    if markdown:
        print("\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * 4, *rows)))
        return print(f"\n{differences}")
    table = Table(*header, title=f"{count} held-out documents of {LENGTH} tokens, {PIECE} at a time")
    for row in rows:
        table.add_row(*row)
    Console().print(table, differences, sep="\n")


if __name__ == "__main__":
    typer.run(main)
