"""Every way to decide a blend, on the same documents: ours, Transformer²'s three, classifiers, and given weights.

    python benchmarks/strategies.py            # twenty minutes on one core
    python benchmarks/strategies.py --quick    # a smoke test; the numbers mean nothing

All are blended by the mean of their posterior, and those with a posterior by its filtered predictive too. Few-shot
methods have no pairs but the prompt itself: its bytes are the answer. The classification expert is trained here.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.paired import paired_comparison
from bayes_dispatch.checks.reliability import expected_calibration_error
from bayes_dispatch.experts.domains import BASE_TEXTS, EXPERT_DOMAINS, FOREIGN_TEXTS, Domain
from bayes_dispatch.experts.objectives import Likelihood
from bayes_dispatch.experts.training import ExpertSettings, train_expert
from bayes_dispatch.inference.few_shot.categories import CategoryDomain
from bayes_dispatch.inference.few_shot.methods import CrossEntropy, ImportanceSampling
from bayes_dispatch.inference.few_shot.program import FewShotMethod
from bayes_dispatch.inference.few_shot.strategies import AskedExpert, AskedModel, ByPrompt, Classified, FewShot, Given
from bayes_dispatch.inference.scoring.compare import score_together
from bayes_dispatch.inference.scoring.evaluation import MIXED_SETS, held_out_documents
from bayes_dispatch.inference.two_pass.blends import Blend
from bayes_dispatch.inference.two_pass.system import Dispatched, Strategy
from dispatching.classifiers import FITS, fit_classifier
from dispatching.data import Sizes, shipped

__all__ = ["FULL", "QUICK", "Budget", "main"]

CALLED = {"base": "other"}
OURS = "dispatcher"


@dataclass(frozen=True)
class Budget:
    """How much is judged and trained."""

    documents: int
    sizes: Sizes
    category: ExpertSettings
    cross_entropy: CrossEntropy
    sampling: ImportanceSampling


FULL = Budget(
    32,
    Sizes(),
    ExpertSettings(steps=200, batch_size=16, objective=Likelihood(question_weight=0.0)),
    CrossEntropy(32, 6, 6),
    ImportanceSampling(128, 64),
)
QUICK = Budget(
    2,
    Sizes(pure=15, mixed=30, judged=5, mixtures=30),
    ExpertSettings(steps=2, batch_size=2, objective=Likelihood(question_weight=0.0)),
    CrossEntropy(4, 2, 2),
    ImportanceSampling(25, 20),
)


@dataclass(frozen=True, eq=False)
class Judged:
    """A strategy under a blend on one set of documents, an entry for each document."""

    nll: np.ndarray
    exact_match: np.ndarray
    best: np.ndarray
    seconds: float


def sets_of(budget: Budget, seed: int) -> dict[str, dict[str, list[bd.Document]]]:
    """Kind → set → held-out documents."""
    kinds: Mapping[str, Sequence[Domain]] = {
        "pure": EXPERT_DOMAINS,
        "mixed": tuple(MIXED_SETS.values()),
        "out of domain": FOREIGN_TEXTS,
    }
    return {
        kind: {domain.name: held_out_documents(domain, budget.documents, seed) for domain in domains}
        for kind, domains in kinds.items()
    }


def strategies_of(bundle: bd.Bundle, budget: Budget, seed: int, work: Path) -> list[tuple[Strategy, tuple[Blend, ...]]]:
    """All strategies that look at the prompt, each with its blends."""
    train = shipped(seed, budget.sizes, work).train
    names = {domain.name: CALLED["base"] for domain in BASE_TEXTS}
    domains = CategoryDomain((*EXPERT_DOMAINS, *BASE_TEXTS), names)
    asked = train_expert(bundle.model, domains, budget.category, progress=False)
    mean, predictive = bd.PosteriorMean(), bd.PosteriorPredictive(16)
    fitted = {name: fit_classifier(FITS[name], train, seed) for name in ("LogisticRegression", "k nearest neighbours")}
    classifiers = [
        Classified(lambda evidence, each=each, of=of: getattr(each(evidence), of), f"{name}, {told}")  # type: ignore[misc]
        for name, each in fitted.items()
        for of, told in (("best", "of one expert"), ("shares", "of shares"))
    ]
    return [
        (Dispatched(), (mean, predictive)),
        (_from_itself(budget.sampling), (mean, predictive)),
        (_from_itself(budget.cross_entropy), (mean,)),
        (AskedModel(CALLED), (mean,)),
        (AskedExpert(asked, CALLED), (mean,)),
        *((classifier, (mean,)) for classifier in classifiers),
    ]


def _from_itself(method: FewShotMethod) -> ByPrompt:
    """Few-shot weights whose only answer is the prompt."""
    return ByPrompt(lambda prompt: FewShot([("", prompt)], method), f"few-shot, {method.name}")


def given_weights(name: str, components: Sequence[str]) -> list[Strategy]:
    """The oracle for a set of documents, uniform weights, and base."""
    parts = name.split(" & ") if " & " in name else [name if name in components else "base"]
    truth = np.array([(component in parts) / len(parts) for component in components])
    uniform = np.full(len(components), 1 / len(components))
    base = np.eye(len(components))[-1]
    return [Given(truth, "oracle"), Given(uniform, "uniform"), Given(base, "base")]


def judge(
    bundle: bd.Bundle, strategy: Strategy, blends: Sequence[Blend], documents: list[bd.Document], seed: int
) -> dict[str, Judged]:
    """Scores under each blend of one posterior."""
    start = time.process_time()
    posterior = strategy.posterior(bundle, [document.prompt for document in documents], seed)
    seconds = (time.process_time() - start) / len(documents)
    found = {}
    particles = {blend.name: blend.particles(posterior) for blend in blends}
    for blend, scores in zip(
        blends, score_together(bundle.model, bundle.experts, documents, particles).values(), strict=True
    ):
        label = strategy.name if blend is blends[0] else f"{strategy.name}, filtered predictive"
        found[label] = Judged(
            np.array([score.nll for score in scores]),
            np.array([score.exact_match for score in scores]),
            posterior.probability_best,
            seconds,
        )
    return found


def main(
    quick: Annotated[bool, typer.Option(help="a smoke test")] = False,
    seed: Annotated[int, typer.Option(help="of documents and draws")] = 0,
    work: Annotated[Path | None, typer.Option(help="where evidence is kept")] = None,
) -> None:
    """Print Markdown tables."""
    torch.set_num_threads(1)
    budget, bundle = QUICK if quick else FULL, bd.load_bundle()
    strategies = strategies_of(bundle, budget, seed, work or Path(gettempdir()) / "bayes-dispatch-evidence")
    components = bundle.experts.components
    tables: dict[str, dict[str, list[tuple[str, Judged]]]] = {}
    for kind, sets in sets_of(budget, seed).items():
        for name, documents in tqdm(sets.items(), kind, disable=None):
            given = [(strategy, (bd.PosteriorMean(),)) for strategy in given_weights(name, components)]
            for strategy, blends in [*strategies, *given]:
                for label, judged in judge(bundle, strategy, blends, documents, seed).items():
                    tables.setdefault(kind, {}).setdefault(label, []).append((name, judged))
        print(f"{_table(kind, tables[kind], components).to_markdown()}\n", flush=True)


def _table(kind: str, found: Mapping[str, list[tuple[str, Judged]]], components: Sequence[str]) -> Table:
    rows = []
    ours = np.concatenate([judged.nll for _, judged in found[OURS]])
    for label, parts in found.items():
        nll = np.concatenate([judged.nll for _, judged in parts])
        exact = np.concatenate([judged.exact_match for _, judged in parts])
        pair = paired_comparison(nll, ours)
        error = "–"
        if kind == "pure":
            best = np.concatenate([judged.best for _, judged in parts])
            labels = np.repeat([components.index(name) for name, _ in parts], len(parts[0][1].nll))
            error = f"{expected_calibration_error(best, labels):.3f}"
        difference = "" if label == OURS else f"{pair.difference:+.3f} ± {pair.standard_error:.3f}"
        seconds = f"{1e3 * np.mean([judged.seconds for _, judged in parts]):.0f}"
        rows.append([label, f"{nll.mean():.3f}", difference, f"{exact.mean():.3f}", error, seconds])
    heads = ["strategy", "NLL", "minus the dispatcher's", "exact match", "ECE", "ms a prompt"]
    return Table(f"Strategies, {kind} documents", heads, rows, f"{len(ours)} documents; ± standard error, paired.")


if __name__ == "__main__":
    typer.run(main)
