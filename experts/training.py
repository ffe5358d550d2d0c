"""Training of SVF experts: only the singular-value scales move, from z = 1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bayes_dispatch.arguments import real, set_whole
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Domain, Split
from bayes_dispatch.experts.objectives import Likelihood, Objective
from bayes_dispatch.experts.provenance import provenance
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.model.adaptation import Adaptation, block_of
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.frozen import frozen
from bayes_dispatch.model.pretraining.run import schedule

__all__ = ["EarlyStopping", "ExpertSettings", "train_expert"]


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Keep the best scales by a score on documents that are not trained on, and stop when it no longer rises.

    Attributes:
        every: steps from one check to the next; the first is before any step. patience: checks without a new best
            after which training stops. documents: in a check, the same each time.
        split: where they are from. Domains that make documents have enough in ``"train"``, drawn by a seed of their
            own, and keep the other for judging; texts of a user hold out their end for this.

    Raises:
        ConfigError: a number below 1.
    """

    every: int = 10
    patience: int = 4
    documents: int = 32
    split: Split = "train"

    def __post_init__(self) -> None:
        set_whole(self, every=1, patience=1, documents=1)


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """The recipe. Longer or faster training sharpens an expert, but then its blends with others hedge worse.

    Attributes:
        steps: optimiser steps, at most. batch_size: documents in a step. length: bytes of a document.
        learning_rate: of Adam, with a short warm-up and a cosine to 0.
        decay: L2 penalty on z − 1. seed: of the documents, and of the answers that are sampled.
        objective: what the expert is trained for. stopping: when to stop early; ``None`` for never.
        matrices: kinds of matrices that are adapted, by the end of their names, such as ``("in_proj", "qkv")``;
            ``None`` for all of the blocks. The embedding, which a tied head shares, is adapted where ``"embedding"``
            is among them; then nothing of a prompt is the same for all experts (``ExpertBank.adapt_from`` is 0).
        adapt_from: first block that is adapted.
        rank: scales of each matrix, at most, those of its largest singular values; ``None`` for all.

    Raises:
        ConfigError: a number that is not whole, or outside its bounds.
    """

    steps: int = 80
    batch_size: int = 8
    length: int = 256
    learning_rate: float = 2e-2
    decay: float = 0.0
    seed: int = 0
    objective: Objective = field(default_factory=Likelihood)
    stopping: EarlyStopping | None = None
    matrices: tuple[str, ...] | None = None
    adapt_from: int = 0
    rank: int | None = None

    def __post_init__(self) -> None:
        set_whole(self, steps=1, batch_size=1, length=1, adapt_from=0)
        if self.rank is not None:
            set_whole(self, rank=1)
        real("learning_rate", self.learning_rate, 0, above=True)
        real("decay", self.decay, 0)

    def adapted(
        self, adaptable: Mapping[str, int], on_request: Mapping[str, int] = MappingProxyType({})
    ) -> dict[str, int]:
        """The matrices that experts scale, and how many scales each has.

        Args:
            adaptable: name and rank of each that can be; the first number in a name is its block's.
            on_request: of those that are adapted only where ``matrices`` has them.

        Raises:
            ConfigError: a kind that there is none of, no matrix is left, or one on request is below ``adapt_from``.
        """
        every = {**adaptable, **on_request}
        kinds = {name.rpartition(".")[2] for name in every}
        wanted = {name.rpartition(".")[2] for name in adaptable} if self.matrices is None else set(self.matrices)
        if unknown := wanted - kinds:
            raise ConfigError(f"expected kinds of matrices among {sorted(kinds)}, got {sorted(unknown)[0]!r}")
        chosen = {
            name: rank if self.rank is None else min(rank, self.rank)
            for name, rank in every.items()
            if name.rpartition(".")[2] in wanted and block_of(name) >= self.adapt_from
        }
        for name in on_request:
            if name in wanted and name not in chosen:
                raise ConfigError(f"expected adapt_from of 0 to adapt the {name}, got {self.adapt_from}")
        if not chosen:
            raise ConfigError(f"expected a matrix from block {self.adapt_from} on to adapt, got none")
        return chosen


