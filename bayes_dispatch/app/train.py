"""Training of a whole bundle: base model, experts, dispatcher, gate, evaluation.

Each stage leaves its result in a work directory and is skipped where that is there already, so a run that was stopped
goes on where it was. Every stage is a function of the plan and its seed; experts also carry the date of their training.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bayes_dispatch.app.bundle import Bundle, load_bundle
from bayes_dispatch.arguments import set_whole
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.dispatcher.guide.guides import GuideSettings
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import BASE_TEXTS, EXPERT_DOMAINS, FOREIGN_TEXTS
from bayes_dispatch.experts.domains.base import BaseCorpus
from bayes_dispatch.experts.training import ExpertSettings, train_expert
from bayes_dispatch.inference.scoring.evaluation import (
    MIXED_SETS,
    SWITCHING_SETS,
    dispatch_report,
    expert_report,
    mixed_report,
    pure_report,
)
from bayes_dispatch.inference.scoring.evidence_sets import (
    KnownEvidence,
    base_evidence,
    foreign_evidence,
    gate_evidence,
    mixed_evidence,
    pure_evidence,
)
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.pretraining.run import PretrainingSettings, pretrain
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.storage import read_json, write_json

__all__ = ["PLANS", "TrainingPlan", "train_bundle"]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything that decides the result of a training run.

    Attributes:
        seed: of everything random.
        backbone: the model. pretraining, experts: recipes. svi, guide: settings of the dispatcher's fit.
        pure_prompts: labelled prompts per domain for the dispatcher. mixed_prompts: prompts of known mixture for it.
        gate_pure_prompts: held-out prompts per domain that calibrate the gate. gate_mixed_prompts: of several domains.
        prompt_lengths, gate_lengths: shortest and longest of the dispatcher's and of the gate's, in bytes.
        judged_prompts: held-out prompts per domain and length that judge it. judged_mixtures: of known mixture.
        judged_documents: documents per set that judge experts and blends.
    """

    seed: int = 0
    backbone: MambaFormerConfig = field(default_factory=MambaFormerConfig)
    pretraining: PretrainingSettings
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    svi: SVISettings = field(default_factory=SVISettings)
    guide: GuideSettings = field(default_factory=GuideSettings)
    pure_prompts: int = 150
    mixed_prompts: int = 500
    gate_pure_prompts: int = 120
    gate_mixed_prompts: int = 3200
    gate_lengths: tuple[int, int] = (16, 1024)
    prompt_lengths: tuple[int, int] = (16, 256)
    judged_prompts: int = 100
    judged_mixtures: int = 2000
    judged_documents: int = 64

    def __post_init__(self) -> None:
        set_whole(self, pure_prompts=1, mixed_prompts=1, judged_prompts=1, judged_mixtures=1, judged_documents=1)
        set_whole(self, gate_pure_prompts=1, gate_mixed_prompts=1)

    def with_seed(self, seed: int) -> "TrainingPlan":
        """The same plan under another seed."""
        pretraining, experts = replace(self.pretraining, seed=seed), replace(self.experts, seed=seed)
        return replace(self, seed=seed, pretraining=pretraining, experts=experts)


# The view "surprise" was tried: squared error on held-out mixtures .078 with it and .067 without.
PROGRAM = Admixture(views={"hidden": "vectors", "counts": "counts"})

PLANS = {
    "full": TrainingPlan(
        pretraining=PretrainingSettings(steps=1900),
        guide=GuideSettings(hidden=192, simulations=100_000, steps=10_000),
    ),
    "smoke": TrainingPlan(
        backbone=MambaFormerConfig.tiny(),
        pretraining=PretrainingSettings(steps=20, batch_size=4, length=64, checkpoint_every=10),
        experts=ExpertSettings(steps=5, batch_size=2, length=64),
        svi=SVISettings(steps=30),
        guide=GuideSettings(simulations=512, steps=50),
        pure_prompts=12,
        mixed_prompts=40,
        gate_pure_prompts=20,
        gate_mixed_prompts=160,
        gate_lengths=(16, 48),
        prompt_lengths=(16, 48),
        judged_prompts=4,
        judged_mixtures=40,
        judged_documents=4,
    ),
}


