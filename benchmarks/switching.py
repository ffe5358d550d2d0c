"""From blend weights in hand to the first adapted token: scales by row and folded, beside rebuilding every matrix.

    python benchmarks/switching.py            # five minutes on one core, most of them three decompositions
    python benchmarks/switching.py --quick

One matrix of d × d and one token. *Rebuilt*: ``U diag(s ∘ z) Vᵀ`` as the published implementation of Transformer²
makes every matrix anew for each task. *By row*: two factored products; *folded* is ``SVDLinear``'s own choice for many
tokens, which pays only then. *Truncated*: the scales of the d / 16 largest singular values.
"""

import time
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from bayes_dispatch.app.tables import Table
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear
from peers.timing import Rounds, Work, interleaved

__all__ = ["main"]

EXPERTS = 8


def switching(width: int, rounds: int) -> Table:
    """Times at one width."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = SVDLinear(width, width)
        deviations = 0.1 * torch.randn(EXPERTS + 1, width)
        weights = torch.softmax(torch.randn(EXPERTS + 1), 0)
        x = torch.randn(1, 1, width)
    start = time.perf_counter()
    U, s, Vt, _ = linear.factors()
    seconds = time.perf_counter() - start
    leading = width // 16

    def blended() -> Tensor:
        return 1 + weights @ deviations

    works = {
        "base, no switch": Work(lambda _: F.linear(x, linear.weight)),
        "by row": Work(lambda _: linear(x, blended()[None])),
        "by row, truncated": Work(lambda _: linear(x, blended()[None, :leading])),
        "rebuilt": Work(lambda _: F.linear(x, U @ torch.diag(s * blended()) @ Vt)),
        "folded": Work(lambda _: F.linear(x, (U * (s * blended())) @ Vt)),
    }
    with torch.no_grad():
        times = interleaved(works, f"d {width}", Rounds(rounds))
    rows = [[n, f"{1e3 * times.median(n):.3g}", f"{times.ratio('rebuilt', n)[0]:.3g}"] for n in works]
    note = f"Medians of {rounds} rounds, one thread. The decomposition, once for a model: {seconds:.2f} s."
    return Table(f"Switching, d = {width:,}", ["", "ms", "times as fast as rebuilding"], rows, note)


def main(quick: Annotated[bool, typer.Option(help="small matrices alone")] = False) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    for width, rounds in ((128, 3),) if quick else ((128, 101), (1024, 15), (4096, 5)):
        print(f"{switching(width, rounds).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
