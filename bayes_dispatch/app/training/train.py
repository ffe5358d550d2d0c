"""Training of a whole bundle: base model, experts, dispatcher, gate, evaluation.

Each stage leaves its result in a work directory and is skipped where that is there already, so a run that was stopped
goes on where it was. Every stage is a function of the plan and its seed; experts also carry the date of their training.
A plan names its curriculum: what domains there are.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bayes_dispatch.app.bundle import Bundle, load_bundle
from bayes_dispatch.app.held_out import settled
from bayes_dispatch.app.training.build import fitted_dispatcher, known_by, our_version
from bayes_dispatch.app.training.curriculum import CURRICULA, Curriculum
from bayes_dispatch.app.training.plans import TrainingPlan
from bayes_dispatch.arguments import shown
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import Domain
from bayes_dispatch.experts.training import ExpertSettings, train_expert
from bayes_dispatch.inference.scoring.evaluation import (
    dispatch_report,
    expert_report,
    mixed_report,
    pure_report,
)
from bayes_dispatch.inference.scoring.evidence_sets import (
    KnownEvidence,
    base_evidence,
    calibration_evidence,
    foreign_evidence,
    mixed_evidence,
    pure_evidence,
)
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.pretraining.recipe import ComputeSettings
from bayes_dispatch.model.pretraining.run import pretrain
from bayes_dispatch.model.subwords import SubwordTokenizer
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.storage import check_unused, digest, read_bytes, read_json, work_beside, write_json, write_output

__all__ = ["train_bundle"]


def train_bundle(
    plan: TrainingPlan,
    out: Path,
    work: Path | None = None,
    processes: int = 2,
    progress: bool = True,
    packages: Path | None = None,
    announce: Callable[[str], object] = lambda text: None,
) -> Bundle:
    """Train, evaluate and save a bundle.

    Args:
        plan: what to train. out: directory of the bundle.
        work: directory of the stages' results, ``out`` with ``.work`` added by default; safe to delete afterwards.
        processes: processes that work at once; the result does not depend on it, but for rounding in pre-training.
        progress: show progress bars.
        packages: where pip has put the packages that a curriculum reads; Python's own path by default.
        announce: called with a line of text as each stage begins.

    Raises:
        ConfigError: the work directory holds stages of another plan, of other texts or of another version, or a package
            is missing.
        BundleError: a stage's result is damaged, or the work directory holds something else.
    """
    work = work_beside(out) if work is None else work
    curriculum = CURRICULA[plan.curriculum](packages)
    texts = {domain.name: known_by(domain) for domain in (*curriculum.experts, *curriculum.base)}
    _claim(work / "plan.json", {"version": our_version(), **asdict(plan), "texts": digest(texts)})
    announce("base model")
    model = _base_model(plan, curriculum, work, processes, progress)
    announce("experts")
    experts = _experts(plan, curriculum.experts, model, work, processes, progress)
    announce("dispatcher")
    cut = model.cut(experts.adapts)
    train = _dispatcher_evidence(plan, curriculum, model, cut, progress)
    dispatcher = _fitted_dispatcher(plan, experts, train, work, progress)
    announce("calibration")
    dispatcher, gate = _calibrated(plan, curriculum.experts, model, cut, dispatcher, work, progress)
    unjudged = Bundle(model, experts, dispatcher, gate=gate)
    unjudged.save(work / "unjudged")
    announce("evaluation")
    report = _evaluate(plan, curriculum, unjudged, train, work, processes, progress)
    bundle = Bundle(model, experts, dispatcher, report, gate=gate)
    bundle.save(out)
    return bundle


def _claim(file: Path, made_of: dict[str, Any]) -> None:
    """Write down what a directory's stages are made of, or find there that it is the same.

    Raises:
        ConfigError: it is not. BundleError: the directory holds something else.
    """
    made_of = json.loads(json.dumps(made_of))
    if not file.exists():
        check_unused(file.parent)
        write_json(file, made_of)
    elif (found := read_json(file)) != made_of:
        other = next((name for name, value in made_of.items() if found.get(name) != value), "plan")
        expected, got = (shown(each.get(other)) for each in (made_of, found))
        raise ConfigError(
            f"expected stages of {other} {expected} in {file.parent}, got those of {got}: delete it, or use a new one"
        )


def _base_model(
    plan: TrainingPlan, curriculum: Curriculum, work: Path, processes: int, progress: bool
) -> MambaFormerForCausalLM:
    directory, compute = work / "base", ComputeSettings(precision=plan.precision)
    if not directory.exists():
        tokenizer = None if plan.vocabulary is None else _subwords(plan, plan.vocabulary, curriculum, work)
        size = ByteTokenizer.vocab_size if plan.vocabulary is None else plan.vocabulary
        config = LanguageModelConfig(backbone=plan.backbone, vocab_size=size)
        model = pretrain(
            config, curriculum.corpus, plan.pretraining, work / "pretraining", processes, progress, compute, tokenizer
        )
        if plan.precision == "bfloat16":
            model.bfloat16().float()  # in place: all weights are rounded, and so kept in half the bytes
        model.save_pretrained(directory)
    return MambaFormerForCausalLM.from_pretrained(directory)


def _subwords(plan: TrainingPlan, vocabulary: int, curriculum: Curriculum, work: Path) -> SubwordTokenizer:
    file = work / "tokenizer.json"
    if not file.exists():
        write_output(file, curriculum.subwords(vocabulary, plan.seed).to_json())
    return SubwordTokenizer.from_json(read_bytes(file), vocabulary)


def _experts(
    plan: TrainingPlan,
    domains: Sequence[Domain],
    model: MambaFormerForCausalLM,
    work: Path,
    processes: int,
    progress: bool,
) -> ExpertBank:
    missing = [
        (work / "base", domain, plan.experts, work / "experts" / domain.name)
        for domain in domains
        if not (work / "experts" / domain.name).exists()
    ]
    _in_processes(_train_one_expert, missing, processes, "experts", progress)
    bank = ExpertBank([ExpertBank.load(work / "experts" / domain.name)[domain.name] for domain in domains])
    bank.check_base(model)
    return bank


def _train_one_expert(base: Path, domain: Domain, settings: ExpertSettings, out: Path) -> None:
    model = MambaFormerForCausalLM.from_pretrained(base)
    ExpertBank([train_expert(model, domain, settings, progress=False)]).save(out)


def _dispatcher_evidence(
    plan: TrainingPlan, curriculum: Curriculum, model: MambaFormerForCausalLM, cut: int, progress: bool
) -> KnownEvidence:
    lengths, seed, domains = plan.prompt_lengths, plan.seed, curriculum.experts
    return KnownEvidence.concatenate(
        [
            pure_evidence(model, domains, plan.pure_prompts, lengths, "train", seed, progress, cut),
            mixed_evidence(model, domains, plan.mixed_prompts, lengths, "train", seed, progress, cut),
            base_evidence(model, curriculum.base, len(domains), plan.pure_prompts, lengths, "train", seed, cut),
        ]
    )


def _fitted_dispatcher(
    plan: TrainingPlan, experts: ExpertBank, train: KnownEvidence, work: Path, progress: bool
) -> Dispatcher:
    directory = work / "dispatcher"
    if not directory.exists():
        fitted_dispatcher(experts, train, plan.svi, plan.seed, progress).save(directory)
    return Dispatcher.load(directory)


def _calibrated(
    plan: TrainingPlan,
    domains: Sequence[Domain],
    model: MambaFormerForCausalLM,
    cut: int,
    dispatcher: Dispatcher,
    work: Path,
    progress: bool,
) -> tuple[Dispatcher, Gate]:
    directory, seed = work / "gate", plan.seed + 2  # the judged prompts are those of seed + 1
    if not directory.exists():
        counts = plan.gate_pure_prompts, plan.gate_mixed_prompts
        known = calibration_evidence(model, domains, *counts, plan.gate_lengths, seed, progress, cut)
        dispatcher, gate = settled(dispatcher, known, seed)
        dispatcher.save(work / "dispatcher")
        gate.save(directory)
    return dispatcher, Gate.load(directory)


def _evaluate(
    plan: TrainingPlan,
    curriculum: Curriculum,
    bundle: Bundle,
    train: KnownEvidence,
    work: Path,
    processes: int,
    progress: bool,
) -> dict[str, Any]:
    domains, out = curriculum.experts, work / "judged"
    kinds = {"pure": domains, "experts": domains} | {
        "mixed": tuple(curriculum.mixed.values()),
        "switching": tuple(curriculum.switching.values()),
    }
    jobs = [(work / "unjudged", kind, domain, plan, out) for kind, of in kinds.items() for domain in of]
    missing = [job for job in jobs if not _result(out, job[1], job[2].name).exists()]
    _in_processes(_judge, missing, processes, "evaluation", progress)
    report: dict[str, Any] = {"plan": json.loads(json.dumps(asdict(plan)))}
    for kind, of in kinds.items():
        report[kind] = {domain.name: read_json(_result(out, kind, domain.name)) for domain in of}
    model, seed, cut = bundle.model, plan.seed + 1, bundle.cut
    judged, longest = plan.judged_prompts, max(plan.judged_lengths)
    pure = {
        length: pure_evidence(model, domains, judged, (length, length), "held_out", seed + length, cut=cut)
        for length in plan.judged_lengths
    }
    low, high = plan.prompt_lengths
    mixed = mixed_evidence(model, domains, plan.judged_mixtures, (low, high), "held_out", seed, progress, cut)
    foreign = foreign_evidence(model, curriculum.foreign, len(domains), judged, (longest, longest), seed, cut)
    report["dispatch"] = dispatch_report(bundle.dispatcher, train, pure, mixed, foreign, seed)
    return report


def _judge(bundle: Path, kind: str, domain: Domain, plan: TrainingPlan, out: Path) -> None:
    system = load_bundle(bundle)
    seed, count, sizes = plan.seed + 1, plan.judged_documents, plan.document_bytes
    if kind == "experts":
        report = expert_report(system.model, system.experts, domain, count, seed, sizes)
    else:
        report = (pure_report if kind == "pure" else mixed_report)(system, domain, count, seed, sizes)
    write_json(_result(out, kind, domain.name), report)


def _result(directory: Path, kind: str, name: str) -> Path:
    return directory / f"{kind}-{name.replace(' ', '_')}.json"


def _in_processes(
    work: Callable[..., None], jobs: Sequence[tuple[Any, ...]], processes: int, title: str, progress: bool
) -> None:
    """Do independent jobs, each in one thread of a process of its own; each leaves its result on disk."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures: Iterable[Any] = as_completed([pool.submit(work, *job) for job in jobs])
        try:
            for future in tqdm(futures, title, total=len(jobs), disable=None if progress else True):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else an error, or Ctrl-C, would wait for all jobs that are queued
            raise