def train_bundle(
    plan: TrainingPlan,
    out: Path,
    work: Path | None = None,
    processes: int = 2,
    progress: bool = True,
    announce: Callable[[str], object] = lambda text: None,
) -> Bundle:
    """Train, evaluate and save a bundle.

    Args:
        plan: what to train. out: directory of the bundle.
        work: directory of the stages' results, ``out`` with ``.work`` added by default; safe to delete afterwards.
        processes: processes that work at once; the result does not depend on it, but for rounding in pre-training.
        progress: show progress bars. announce: called with a line of text as each stage begins.

    Raises:
        ConfigError: the work directory holds stages of another plan.
        BundleError: a stage's result is damaged.
    """
    work = out.with_name(out.name + ".work") if work is None else work
    _claim(work, plan)
    announce("base model")
    model = _base_model(plan, work, processes, progress)
    announce("experts")
    experts = _experts(plan, model, work, processes, progress)
    announce("dispatcher")
    train = _dispatcher_evidence(plan, model, experts.adapt_from, progress)
    dispatcher = _fitted_dispatcher(plan, experts, train, work, progress)
    announce("gate")
    gate = _calibrated_gate(plan, model, experts.adapt_from, dispatcher, work, progress)
    unjudged = Bundle(model, experts, dispatcher, gate=gate)
    unjudged.save(work / "unjudged")
    announce("evaluation")
    report = _evaluate(plan, unjudged, train, work, processes, progress)
    bundle = Bundle(model, experts, dispatcher, report, gate=gate)
    bundle.save(out)
    return bundle


def _claim(work: Path, plan: TrainingPlan) -> None:
    wanted = json.loads(json.dumps(asdict(plan)))
    if (work / "plan.json").exists():
        if read_json(work / "plan.json") != wanted:
            raise ConfigError(f"expected stages of this plan in {work}, got those of another: use a new directory")
    else:
        write_json(work / "plan.json", wanted)


def _base_model(plan: TrainingPlan, work: Path, processes: int, progress: bool) -> MambaFormerForCausalLM:
    directory = work / "base"
    if not directory.exists():
        config = LanguageModelConfig(backbone=plan.backbone, vocab_size=ByteTokenizer.vocab_size)
        pretrain(config, BaseCorpus(), plan.pretraining, work / "pretraining", processes, progress).save_pretrained(
            directory
        )
    return MambaFormerForCausalLM.from_pretrained(directory)


def _experts(
    plan: TrainingPlan, model: MambaFormerForCausalLM, work: Path, processes: int, progress: bool
) -> ExpertBank:
    missing = [
        (work / "base", index, plan.experts, work / "experts" / domain.name)
        for index, domain in enumerate(EXPERT_DOMAINS)
        if not (work / "experts" / domain.name).exists()
    ]
    _in_processes(_train_one_expert, missing, processes, "experts", progress)
    bank = ExpertBank([ExpertBank.load(work / "experts" / domain.name)[domain.name] for domain in EXPERT_DOMAINS])
    bank.check_base(model)
    return bank


def _train_one_expert(base: Path, index: int, settings: ExpertSettings, out: Path) -> None:
    model = MambaFormerForCausalLM.from_pretrained(base)
    ExpertBank([train_expert(model, EXPERT_DOMAINS[index], settings, progress=False)]).save(out)


