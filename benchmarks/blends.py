"""Every blend on held-out documents of one domain, mixed, switching and foreign, with ablations of the predictive.

    python benchmarks/blends.py --work /tmp/blends                            # three seeds, most of an hour on one core
    python benchmarks/blends.py --work /tmp/blends --set "reverse then sort"  # one set, a minute a seed
    python benchmarks/blends.py --quick                                       # a smoke test; the numbers mean nothing

Scores of each set and seed are kept under ``--work``, by names that tell the bundle, and not computed again: runs of
single sets, one after the other or at once, add up to the whole. Seeds are those of documents and posterior draws; the
bundle is always the same.

*Best fixed* is the blend of constant weights that does best on a document, known only afterwards: of all vertices
(each expert, base), all even pairs of them, and the posterior mean. It and the predictive of 64 take four fifths of all
rows: they are scored on the first quarter of the documents of each set and seed alone, and marked with a star. Texts
have no answers that could match: exact matches are of the other sets.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Cell, Table
from bayes_dispatch.checks.paired import paired_comparison
from bayes_dispatch.checks.reliability import confidence_curve
from bayes_dispatch.errors import UnknownNameError
from bayes_dispatch.experts.domains import EXPERT_TEXTS, FOREIGN_TEXTS
from bayes_dispatch.inference.scoring.compare import score_together
from bayes_dispatch.inference.scoring.evaluation import held_out_documents
from bayes_dispatch.inference.scoring.held_out import KINDS, domains_of
from bayes_dispatch.inference.scoring.scores import Score
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.system import Dispatched
from real.records import bank_of

__all__ = ["ABLATIONS", "Scores", "judge", "main", "tables"]

OURS, BEST_FIXED = bd.PosteriorPredictive(16).name, "best fixed"
BLENDS = ("base", "best_expert", "top_k(2)", "posterior_mean", "thompson_sample", OURS)
FIXED = "fixed weights"
ABLATIONS = (
    "never switches (ε = 0)",
    FIXED,
    "equal masses",
    "4 particles",
    "64 particles",
)
COSTLY = ("64 particles", BEST_FIXED)
QUICK_SETS = ("add", "add & reverse", "add then reversed_add", "rot13")


@dataclass(frozen=True, eq=False)
class Scores:
    """B blends on N documents with P scored bytes in all.

    Attributes:
        names: (B,). rows: (B,) particles.
        nll, exact_match, ece: (B, N). confidence, right: (B, P) of the most probable byte. NaN, and not right, on
            documents that a blend was not scored on.
    """

    names: np.ndarray
    rows: np.ndarray
    nll: np.ndarray
    exact_match: np.ndarray
    ece: np.ndarray
    confidence: np.ndarray
    right: np.ndarray

    def of(self, name: str, metric: str) -> np.ndarray:
        """One metric of one blend."""
        return getattr(self, metric)[list(self.names).index(name)]

    def mean(self, name: str, metric: str) -> float:
        """Over the documents that the blend was scored on."""
        return float(np.nanmean(self.of(name, metric)))

    def calibration_error(self, name: str) -> float:
        """Of all bytes of these documents together."""
        confidence = self.of(name, "confidence")
        known = np.isfinite(confidence)
        return confidence_curve(confidence[known], self.of(name, "right")[known]).expected_calibration_error

    def without_answers(self) -> "Scores":
        """The same of documents that are text, of which no answer can match."""
        return replace(self, exact_match=np.full_like(self.exact_match, np.nan))

    def whole(self, name: str) -> bool:
        """Whether the blend was scored on all documents."""
        return bool(np.isfinite(self.of(name, "nll")).all())

    @classmethod
    def of_documents(cls, found: dict[str, list[Score]]) -> "Scores":
        """The scores of blends on the same documents."""
        fields = {
            field: np.array([[getattr(score, field) for score in scores] for scores in found.values()])
            for field in ("nll", "exact_match", "ece")
        }
        for field in ("confidence", "right"):
            values = [np.concatenate([getattr(score.scored, field) for score in scores]) for scores in found.values()]
            fields[field] = np.array(values)
        return cls(np.array(list(found)), np.array([scores[0].rows for scores in found.values()]), **fields)

    @classmethod
    def concatenate(cls, parts: Sequence["Scores"]) -> "Scores":
        """All documents of several sets or seeds, for the blends that any has."""
        rows = {name: count for part in parts for name, count in zip(part.names, part.rows, strict=True)}
        together = {}
        for field in ("nll", "exact_match", "ece", "confidence", "right"):
            columns = [np.stack([part._column(name, field) for name in rows]) for part in parts]
            together[field] = np.concatenate(columns, axis=1)
        return cls(np.array(list(rows)), np.array(list(rows.values())), **together)

    def _column(self, name: str, field: str) -> np.ndarray:
        own = getattr(self, field)
        if name in self.names:
            return self.of(name, field)
        return np.full(own.shape[1], False if field == "right" else np.nan)


def particles_of(
    posterior: bd.DispatchPosterior, documents: Sequence[bd.Document]
) -> tuple[dict[str, Particles], dict[str, list[int]]]:
    """Blends and ablations by name, and the byte from which masses move where that is not the first."""
    ours = bd.PosteriorPredictive(16).particles(posterior)
    prompts, count, components = ours.weights.shape
    vertices = np.tile(np.eye(components), (prompts, 1, 1))
    modes = (bd.BestExpert(), bd.TopK(2), bd.PosteriorMean(), bd.ThompsonSample())
    particles = {"base": Particles.single(vertices[:, -1]), OURS: ours}
    particles |= {blend.name: blend.particles(posterior) for blend in modes}
    ablated = (
        bd.PosteriorPredictive(16, switching=(0.0,)).particles(posterior),
        replace(ours, mass=ours.target),
        replace(ours, mass=np.full((prompts, count), 1 / count), target=None),
        bd.PosteriorPredictive(4).particles(posterior),
        bd.PosteriorPredictive(64).particles(posterior),
    )
    filtered_from = {FIXED: [len(document.data) for document in documents]}
    return particles | dict(zip(ABLATIONS, ablated, strict=True)), filtered_from


def judge(bundle: bd.Bundle, documents: Sequence[bd.Document], seed: int, progress: bool = False) -> Scores:
    """All blends, ablations and single experts on each document; what is costly on the first quarter of them."""
    posterior = Dispatched().posterior(bundle, [document.prompt for document in documents], seed)
    particles, filtered_from = particles_of(posterior, documents)
    corners = np.tile(np.eye(len(posterior.experts))[:, None], (len(documents), 1))
    fixed = {name: Particles.single(weights) for name, weights in zip(posterior.experts, corners, strict=True)}
    pairs = {
        f"{one} + {other}": Particles.single((fixed[one].weights + fixed[other].weights)[:, 0] / 2)
        for one, other in combinations(fixed, 2)
    }

    def scored(part: slice, chosen: dict[str, Particles]) -> dict[str, list[Score]]:
        own = {name: each.select(part) for name, each in chosen.items()}
        first = {name: places[part] for name, places in filtered_from.items()}
        return score_together(bundle.model, bundle.experts, documents[part], own, progress, filtered_from=first)

    few = max(2, -(-len(documents) // 4))  # a paired comparison takes two
    found = scored(slice(few), particles | fixed | pairs)
    candidates = [*fixed, *pairs, bd.PosteriorMean().name]
    best = np.argmin([[score.nll for score in found[name]] for name in candidates], axis=0)
    found[BEST_FIXED] = [found[candidates[which]][n] for n, which in enumerate(best)]
    parts = [Scores.of_documents({name: scores for name, scores in found.items() if name not in pairs})]
    if few < len(documents):
        cheap = {name: each for name, each in (particles | fixed).items() if name not in COSTLY}
        parts.append(Scores.of_documents(scored(slice(few, None), cheap)))
    return Scores.concatenate(parts)


def kept(work: Path, bundle: bd.Bundle, name: str, documents: int, seed: int) -> Scores:
    """The scores of a set and seed under a bundle, from their file where there is one."""
    place = f"{name} {documents} {seed} {bank_of(bundle)}"
    path = work / f"{place.replace(' ', '-').replace('&', 'and')}.npz"
    if not path.exists():
        (domain,) = domains_of(name)
        found = judge(bundle, held_out_documents(domain, documents, seed), seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        np.savez_compressed(temporary, **vars(found))
        os.replace(temporary, path)
    with np.load(path, allow_pickle=False) as arrays:
        return Scores(**arrays)


def tables(found: dict[str, Scores]) -> list[Table]:
    """A table for each kind of document, one of the ablations, and what the predictive gains and loses on each set.

    Args:
        found: name of a set → its scores, all seeds together.
    """
    texts = {domain.name for domain in (*EXPERT_TEXTS, *FOREIGN_TEXTS)}
    found = {name: scores.without_answers() if name in texts else scores for name, scores in found.items()}
    kinds = {
        kind: [(domain.name, found[domain.name]) for domain in domains if domain.name in found]
        for kind, domains in KINDS.items()
    }
    kinds = {kind: parts for kind, parts in kinds.items() if parts}
    pooled = {kind: Scores.concatenate([scores for _, scores in parts]) for kind, parts in kinds.items()}
    made = [_blends(kind, scores, [name for name, _ in kinds[kind]]) for kind, scores in pooled.items()]
    rows: list[list[Cell | str]] = []
    for name in ABLATIONS:
        rows.append([_starred(name, *pooled.values()), *(_paired(scores, name, OURS) for scores in pooled.values())])
    note = f"Paired by document, with 95% intervals; above 0: the ablation is worse.{_star(pooled.values())}"
    made.append(Table(f"Ablations: NLL minus that of {OURS}", ["", *pooled], rows, note))
    return [*made, _claims(kinds)]


def _blends(kind: str, scores: Scores, sets: Sequence[str]) -> Table:
    rows: list[list[Cell | str]] = []
    for name in (*BLENDS, *ABLATIONS, BEST_FIXED):
        rows.append(
            [
                _starred(name, scores),
                f"{scores.mean(name, 'nll'):.3f}",
                "" if name == OURS else _paired(scores, name, OURS),
                f"{scores.mean(name, 'exact_match'):.3f}" if np.isfinite(scores.of(name, "exact_match")).any() else "",
                f"{scores.calibration_error(name):.3f}",
                str(scores.of(name, "rows")),
            ]
        )
    heads = ["blend", "NLL", f"minus {OURS}", "exact match", "ECE", "rows"]
    note = f"{scores.nll.shape[1]} documents of {', '.join(sets)}. Paired by document, with 95% intervals."
    return Table(f"Blends, {kind} documents", heads, rows, note + _star([scores]))


def _starred(name: str, *scores: Scores) -> str:
    """With a star where it was not scored on all documents."""
    return name if all(each.whole(name) for each in scores) else f"{name} *"


def _star(scores: Iterable[Scores]) -> str:
    whole = all(each.whole(name) for each in scores for name in COSTLY)
    return "" if whole else " *: on the first quarter of the documents of each set and seed."


def _claims(kinds: dict[str, list[tuple[str, Scores]]]) -> Table:
    rows: list[list[Cell | str]] = []
    for kind, parts in kinds.items():
        for name, scores in parts:
            rivals = [blend for blend in BLENDS if blend != OURS]
            rival = min(rivals, key=lambda blend: scores.mean(blend, "nll"))
            right = _paired(scores, OURS, name) if kind == "pure" else ""
            best, base = f"{_paired(scores, OURS, rival)} ({rival})", _paired(scores, OURS, "base")
            rows.append([name, right, best, _paired(scores, OURS, BEST_FIXED), base])
    every = [scores for parts in kinds.values() for _, scores in parts]
    heads = ["documents", "right expert", "best other blend", _starred(BEST_FIXED, *every), "base"]
    note = f"NLL, paired by document, with 95% intervals; below 0: the predictive is better.{_star(every)}"
    return Table(f"{OURS} minus …", heads, rows, note)


def _paired(scores: Scores, one: str, other: str) -> str:
    pair = np.stack([scores.of(name, "nll") for name in (one, other)])
    found = paired_comparison(*pair[:, np.isfinite(pair).all(0)])
    low, high = found.interval(0.95)
    return f"{found.difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def main(
    sets: Annotated[list[str] | None, typer.Option("--set", help="a domain or a kind of documents; all")] = None,
    documents: Annotated[int, typer.Option(min=2, help="of each set and seed")] = 128,
    first_seed: Annotated[int, typer.Option(min=0, help="of documents and draws")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="how many, from the first")] = 3,
    work: Annotated[Path | None, typer.Option(help="where scores are kept")] = None,
    quick: Annotated[bool, typer.Option(help="a smoke test: few sets, two documents, one seed")] = False,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    if quick:
        documents, seeds, sets = 2, 1, sets or list(QUICK_SETS)
    try:
        names = list(dict.fromkeys(domain.name for name in sets or KINDS for domain in domains_of(name)))
    except UnknownNameError as error:
        raise typer.BadParameter(str(error)) from None
    work, bundle = work or Path(gettempdir()) / "bayes-dispatch-blends", bd.load_bundle()
    found: dict[str, list[Scores]] = {}
    runs = [(name, seed) for name in names for seed in range(first_seed, first_seed + seeds)]
    for name, seed in tqdm(runs, disable=None):
        found.setdefault(name, []).append(kept(work, bundle, name, documents, seed))
    for table in tables({name: Scores.concatenate(parts) for name, parts in found.items()}):
        print(f"{table.to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
