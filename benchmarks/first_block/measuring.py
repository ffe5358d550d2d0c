"""Experts, a dispatcher and what both are worth, for one first adapted block and one seed; all is kept."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import bayes_dispatch as bd
from bayes_dispatch.app.bundle import SHIPPED
from bayes_dispatch.app.training.plans import PLANS, TrainingPlan
from bayes_dispatch.experts.domains import EXPERT_DOMAINS, Domain
from bayes_dispatch.experts.training import train_expert
from bayes_dispatch.experts.vectors import BASE
from bayes_dispatch.inference.scoring.compare import compare_blends, score_together
from bayes_dispatch.inference.scoring.evaluation import held_out_documents
from bayes_dispatch.inference.scoring.held_out import KINDS
from bayes_dispatch.inference.two_pass.blends import FixedWeights, Particles
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.storage import read_json, write_json
from dispatching.data import Problem, Sizes, shipped
from dispatching.judging import judge
from dispatching.methods import Ours

__all__ = ["BLENDED", "FULL", "JUDGED", "OWN", "QUICK", "Scores", "first_block_system", "scored", "shipped_scores"]

FULL, QUICK = PLANS["full"], PLANS["smoke"]
BLENDED = ("pure", "mixed", "foreign")
JUDGED = ("accuracy 32", "accuracy 128", "Brier, mixes", "AUROC, share")
OWN = "own expert"


@dataclass(frozen=True)
class Scores:
    """All that is measured of one first block and one seed.

    Attributes:
        nll, exact: domain → base or its own expert → a value for each held-out document: nats per scored byte, and the
            share of answers that greedy decoding gets right.
        dispatch: the scores of ``JUDGED``.
        blends: kind of documents → blend → NLL of each held-out document, dispatched from its prompt.
    """

    nll: Mapping[str, Mapping[str, list[float]]]
    exact: Mapping[str, Mapping[str, list[float]]]
    dispatch: Mapping[str, float]
    blends: Mapping[str, Mapping[str, list[float]]]


def scored(work: Path, plan: TrainingPlan, block: int) -> Scores:
    """The scores of a first block and the plan's seed, from their file where there is one."""
    file = _place(work, plan, block) / "scores.json"
    if not file.exists():
        bundle = first_block_system(work, plan, block)
        pairs = {domain.name: _beside_base(bundle, domain, plan) for domain in EXPERT_DOMAINS}
        nll, exact = ({name: pair[metric] for name, pair in pairs.items()} for metric in ("nll", "exact_match"))
        dispatch = _dispatch_scores(bundle.dispatcher, _problem(work, plan, block))
        write_json(file, asdict(Scores(nll, exact, dispatch, _blend_scores(bundle, plan))))
    return Scores(**read_json(file))


def shipped_scores(work: Path, plan: TrainingPlan) -> dict[str, float]:
    """The scores of ``JUDGED`` that the shipped bundle's own dispatcher has on the same prompts."""
    dispatcher = bd.Dispatcher.load(SHIPPED / "dispatcher")
    file = work / f"seed-{plan.seed}" / f"shipped-{dispatcher.fingerprint[:12]}.json"
    if not file.exists():
        write_json(file, _dispatch_scores(dispatcher, _problem(work, plan, 0)))
    found: dict[str, float] = read_json(file)
    return found


def first_block_system(work: Path, plan: TrainingPlan, block: int) -> bd.Bundle:
    """The shipped base model, with experts that adapt it from a block on and a dispatcher that reads what is below.

    What is not kept under ``work`` yet is trained.
    """
    place, model = _place(work, plan, block), MambaFormerForCausalLM.from_pretrained(SHIPPED / "model")
    experts = []
    for domain in EXPERT_DOMAINS:
        kept = place / "experts" / domain.name
        if not kept.exists():
            expert = train_expert(model, domain, replace(plan.experts, adapt_from=block), progress=False)
            bd.ExpertBank([expert]).save(kept)
        experts.append(bd.ExpertBank.load(kept)[domain.name])
    bank, fitted = bd.ExpertBank(experts), place / "dispatcher"
    if not fitted.exists():
        problem = _problem(work, plan, block)
        dispatcher = bd.Dispatcher(bank.names, plan.seed, svi=plan.svi, program=problem.program)
        dispatcher.fit(problem.train.evidence, problem.train.labels, problem.train.mixtures).save(fitted)
    return bd.Bundle(model, bank, bd.Dispatcher.load(fitted))


def _place(work: Path, plan: TrainingPlan, block: int) -> Path:
    return work / f"seed-{plan.seed}" / f"block-{block}"


def _problem(work: Path, plan: TrainingPlan, block: int) -> Problem:
    sizes = Sizes(plan.pure_prompts, plan.mixed_prompts, plan.judged_prompts, plan.judged_mixtures)
    return shipped(plan.seed, sizes, work / "evidence", block)


def _beside_base(bundle: bd.Bundle, domain: Domain, plan: TrainingPlan) -> dict[str, dict[str, list[float]]]:
    """Metric → base or own expert → a value for each document of the domain."""
    documents = held_out_documents(domain, plan.judged_documents, plan.seed + 1)
    bank = bd.ExpertBank([bundle.experts[domain.name]])
    one = np.ones((len(documents), 1))
    particles = {
        name: Particles(np.tile(weights, (len(documents), 1, 1)), one)
        for name, weights in zip((OWN, BASE), np.eye(2), strict=True)
    }
    found = score_together(bundle.model, bank, documents, particles)
    return {
        metric: {name: [getattr(score, metric) for score in found[name]] for name in (BASE, OWN)}
        for metric in ("nll", "exact_match")
    }


def _dispatch_scores(dispatcher: bd.Dispatcher, problem: Problem) -> dict[str, float]:
    found = judge(Ours(dispatcher), problem).scores
    return {name: found[name] for name in JUDGED}


def _blend_scores(bundle: bd.Bundle, plan: TrainingPlan) -> dict[str, dict[str, list[float]]]:
    """Twice as many documents of each kind as judge an expert, in equal parts of the kind's domains."""
    base = FixedWeights.vertex(bundle.experts.components, BASE)
    blends = (base, bd.PosteriorMean(), bd.PosteriorPredictive(16))
    scores = {}
    for kind in BLENDED:
        count = 2 * plan.judged_documents // len(KINDS[kind])
        documents = [each for domain in KINDS[kind] for each in held_out_documents(domain, count, plan.seed + 1)]
        found = compare_blends(bundle, documents, blends, plan.seed)
        scores[kind] = {name: found.values(name, "nll").tolist() for name in found.blends}
    return scores