def _dispatcher_evidence(
    plan: TrainingPlan, model: MambaFormerForCausalLM, block: int, progress: bool
) -> KnownEvidence:
    lengths, seed = plan.prompt_lengths, plan.seed
    return KnownEvidence.concatenate(
        [
            pure_evidence(model, EXPERT_DOMAINS, plan.pure_prompts, lengths, "train", seed, progress, block),
            mixed_evidence(model, EXPERT_DOMAINS, plan.mixed_prompts, lengths, "train", seed, progress, block),
            base_evidence(model, BASE_TEXTS, len(EXPERT_DOMAINS), plan.pure_prompts, lengths, "train", seed, block),
        ]
    )


def _fitted_dispatcher(
    plan: TrainingPlan, experts: ExpertBank, train: KnownEvidence, work: Path, progress: bool
) -> Dispatcher:
    directory = work / "dispatcher"
    if not directory.exists():
        dispatcher = Dispatcher(experts.names, plan.seed, svi=plan.svi, guide=plan.guide, program=PROGRAM)
        dispatcher.fit(train.evidence, train.labels, train.mixtures, progress=progress).save(directory)
    return Dispatcher.load(directory)


def _calibrated_gate(
    plan: TrainingPlan, model: MambaFormerForCausalLM, block: int, dispatcher: Dispatcher, work: Path, progress: bool
) -> Gate:
    directory, seed = work / "gate", plan.seed + 2  # the judged prompts are those of seed + 1
    if not directory.exists():
        counts = plan.gate_pure_prompts, plan.gate_mixed_prompts
        evidence, groups = gate_evidence(model, EXPERT_DOMAINS, *counts, plan.gate_lengths, seed, progress, block)
        Gate.calibrate(dispatcher, evidence, groups, seed=seed).save(directory)
    return Gate.load(directory)


def _evaluate(
    plan: TrainingPlan, bundle: Bundle, train: KnownEvidence, work: Path, processes: int, progress: bool
) -> dict[str, Any]:
    jobs = [(work / "unjudged", "pure", domain.name, plan, work / "judged") for domain in EXPERT_DOMAINS]
    jobs += [(work / "unjudged", "experts", domain.name, plan, work / "judged") for domain in EXPERT_DOMAINS]
    jobs += [(work / "unjudged", "mixed", name, plan, work / "judged") for name in MIXED_SETS]
    jobs += [(work / "unjudged", "switching", name, plan, work / "judged") for name in SWITCHING_SETS]
    missing = [job for job in jobs if not _result(job[4], job[1], job[2]).exists()]
    _in_processes(_judge, missing, processes, "evaluation", progress)
    report: dict[str, Any] = {"plan": json.loads(json.dumps(asdict(plan)))}
    for _, kind, name, _, directory in jobs:
        report.setdefault(kind, {})[name] = read_json(_result(directory, kind, name))
    model, seed, block = bundle.model, plan.seed + 1, bundle.experts.adapt_from
    judged, among = plan.judged_prompts, len(EXPERT_DOMAINS)
    pure = {
        length: pure_evidence(model, EXPERT_DOMAINS, judged, (length, length), "held_out", seed + length, block=block)
        for length in (32, 64, 128)
    }
    low, high = plan.prompt_lengths
    mixed = mixed_evidence(model, EXPERT_DOMAINS, plan.judged_mixtures, (low, high), "held_out", seed, progress, block)
    foreign = foreign_evidence(model, FOREIGN_TEXTS, among, judged, (128, 128), seed, block)
    report["dispatch"] = dispatch_report(bundle.dispatcher, train, pure, mixed, foreign, seed)
    return report


def _judge(bundle: Path, kind: str, name: str, plan: TrainingPlan, out: Path) -> None:
    system = load_bundle(bundle)
    seed, count = plan.seed + 1, plan.judged_documents
    domains = {domain.name: domain for domain in EXPERT_DOMAINS}
    if kind == "experts":
        report = expert_report(system.model, system.experts, domains[name], count, seed)
    elif kind == "pure":
        report = pure_report(system, domains[name], count, seed)
    else:
        report = mixed_report(system, (MIXED_SETS | SWITCHING_SETS)[name], count, seed)
    write_json(_result(out, kind, name), report)


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
