"""Serving only what the model is sure of: which number ranks the predictive's bytes and documents best?

    python benchmarks/selective_generation.py            # a minute or two for each seed
    python benchmarks/selective_generation.py --quick    # a smoke test; the numbers mean nothing

Bytes of held-out answers under ``PosteriorPredictive(16)``, given the true bytes before them, are served in order of
each of several confidences; the risk is the share of wrong ones. Documents are served in order of the same numbers'
means, and the risk is the share of their answers that are wrong. AURC is the mean risk over all coverages: less is
better. Intervals are of a bootstrap over the documents of a table; differences are taken within each resample. Texts
are left out: no byte of them is an answer, and most are anybody's guess.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import typer

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.selective import risk_coverage
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.inference.scoring.compare import score_together
from bayes_dispatch.inference.scoring.evaluation import held_out_documents
from bayes_dispatch.inference.scoring.held_out import KINDS
from bayes_dispatch.inference.scoring.scores import Score
from bayes_dispatch.inference.two_pass.system import Dispatched

__all__ = ["Answered", "main", "table"]

FIRST = "mutual information"
CONFIDENCES = (FIRST, "entropy", "aleatoric entropy", "most probable byte", "largest mean weight of the prompt")


@dataclass(frozen=True, eq=False)
class Answered:
    """One document.

    Attributes:
        wrong: (P,) which of its scored bytes are wrong. loss: share of its answers that are.
        confidence: by name of :data:`CONFIDENCES` (P,), more is surer.
    """

    wrong: np.ndarray
    loss: float
    confidence: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, score: Score, weight: float) -> "Answered":
        """From a score of the predictive; ``weight``: the largest mean weight that the dispatcher gave the prompt."""
        scored = score.scored
        values = (
            -scored.mutual_information,
            -scored.entropy,
            scored.mutual_information - scored.entropy,
            scored.confidence,
            np.full(len(scored.right), weight),
        )
        return cls(~scored.right, 1 - score.exact_match, dict(zip(CONFIDENCES, values, strict=True)))


def judge(bundle: bd.Bundle, documents: Sequence[bd.Document], seed: int) -> list[Answered]:
    """The predictive's answers in some documents."""
    posterior = Dispatched().posterior(bundle, [document.prompt for document in documents], seed)
    particles = {"predictive": bd.PosteriorPredictive(16).particles(posterior)}
    scores = score_together(bundle.model, bundle.experts, documents, particles)["predictive"]
    return [Answered.of(score, float(mean.max())) for score, mean in zip(scores, posterior.mean, strict=True)]


def table(kind: str, documents: Sequence[Answered], resamples: int, seed: int) -> Table:
    """AURC of each confidence, and that of mutual information minus it, with 95% intervals."""
    rng = np.random.default_rng(seed)
    whole = _areas(documents)
    drawn = np.stack(
        [_areas([documents[n] for n in rng.integers(len(documents), size=len(documents))]) for _ in range(resamples)]
    )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)  # (level, confidence)
    gain = drawn[:, :, :1] - drawn
    worst, best = np.quantile(gain, [0.025, 0.975], axis=0)
    rows = []
    for k, name in enumerate(CONFIDENCES):
        cells = [name]
        for level in range(2):
            cells.append(f"{whole[level, k]:.4f} [{low[level, k]:.4f}, {high[level, k]:.4f}]")
            difference = whole[level, 0] - whole[level, k]
            cells.append("" if k == 0 else f"{difference:+.4f} [{worst[level, k]:+.4f}, {best[level, k]:+.4f}]")
        rows.append(cells)
    heads = ["served in order of", "AURC, bytes", f"{FIRST} minus it", "AURC, documents", f"{FIRST} minus it"]
    count, wrong = sum(len(each.wrong) for each in documents), np.concatenate([each.wrong for each in documents]).mean()
    note = f"{len(documents)} documents, {count:,} bytes, {wrong:.3f} of them wrong. Below 0: {FIRST} is better."
    return Table(f"Serving the surest, {kind} documents", heads, rows, note)


def _areas(documents: Sequence[Answered]) -> np.ndarray:
    """(2, confidence) AURC of bytes, and of documents by the mean of theirs."""
    wrong = np.concatenate([each.wrong for each in documents])
    losses = np.array([each.loss for each in documents])
    areas = [
        (
            risk_coverage(np.concatenate([each.confidence[name] for each in documents]), wrong).aurc,
            risk_coverage(np.array([each.confidence[name].mean() for each in documents]), losses).aurc,
        )
        for name in CONFIDENCES
    ]
    return np.array(areas).T


def main(
    documents: Annotated[int, typer.Option(min=2, help="of each set and seed")] = 32,
    first_seed: Annotated[int, typer.Option(min=0, help="of documents and draws")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="how many, from the first")] = 3,
    resamples: Annotated[int, typer.Option(min=10, help="of the bootstrap")] = 400,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke test: two documents of one seed")] = False,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    if quick:
        documents, seeds, resamples = 2, 1, 10
    bundle = bd.load_bundle()
    answered: dict[str, list[Answered]] = {}
    for kind, domains in (KINDS | {"pure": CONVENTIONS, "foreign": ()}).items():
        for domain in domains:
            for seed in range(first_seed, first_seed + seeds):
                found = judge(bundle, held_out_documents(domain, documents, seed), seed)
                answered.setdefault(kind, []).extend(found)
    answered["all"] = [each for found in answered.values() for each in found]
    for kind, found in answered.items():
        print(f"{table(kind, found, resamples, first_seed).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
