"""Models of one size and the recipe by which all of them train."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_dispatch.model.mambaformer.config import BlockKind, MambaFormerConfig, StateSpaceKind
from bayes_dispatch.model.mambaformer.network import MambaFormer
from in_context.tasks import Prompts, Task

__all__ = ["InContextModel", "Outcome", "Recipe", "Sizes", "judge", "train"]

VALIDATION_SEED, TEST_SEED = 2**40, 2**40 + 1
JUDGED_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the models, chosen such that their numbers of parameters differ by less than a tenth.

    Attributes:
        d_model, n_heads, d_state, head_dim: see ``MambaFormerConfig``.
        pairs: of (attention, Mamba) in the MambaFormer, after its first Mamba block.
        mamba_blocks: of the pure Mamba.
        layers: of (attention, feed-forward) in the Transformer. d_ff: inner width of a feed-forward block.
    """

    d_model: int
    n_heads: int
    d_state: int
    head_dim: int
    pairs: int
    mamba_blocks: int
    layers: int
    d_ff: int

    def configs(self, mixer: StateSpaceKind) -> dict[str, MambaFormerConfig]:
        """The models by name. Only the Transformer is told positions; Mamba blocks tell the others the order."""
        layer: tuple[BlockKind, ...] = ("attention", "feed_forward")

        def config(**different: Any) -> MambaFormerConfig:
            same = {name: getattr(self, name) for name in ("d_model", "n_heads", "d_state", "head_dim", "d_ff")}
            return MambaFormerConfig(mixer=mixer, n_pairs=self.pairs, **same, **different)

        return {
            "Mamba": config(blocks=(mixer,) * self.mamba_blocks),
            "Transformer": config(blocks=layer * self.layers, positions="rotary"),
            "MambaFormer": config(),
        }


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Of training: Adam, linear warm-up, a constant rate for half of the steps, then a cosine to zero.

    Attributes:
        steps, batch: prompts are never repeated, so ``steps * batch`` of them are seen.
        warmup: steps. clip: the largest norm of a gradient.
        judged: prompts in the validation and the test set.
    """

    steps: int
    batch: int
    warmup: int = 50
    clip: float = 1.0
    judged: int = 1024

    def rate_factor(self, step: int) -> float:
        """Learning rate at a step, over its largest."""
        decay = max(0.0, 2 * step / self.steps - 1)
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * decay))


class InContextModel(nn.Module):
    """Blocks of any kinds between two linear maps: vectors in, vectors out."""

    def __init__(self, config: MambaFormerConfig, width: int, outputs: int) -> None:
        super().__init__()
        self.read_in = nn.Linear(width, config.d_model)
        self.blocks = MambaFormer(config)
        self.read_out = nn.Linear(config.d_model, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T, width) to (B, T, outputs)."""
        return self.read_out(self.blocks(self.read_in(inputs)))

    def answers(self, prompts: Prompts) -> Tensor:
        """Outputs where answers are due, (B, Q, outputs): nothing else of the outputs enters any loss."""
        return self(prompts.inputs)[:, prompts.places]

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class Judgement(NamedTuple):
    """Mean loss and score of answers."""

    loss: float
    score: float


class Outcome(NamedTuple):
    """Of one training run: the test, the validation after each quarter of the steps, seconds of training."""

    test: Judgement
    quarters: list[Judgement]
    seconds: float


def judge(task: Task, answer: Callable[[Prompts], Tensor], prompts: int, seed: int, device: str = "cpu") -> Judgement:
    """Loss and score of a model's or a baseline's answers to the prompts of a seed."""
    generator = torch.Generator().manual_seed(seed)
    totals, seen = torch.zeros(2, dtype=torch.float64), 0
    with torch.no_grad():
        while seen < prompts:
            batch = task.sample(min(JUDGED_BATCH, prompts - seen), generator).to(device)
            size, answers = batch.inputs.shape[0], answer(batch)
            totals += size * torch.tensor([float(task.loss(answers, batch)), task.score(answers, batch)])
            seen += size
    loss, score = (totals / seen).tolist()
    return Judgement(loss, score)


def train(
    task: Task,
    config: MambaFormerConfig,
    recipe: Recipe,
    rate: float,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[], object] = lambda: None,
) -> tuple[InContextModel, Outcome]:
    """Train a new model; ``seed`` decides its first weights and its prompts, the same prompts for all models.

    Args:
        rate: the largest learning rate. on_step: called after each step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InContextModel(config, task.width, task.outputs).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate_factor)
    quarters, seconds = [], 0.0
    for step in range(recipe.steps):
        begun = time.perf_counter()
        prompts = task.sample(recipe.batch, generator, step / recipe.steps).to(device)
        optimizer.zero_grad()
        task.loss(model.answers(prompts), prompts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - begun
        on_step()
        if 4 * (step + 1) // recipe.steps > 4 * step // recipe.steps:
            quarters.append(judge(task, model.answers, recipe.judged, VALIDATION_SEED, device))
    return model, Outcome(judge(task, model.answers, recipe.judged, TEST_SEED, device), quarters, seconds)