def train_expert(
    model: Backbone,
    domain: Domain,
    settings: ExpertSettings,
    progress: bool = True,
    matrices: Mapping[str, int] | None = None,
) -> ExpertVector:
    """An expert for the training split of ``domain``; the model's weights stay as they are.

    Its metadata tell the objective and its settings, the steps taken and, under early stopping, the best score with its
    step and the score of the base model.

    Args:
        model: the base model. domain: what documents are like. settings: the recipe. progress: show a progress bar.
        matrices: name and number of scales of each adapted matrix, such as those of a bank that the expert shall join;
            by default as the settings say.

    Raises:
        ConfigError: the objective rewards answers, and the domain has no checker; or no matrix is to be adapted.
    """
    device = model.device
    if matrices is None:
        on_request = getattr(model, "adaptable_on_request", dict)  # of our own model
        matrices = settings.adapted(model.adaptable(), on_request())
    scales = {name: torch.ones(rank, device=device, requires_grad=True) for name, rank in matrices.items()}
    optimizer = torch.optim.Adam(scales.values(), lr=settings.learning_rate)
    kept = _Best(model, domain, settings)
    with frozen(getattr(model, "model", model)):
        steps = 0
        for step in tqdm(range(settings.steps), f"expert {domain.name}", disable=None if progress else True):
            if kept.is_over(step, scales):
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(step, settings.steps, warmup=10, flat=0.1)
            documents = _documents(domain, settings, "train", settings.batch_size, [settings.seed, step])
            seed = _seed(settings, step, 2)
            loss = settings.objective.judge(model, Adaptation(scales), domain, documents, seed).loss
            if settings.decay:
                loss = loss + settings.decay * sum((z - 1).square().sum() for z in scales.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps = step + 1
        kept.finish(steps, scales)
    return ExpertVector(
        name=domain.name,
        scales={name: z.detach() for name, z in kept.scales.items()},
        base=model.fingerprint(),
        metadata={
            "domain": domain.name,
            **provenance(),
            "steps": str(steps),
            "objective": type(settings.objective).__name__.lower(),
            **{name: str(value) for name, value in vars(settings.objective).items()},
            **kept.metadata(),
        },
    )


class _Best:
    """The scales to return: the last ones, or under early stopping those of the best score so far."""

    def __init__(self, model: Backbone, domain: Domain, settings: ExpertSettings) -> None:
        self._model, self._domain, self._settings = model, domain, settings
        self._stopping = settings.stopping
        self._scores: dict[int, float] = {}
        self.scales: Mapping[str, Tensor] = {}

    def is_over(self, step: int, scales: Mapping[str, Tensor]) -> bool:
        """Check the scales where a check is due; whether the score has not risen for too long."""
        if self._stopping is None or step % self._stopping.every:
            return False
        self._check(step, scales)
        return list(self._scores).index(self._best) + self._stopping.patience < len(self._scores)

    def finish(self, step: int, scales: Mapping[str, Tensor]) -> None:
        """Count the last scales, too."""
        if self._stopping is None:
            self.scales = scales
        elif step not in self._scores:
            self._check(step, scales)

    def metadata(self) -> dict[str, str]:
        """The best score, its step, and the score before the first step."""
        if self._stopping is None:
            return {}
        best = self._best
        scores = {"validation": self._scores[best], "base_validation": self._scores[0]}
        return {"best_step": str(best), **{name: f"{score:.6g}" for name, score in scores.items()}}

    @property
    def _best(self) -> int:
        return max(self._scores, key=lambda step: self._scores[step])

    @torch.no_grad()
    def _check(self, step: int, scales: Mapping[str, Tensor]) -> None:
        assert self._stopping is not None
        settings, stopping = self._settings, self._stopping
        documents = _documents(self._domain, settings, stopping.split, stopping.documents, [settings.seed, 0], [1])
        fixed = {name: z.detach().clone() for name, z in scales.items()}
        seed = _seed(settings, 0, 3)
        score = settings.objective.judge(self._model, Adaptation(fixed), self._domain, documents, seed).score
        self._scores[step] = score
        if self._best == step:
            self.scales = fixed


def _documents(
    domain: Domain,
    settings: ExpertSettings,
    split: Split,
    count: int,
    before: Sequence[int],
    after: Sequence[int] = (),
) -> list[Document]:
    """Documents, each of a seed with its row between others; trailing zeros of a seed do not count."""
    generators = [np.random.default_rng([*before, row, *after]) for row in range(count)]
    return [domain.document(rng, 0, settings.length, split).cut(settings.length) for rng in generators]


def _seed(settings: ExpertSettings, step: int, purpose: int) -> int:
    """A seed for the answers of a step, unlike those of any documents."""
    return int(np.random.SeedSequence([settings.seed, step, 0, purpose]).generate_state(1, np.uint64)[0])
