"""What a bundle is worth, on held-out documents: the tables that ``bayes-dispatch train`` prints and stores."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bayes_dispatch.checks.coverage import interval_coverage, simulated_coverage
from bayes_dispatch.checks.detection import ood_auroc
from bayes_dispatch.checks.paired import paired_comparison
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import CONVENTIONS, Domain, Interleaved
from bayes_dispatch.experts.domains.interleaved import Items
from bayes_dispatch.experts.vectors import BASE
from bayes_dispatch.inference.scoring.compare import compare_blends, score_together
from bayes_dispatch.inference.scoring.evidence_sets import KnownEvidence
from bayes_dispatch.inference.scoring.scores import Score
from bayes_dispatch.inference.two_pass.blends import (
    BestExpert,
    Particles,
    PosteriorMean,
    PosteriorPredictive,
    ThompsonSample,
    TopK,
)
from bayes_dispatch.inference.two_pass.system import System
from bayes_dispatch.model.backbone import Backbone

__all__ = [
    "MIXED_SETS",
    "PROMPT_BYTES",
    "SWITCHING_SETS",
    "TOTAL_BYTES",
    "dispatch_report",
    "expert_report",
    "held_out_documents",
    "interleaved",
    "mixed_report",
    "paired",
    "pure_report",
]

PROMPT_BYTES, TOTAL_BYTES = 128, 256
PREDICTIVE = PosteriorPredictive(16)
REPORTED_BLENDS = (BestExpert(), PosteriorMean(), TopK(2), ThompsonSample(), PREDICTIVE)


def interleaved(kinds: Iterable[Items], order: str, *pairs: tuple[str, str]) -> dict[str, Interleaved]:
    """Documents of two kinds each, by a name that tells both: in turn (``"alternate"``), or one, then the other."""
    joint, named = " & " if order == "alternate" else " then ", {kind.name: kind for kind in kinds}
    return {joint.join(pair): Interleaved(joint.join(pair), tuple(named[n] for n in pair), order) for pair in pairs}


MIXED_SETS = interleaved(
    CONVENTIONS, "alternate", ("no_carry", "sort"), ("reversed_add", "shift"), ("add", "reverse"), ("reverse", "sort")
)
SWITCHING_SETS = interleaved(CONVENTIONS, "switch", ("add", "reversed_add"), ("reverse", "sort"), ("sort", "no_carry"))


def held_out_documents(
    domain: Domain, count: int, seed: int, sizes: tuple[int, int] = (PROMPT_BYTES, TOTAL_BYTES)
) -> list[Document]:
    """Held-out documents; ``sizes``, here and below: bytes of a prompt, and of the whole with it."""
    rng = np.random.default_rng([seed, 3])
    return [domain.document(rng, *sizes, "held_out") for _ in range(count)]


def expert_report(
    model: Backbone,
    experts: ExpertBank,
    domain: Domain,
    count: int,
    seed: int,
    sizes: tuple[int, int] = (PROMPT_BYTES, TOTAL_BYTES),
) -> dict[str, Any]:
    """Base and every expert on one domain, with standard errors.

    NLL of the scored bytes, nats per byte and per token of the model, and exact match.
    """
    documents = held_out_documents(domain, count, seed, sizes)
    vertices = zip(experts.components, np.eye(len(experts.components)), strict=True)
    particles = {component: Particles.single(np.tile(weights, (count, 1))) for component, weights in vertices}
    return {
        component: {name: _mean([getattr(score, name) for score in scores]) for name in ("nll", "exact_match")}
        | {"nll_per_token": _mean([-score.scored.log_probability.mean() for score in scores])}
        for component, scores in score_together(model, experts, documents, particles).items()
    }


def dispatch_report(
    dispatcher: Dispatcher,
    train: KnownEvidence,
    pure: Mapping[int, KnownEvidence],
    mixed: KnownEvidence,
    foreign: KnownEvidence,
    seed: int,
) -> dict[str, Any]:
    """Accuracy beside logistic regression, coverage of the 90% intervals, and telling foreign text apart.

    Args:
        dispatcher: fitted on ``train``. train: also trains the logistic regression, on its labelled prompts.
        pure: held-out prompts of one domain by their length. mixed: held-out prompts of known mixture.
        foreign: prompts without any expert. seed: of posterior draws.
    """
    labelled = train.labels >= 0
    baseline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    baseline.fit(_features(train.evidence)[labelled], train.labels[labelled])
    accuracy = {}
    for length, known in pure.items():
        ours = dispatcher.predict_proba(known.evidence)[:, :-1].argmax(1) == known.labels
        theirs = baseline.predict(_features(known.evidence)) == known.labels
        accuracy[str(length)] = {"dispatcher": _mean(ours), "logistic_regression": _mean(theirs)}
    posterior = dispatcher.posterior(mixed.evidence, draws=400, seed=seed)
    found = interval_coverage(posterior, mixed.mixtures, 0.9)
    curve = simulated_coverage(dispatcher, mixed.mixtures, [0.9], seed=seed)
    simulated = [float(curve.values[0]), float(curve.standard_errors[0]), curve.count]
    longest = pure[max(pure)].evidence
    base_weight = [dispatcher.posterior(e, draws=64, seed=seed).mean[:, -1] for e in (longest, foreign.evidence)]
    return {
        "accuracy": accuracy,
        "coverage_90": {"found": list(found), "simulated": simulated},
        "foreign_auroc_base_weight": ood_auroc(*base_weight).value,
    }


def pure_report(
    system: System, domain: Domain, count: int, seed: int, sizes: tuple[int, int] = (PROMPT_BYTES, TOTAL_BYTES)
) -> dict[str, Any]:
    """Blends on documents of one domain, and how much NLL each loses to the right expert."""
    documents = held_out_documents(domain, count, seed, sizes)
    return _versus(compare_blends(system, documents, [domain.name, BASE, *REPORTED_BLENDS], seed).scores, domain.name)


def mixed_report(
    system: System, domain: Domain, count: int, seed: int, sizes: tuple[int, int] = (PROMPT_BYTES, TOTAL_BYTES)
) -> dict[str, Any]:
    """Blends on documents that mix or switch domains, and their paired differences to ``PREDICTIVE``."""
    documents = held_out_documents(domain, count, seed, sizes)
    return _versus(compare_blends(system, documents, [BASE, *REPORTED_BLENDS], seed).scores, PREDICTIVE.name)


def paired(scores: Sequence[Score], one: str, other: str) -> list[float]:
    """Mean and standard error over documents of the NLL under ``one`` minus that under ``other``."""
    nll = {name: np.array([score.nll for score in scores if score.blend == name]) for name in (one, other)}
    found = paired_comparison(nll[one], nll[other])
    return [found.difference, found.standard_error]


def _versus(scores: Sequence[Score], reference: str) -> dict[str, Any]:
    names = dict.fromkeys(score.blend for score in scores)
    report: dict[str, Any] = {}
    for name in names:
        own = [score for score in scores if score.blend == name]
        report[name] = {
            "nll": _mean([score.nll for score in own]),
            "exact_match": _mean([score.exact_match for score in own]),
            f"nll_minus_{reference}": paired(scores, name, reference),
        }
    report["mean_minus_best"] = paired(scores, PosteriorMean().name, BestExpert().name)
    return report


def _features(evidence: Evidence) -> np.ndarray:
    counts = evidence.views["counts"]
    return np.concatenate([evidence.views["hidden"], np.sqrt(counts / counts.sum(1, keepdims=True))], axis=1)


def _mean(values: Any) -> list[float]:
    """Mean and its standard error."""
    values = np.asarray(values, dtype=float)
    return [float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))]
