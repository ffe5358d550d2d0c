"""Training of experts: only singular-value scales move, from z = 1, or the factors of low-rank updates, from no update.

LoRA factors begin as PEFT's do: ``down`` Kaiming-uniform, ``up`` zero.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayes_dispatch.arguments import real, set_whole, shown
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Domain, Split
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.objectives import Likelihood, Objective, Reinforce
from bayes_dispatch.experts.provenance import provenance
from bayes_dispatch.experts.vectors import ExpertVector, check_expert_name
from bayes_dispatch.model.adaptation import Adaptation, Delta, block_of
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.frozen import frozen
from bayes_dispatch.model.pretraining.run import schedule

__all__ = ["EarlyStopping", "ExpertSettings", "Kind", "train_expert"]

Kind = Literal["svf", "lora"]
Trained = Mapping[str, tuple[Tensor, ...]]  # by matrix: z (r,) alone, or down (r, in) and up (out, r)


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Keep the best numbers by a score on documents that are not trained on, and stop when it no longer rises.

    Attributes:
        every: steps from one check to the next; the first is before any step. patience: checks without a new best
            after which training stops. documents: in a check, the same each time.
        split: where they are from. Domains that make documents have enough in ``"train"``, drawn by a seed of their
            own, and keep the other for judging; texts of a user hold out their end for this.

    Raises:
        ConfigError: a number below 1, or no such split.
    """

    every: int = 10
    patience: int = 4
    documents: int = 32
    split: Split = "train"

    def __post_init__(self) -> None:
        set_whole(self, every=1, patience=1, documents=1)
        if self.split not in get_args(Split):
            raise ConfigError(f"expected a split of {' or '.join(get_args(Split))}, got {shown(self.split)}")


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """The recipe. Longer or faster training sharpens an expert, but then its blends with others hedge worse.

    Attributes:
        steps: optimiser steps, at most. batch_size: documents in a step.
        length: bytes of a document, of which no more are read than the model can.
        learning_rate: of Adam, with a short warm-up and a cosine to 0; ``None`` for 2e-2 of scales, 1e-3 of factors.
        decay: L2 penalty on z − 1, or on a low-rank update. seed: of the documents, of the answers that are sampled,
            and of the factors at first.
        objective: what the expert is trained for. stopping: when to stop early; ``None`` for never.
        matrices: kinds of matrices that are adapted, by the end of their names, such as ``("in_proj", "qkv")``;
            ``None`` for all of the blocks. What is outside the blocks, such as the embedding, which a tied head
            shares, is adapted where it is among them; then nothing of a prompt is the same for all experts
            (``ExpertBank.adapt_from`` is 0).
        adapt_from: first block that is adapted.
        kind: ``"svf"`` for singular-value scales, ``"lora"`` for low-rank updates.
        rank: scales of each matrix, at most, those of its largest singular values, ``None`` for all; or the rank of its
            update, ``None`` for 8.
        alpha: a low-rank update is ``alpha / rank · up @ down``; ``None`` for the rank.
        checkpointing: compute blocks of a transformers model again in the backward pass, which takes less memory.

    Raises:
        ConfigError: a number that is not whole, or outside its bounds; no objective or stopping; an alpha of scales, or
            checkpointing of an objective that reads answers from a state that is kept.
    """

    steps: int = 80
    batch_size: int = 8
    length: int = 256
    learning_rate: float | None = None
    decay: float = 0.0
    seed: int = 0
    objective: Objective = field(default_factory=Likelihood)
    stopping: EarlyStopping | None = None
    matrices: tuple[str, ...] | None = None
    adapt_from: int = 0
    kind: Kind = "svf"
    rank: int | None = None
    alpha: float | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        set_whole(self, steps=1, batch_size=1, length=1, adapt_from=0)
        if self.rank is not None:
            set_whole(self, rank=1)
        if self.kind not in ("svf", "lora"):
            raise ConfigError(f"expected a kind of svf or lora, got {self.kind!r}")
        if isinstance(self.objective, type) or not isinstance(self.objective, Objective):
            raise ConfigError(f"expected an objective, such as Likelihood(), got {shown(self.objective)}")
        if not isinstance(self.stopping, EarlyStopping | None):
            raise ConfigError(f"expected stopping as EarlyStopping(), or None, got {shown(self.stopping)}")
        if self.alpha is not None and self.kind == "svf":
            raise ConfigError(f"expected alpha with the kind lora alone, got {self.alpha}")
        if self.checkpointing and isinstance(self.objective, Reinforce):
            raise ConfigError("expected checkpointing with the objective likelihood alone, got reinforce")
        for name in ("learning_rate", "alpha"):
            if (value := getattr(self, name)) is not None:
                real(name, value, 0, above=True)
        real("decay", self.decay, 0)

    @property
    def most(self) -> int | None:
        """Scales or rank of each matrix, at most."""
        return 8 if self.rank is None and self.kind == "lora" else self.rank

    def adapted(
        self, adaptable: Mapping[str, int], on_request: Mapping[str, int] = MappingProxyType({})
    ) -> dict[str, int]:
        """The matrices that experts adapt, and how many scales, or which rank, each has.

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
            name: rank if self.most is None else min(rank, self.most)
            for name, rank in every.items()
            if name.rpartition(".")[2] in wanted and block_of(name) >= self.adapt_from
        }
        for name in on_request:
            if name.rpartition(".")[2] in wanted and name not in chosen:
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
) -> ExpertVector | LoraExpert:
    """An expert for the training split of ``domain``; the model's weights stay as they are.

    What is trained is kept in float32, whatever the model's dtype. Metadata tell the objective and its settings, the
    steps taken and, under early stopping, the best score with its step and the score of the base model.

    Args:
        model: the base model. domain: what documents are like. settings: the recipe. progress: show a progress bar.
        matrices: name and number of scales, or rank, of each adapted matrix, such as those of a bank that the expert
            shall join; by default as the settings say.

    Raises:
        ConfigError: the objective rewards answers, and the domain has no checker; or no matrix is to be adapted, or one
            that the model has not; or the domain's name can be no expert's, or the model takes no checkpointing. Or the
            loss is no finite number any more, and no check before it has found better numbers than the first.
    """
    check_expert_name(domain.name)
    saving = getattr(model, "checkpointing", None) if settings.checkpointing else nullcontext
    if saving is None:
        raise ConfigError(f"expected a transformers model to checkpoint, got a {type(model).__name__}")
    every = model.linears()
    if matrices is None:
        own = model.adaptable()
        on_request = {name: min(shape) for name, shape in every.items() if name not in own}
        matrices = settings.adapted(own, on_request)
    elif not matrices or (unknown := sorted(matrices.keys() - every.keys())):
        got = f"{unknown[0]}, which it has not" if matrices else "none"
        raise ConfigError(f"expected matrices of the model to adapt, got {got}")
    trained = _start(model, settings, matrices)
    numbers = [each for own in trained.values() for each in own]
    rate = settings.learning_rate or (2e-2 if settings.kind == "svf" else 1e-3)
    optimizer = torch.optim.Adam(numbers, lr=rate)
    kept = _Best(model, domain, settings)
    with frozen(getattr(model, "model", model)), saving():
        steps = 0
        for step in tqdm(range(settings.steps), f"expert {domain.name}", disable=None if progress else True):
            if kept.is_over(step, trained):
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, settings.steps, warmup=10, flat=0.1)
            documents = _documents(domain, settings, "train", settings.batch_size, [settings.seed, step])
            seed = _seed(settings, step, 2)
            loss = settings.objective.judge(model, _adaptation(model, settings, trained), domain, documents, seed).loss
            if settings.decay:
                loss = loss + settings.decay * _penalty(settings, trained)
            if not math.isfinite(value := float(loss.detach())):
                if kept.has_learnt:
                    break
                got = f"got {rate}: {value} at step {step}"
                raise ConfigError(f"expected a learning rate at which the loss is finite, {got}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps = step + 1
        kept.finish(steps, trained)
    metadata = {
        "domain": domain.name,
        **provenance(),
        "steps": str(steps),
        "objective": type(settings.objective).__name__.lower(),
        **{name: str(value) for name, value in vars(settings.objective).items()},
        **kept.metadata(),
    }
    best = {matrix: tuple(each.detach().cpu() for each in own) for matrix, own in kept.trained.items()}
    if settings.kind == "svf":
        return ExpertVector(domain.name, {matrix: z for matrix, (z,) in best.items()}, model.fingerprint(), metadata)
    factors = {matrix: (down, up * _scaling(settings, down)) for matrix, (down, up) in best.items()}
    return LoraExpert(domain.name, factors, model.fingerprint(), metadata)


def _start(model: Backbone, settings: ExpertSettings, matrices: Mapping[str, int]) -> Trained:
    """Numbers that change nothing yet."""
    if settings.kind == "svf":
        return {name: (torch.ones(rank, device=model.device, requires_grad=True),) for name, rank in matrices.items()}
    generator, shapes = torch.Generator().manual_seed(_seed(settings, 0, 4)), model.linears()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, rank in matrices.items():
        out, width = shapes[name]
        down = nn.init.kaiming_uniform_(torch.empty(rank, width), a=math.sqrt(5), generator=generator)
        up = torch.zeros(out, rank, device=model.device, requires_grad=True)
        found[name] = down.to(model.device).requires_grad_(), up
    return found


def _adaptation(model: Backbone, settings: ExpertSettings, trained: Trained) -> Adaptation:
    if settings.kind == "svf":
        return Adaptation({name: z.to(model.weights_dtype) for name, (z,) in trained.items()})
    return Adaptation(
        {},
        {
            name: Delta(up, down, up.new_full((len(down),), _scaling(settings, down)))
            for name, (down, up) in trained.items()
        },
    )


def _penalty(settings: ExpertSettings, trained: Trained) -> Tensor:
    """How far all are from the base model: the sum of (z − 1)², or of the squares of the updates."""
    if settings.kind == "svf":
        return torch.stack([(z - 1).square().sum() for (z,) in trained.values()]).sum()
    squares = [_scaling(settings, down) ** 2 * ((up.T @ up) * (down @ down.T)).sum() for down, up in trained.values()]
    return torch.stack(squares).sum()


def _scaling(settings: ExpertSettings, down: Tensor) -> float:
    return 1.0 if settings.alpha is None else settings.alpha / len(down)


class _Best:
    """The numbers to return: the last ones, or under early stopping those of the best score so far."""

    def __init__(self, model: Backbone, domain: Domain, settings: ExpertSettings) -> None:
        self._model, self._domain, self._settings = model, domain, settings
        self._stopping = settings.stopping
        self._scores: dict[int, float] = {}
        self.trained: Trained = {}

    def is_over(self, step: int, trained: Trained) -> bool:
        """Check the numbers where a check is due; whether the score has not risen for too long."""
        if self._stopping is None or step % self._stopping.every:
            return False
        self._check(step, trained)
        return list(self._scores).index(self._best) + self._stopping.patience < len(self._scores)

    def finish(self, step: int, trained: Trained) -> None:
        """Count the last numbers, too."""
        if self._stopping is None:
            self.trained = trained
        elif step not in self._scores:
            self._check(step, trained)

    def metadata(self) -> dict[str, str]:
        """The best score, its step, and the score before the first step."""
        if self._stopping is None:
            return {}
        best = self._best
        scores = {"validation": self._scores[best], "base_validation": self._scores[0]}
        return {"best_step": str(best), **{name: f"{score:.6g}" for name, score in scores.items()}}

    @property
    def has_learnt(self) -> bool:
        """Whether the best numbers so far are of a step after the first."""
        return bool(self._scores) and self._best > 0

    @property
    def _best(self) -> int:
        return max(self._scores, key=lambda step: self._scores[step])

    @torch.no_grad()
    def _check(self, step: int, trained: Trained) -> None:
        assert self._stopping is not None
        settings, stopping = self._settings, self._stopping
        documents = _documents(self._domain, settings, stopping.split, stopping.documents, [settings.seed, 0], [1])
        fixed = {name: tuple(each.detach().clone() for each in own) for name, own in trained.items()}
        seed, adaptation = _seed(settings, 0, 3), _adaptation(self._model, settings, fixed)
        score = settings.objective.judge(self._model, adaptation, self._domain, documents, seed).score
        self._scores[step] = score
        if self._best == step:
            self.trained = fixed


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
