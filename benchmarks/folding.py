"""One row's matrices multiplied by their scales once, or factors at every token: what each costs, by width and rows.

    python benchmarks/folding.py          # some minutes
    python benchmarks/folding.py --quick  # a smoke test; the numbers mean nothing

The first table has the products of all scaled matrices of a MambaFormer of the shipped depth, one token of each row,
CPU time on one thread: with factors that rows share, with a matrix W(z) for each row, and what building these takes.
*Pays from* is the number of tokens from which building pays by these times; the model is that of ``bayes-dispatch
measure``. The others generate with the shipped bundle under one blend both ways, in turn.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer

import bayes_dispatch as bd
from bayes_dispatch.app.commands.measure import mambaformer_shapes
from bayes_dispatch.app.tables import Table
from bayes_dispatch.model.mambaformer.compiled.product_costs import SWITCH, ProductCosts, machine, measure, save_costs
from bayes_dispatch.model.mambaformer.compiled.switch import kernels

__all__ = ["generation", "main", "products"]

PROMPT = "kfpa>apfk\nbcde>edcb\n"


def products(widths: tuple[int, ...], rows: tuple[int, ...], costs: ProductCosts, seconds: float) -> Table:
    """The table of single products; each number is the least of what fits into ``seconds``."""
    table: list[list[str]] = []
    for width in widths:
        shapes = mambaformer_shapes(width)
        predicted = next((n for n in range(1, 100_000) if costs.folding_pays(shapes, 4, n)), None)
        for count in rows:
            factored, folded, building = _times(shapes, count, seconds)
            pays = "never" if folded >= factored else str(int(building / (factored - folded)) + 1)
            by_model = ("never" if predicted is None else str(predicted)) if count == 1 else ""
            numbers = [f"{1000 * each:.3g}" for each in (factored, folded, building)]
            table.append([str(width), str(count), *numbers, f"{folded / factored:.2f}", pays, by_model])
    heads = [
        "width",
        "rows",
        "factored, ms",
        "W(z) of each row, ms",
        "building, ms",
        "ratio",
        "pays from",
        "model says",
    ]
    return Table("Products of a token", heads, table)


def _times(shapes: list[tuple[int, int]], count: int, seconds: float) -> tuple[float, float, float]:
    draw, product = np.random.default_rng(0), kernels().product

    def some(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, dtype=np.float32)

    factors = [(some(count, i), some(o, min(o, i)), some(count, min(o, i)), some(min(o, i), i)) for o, i in shapes]
    whole = [some(count, o, i) for o, i in shapes]

    def factored() -> None:
        for x, U, z, Vt in factors:
            product(x, U, z, Vt)

    def folded() -> None:
        for (x, *_), W in zip(factors, whole, strict=True):
            for row in range(count):
                product(x[row : row + 1], W[row], W[row, :0], W[row, :0])

    def building() -> None:
        for _, U, z, Vt in factors:
            for row in torch.from_numpy(z):
                (torch.from_numpy(U) * row) @ torch.from_numpy(Vt)

    return _least(factored, seconds), _least(folded, seconds), _least(building, seconds)


def _least(run: Callable[[], None], seconds: float) -> float:
    run()
    best, spent = float("inf"), 0.0
    while spent < seconds:
        start = time.process_time()
        run()
        taken = time.process_time() - start
        best, spent = min(best, taken), spent + taken
    return best


def generation(tokens: int, rounds: int) -> Table:
    """Both choices in the shipped bundle, in turn; the ratio is the median over rounds."""
    generator, taken = bd.TwoPassGenerator(bd.load_bundle()), np.empty((rounds + 1, 2))
    before = os.environ.get(SWITCH)
    with TemporaryDirectory() as directory:
        file = Path(directory) / "always.json"
        save_costs(ProductCosts(machine(), (1,), (1e-9,), 1e-30), file)
        try:
            for turn in range(rounds + 1):
                for which, choice in enumerate(("off", str(file))):
                    os.environ[SWITCH] = choice
                    start = time.process_time()
                    generator.generate([PROMPT], blend=bd.PosteriorMean(), max_new_tokens=tokens, seed=0)
                    taken[turn, which] = time.process_time() - start
        finally:
            if before is None:
                del os.environ[SWITCH]
            else:
                os.environ[SWITCH] = before
    factored, folded = 1000 * np.median(taken[1:], axis=0)  # the first round compiles
    ratio = np.median(taken[1:, 1] / taken[1:, 0])
    row = [str(tokens), f"{factored:.0f}", f"{folded:.0f}", f"{ratio:.2f}"]
    return Table(
        "The shipped bundle, one prompt, posterior mean", ["bytes", "factored, ms", "folded, ms", "ratio"], [row]
    )


def main(
    quick: Annotated[bool, typer.Option(help="a smoke test: one small width, few tokens")] = False,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    costs = measure()
    widths, seconds = ((64,), 0.001) if quick else ((128, 256, 512, 1024), 0.3)
    print(f"{costs}\n", flush=True)
    print(f"{products(widths, (1, 2, 4, 16), costs, seconds).to_markdown()}\n", flush=True)
    for tokens in (4,) if quick else (16, 64, 256, 1024):
        print(f"{generation(tokens, 1 if quick else 5).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
