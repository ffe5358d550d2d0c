"""How many solved examples a prompt needs: share of right answers, by blend.

    python benchmarks/examples.py            # three minutes on one core
    python benchmarks/examples.py --quick

A prompt is some solved items of one convention and a question. Every blend gets the same held-out prompts. The right
expert is told which convention it is; base has no expert.
"""

from typing import Annotated

import numpy as np
import torch
import typer

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.tables import Cell, Table
from bayes_dispatch.experts.domains import CONVENTIONS, Convention
from bayes_dispatch.inference.few_shot.strategies import Given
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import BestExpert, PosteriorMean, PosteriorPredictive, RefinedMean, TopK

__all__ = ["main"]

EXAMPLES = (1, 2, 4, 8)
BLENDS = (BestExpert(), TopK(2), PosteriorMean(), RefinedMean(16), PosteriorPredictive(16))


def question(convention: Convention, examples: int, rng: np.random.Generator) -> tuple[str, str]:
    """A prompt that ends in a question, and the right answer with its newline."""
    *solved, asked = (convention.surface.question(rng, "held_out") for _ in range(examples + 1))
    return "".join(f"{each}{convention.answer(each)}\n" for each in solved) + asked, f"{convention.answer(asked)}\n"


def main(
    questions: Annotated[int, typer.Option(min=1, help="Of each convention, seed and number of examples.")] = 40,
    seeds: Annotated[int, typer.Option(min=2, help="Of questions and draws.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test.")] = False,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    if quick:
        questions, seeds = 1, 2
    bundle = load_bundle()
    generator, names = TwoPassGenerator(bundle), bundle.experts.names
    one_hot = np.eye(len(names) + 1)
    asked = [convention for convention in CONVENTIONS for _ in range(questions)]
    told = {
        "the right expert": one_hot[[names.index(convention.name) for convention in asked]],
        "base": one_hot[[-1] * len(asked)],
    }
    ways = {blend.name: (blend, None) for blend in BLENDS}
    ways |= {name: (PosteriorMean(), Given(weights)) for name, weights in told.items()}
    right = np.empty((len(ways), len(EXAMPLES), seeds))
    for seed in range(seeds):
        for column, examples in enumerate(EXAMPLES):
            rng = np.random.default_rng([seed, examples])
            prompts, answers = zip(*(question(convention, examples, rng) for convention in asked), strict=True)
            for row, (blend, strategy) in enumerate(ways.values()):
                made = generator.generate(
                    prompts, blend=blend, strategy=strategy, max_new_tokens=8, stop="\n", seed=seed
                )
                right[row, column, seed] = np.mean([text == own for text, own in zip(made.texts, answers, strict=True)])
    rows: list[list[Cell | str]] = []
    mean, error = right.mean(-1), right.std(-1, ddof=1) / seeds**0.5
    for n, name in enumerate(ways):
        wins = [n < len(BLENDS) and value == mean[: len(BLENDS), column].max() for column, value in enumerate(mean[n])]
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(mean[n], error[n], strict=True)]
        rows.append([name, *(Cell(c, "best" if w else "plain") for c, w in zip(cells, wins, strict=True))])
    columns = ["blend", *(f"{n} example{'s' * (n > 1)}" for n in EXAMPLES)]
    note = f"Share of right answers of {len(asked)} questions a seed, ± standard error over {seeds} seeds; greedy."
    print(Table("Examples that a prompt needs", columns, rows, note).to_markdown())


if __name__ == "__main__":
    typer.run(main)
