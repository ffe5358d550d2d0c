"""Experts of documents for a language model, and their bundle: how the bundle ``smollm2`` that ships was made."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.app.training.build import BuildSettings, build_bundle, kept_at, known_by
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import BASE_TEXTS, Domain
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.training import ExpertSettings, train_expert
from bayes_dispatch.experts.vectors import BASE, ExpertVector
from bayes_dispatch.model.backbone import Backbone

__all__ = ["DocumentsPlan", "examples_of", "train_documents"]

BASE_DOCUMENTS = 100  # of each domain of base


@dataclass(frozen=True)
class DocumentsPlan:
    """How experts of documents are trained, and joined to a bundle.

    Attributes:
        experts: the recipe of each. build: of the bundle.
    """

    experts: ExpertSettings
    build: BuildSettings = field(default_factory=BuildSettings)

    @classmethod
    def of(cls, kind: str, model: Backbone, seed: int = 0) -> "DocumentsPlan":
        """The recipe of the bundle ``smollm2``: the upper half of a model's blocks, two thousand bytes a step."""
        sizes: dict[str, Any] = {"steps": 40, "batch_size": 4, "length": 640, "kind": kind}
        sizes["adapt_from"] = model.depth // 2
        rate = 5e-2 if kind == "svf" else 4e-3
        build = BuildSettings(seed=seed, pure_prompts=500, mixed_prompts=6000, gate_prompts=120)
        return cls(ExpertSettings(**sizes, learning_rate=rate, seed=seed), build)


def train_documents(
    model: Backbone,
    domains: Sequence[Domain],
    plan: DocumentsPlan,
    out: Path,
    base: Sequence[Domain] = BASE_TEXTS,
    progress: bool = True,
    announce: Callable[[str], object] = lambda text: None,
) -> Bundle:
    """Train an expert of each domain, fit a dispatcher and a gate for them, and save the bundle.

    Each expert, and each stage after them, is kept in ``OUT.work``: a run that was stopped goes on where it was, and
    another one to the same ``out``, of more domains, trains these alone.

    Args:
        model: the base model. domains: of different names. plan: the recipes. out: directory of the bundle.
        base: of texts that no expert should touch.
        progress: show progress bars. announce: called with a line of text as each stage begins.

    Raises:
        ConfigError: fewer than two domains, or one twice.
    """
    names = [domain.name for domain in domains]
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(f"expected at least two domains, none of them twice, got {', '.join(names)}")
    recipe = {"model": model.fingerprint(), "experts": asdict(plan.experts)}
    places = [kept_at(out, {**recipe, "texts": known_by(each)}, "experts", each.name) for each in domains]
    experts = []
    for domain, directory in zip(domains, places, strict=True):
        if not directory.exists():
            announce(f"expert {domain.name}")
            ExpertBank([_small(train_expert(model, domain, plan.experts, progress))]).save(directory)
        experts.append(ExpertBank.load(directory)[domain.name])
    bank, examples = ExpertBank(experts), examples_of(domains, plan.build, base)
    return build_bundle(model, bank, examples, settings=plan.build, out=out, progress=progress, announce=announce)


def examples_of(
    domains: Sequence[Domain], build: BuildSettings, base: Sequence[Domain] = BASE_TEXTS
) -> dict[str, Domain | list[str]]:
    """What ``train_documents`` gives to ``build_bundle``."""
    rng, length = np.random.default_rng([build.seed, 4]), build.prompt_lengths[1]
    texts = [domain.document(rng, 0, length, "train").text for domain in base for _ in range(BASE_DOCUMENTS)]
    examples: dict[str, Domain | list[str]] = {domain.name: domain for domain in domains}
    return examples | ({BASE: texts} if texts else {})


def _small(expert: ExpertVector | LoraExpert) -> ExpertVector | LoraExpert:
    """Scales in half precision, whose steps near 1 are of .001, far below what training changes."""
    if isinstance(expert, LoraExpert):
        return expert
    scales = {matrix: z.to(torch.float16) for matrix, z in expert.scales.items()}
    return ExpertVector(expert.name, scales, expert.base, expert.metadata)
