"""Pre-training of a causal language model: AdamW, data-parallel over processes, checkpointed and resumed exactly.

A batch is a function of the seed, the step and the row alone, so any number of processes trains on the same batches,
and a resumed run continues as if it had never stopped.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.config import LanguageModelConfig
from bayes_dispatch.model.files import read_json, read_tensors, write_bytes, write_json
from bayes_dispatch.model.mambaformer import MambaFormerForCausalLM
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["PretrainingSettings", "RowSource", "next_token_loss", "pack_rows", "pretrain", "schedule"]

Row = tuple[bytes, Sequence[float]]


@runtime_checkable
class RowSource(Protocol):
    """Training texts: picklable, and random by the given generator alone."""

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """At most ``length`` bytes, and the loss weight of each."""
        ...


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """Recipe of DESIGN §6.

    Attributes:
        steps: optimiser steps. batch_size: rows in a step, over all processes. length: bytes in a row.
        learning_rate: its peak, after ``warmup`` steps; flat until the share ``flat`` of all steps, then a cosine to 0.
        weight_decay: on matrices only. clip: largest gradient norm. seed: of initial weights and batches.
        checkpoint_every: steps between checkpoints.
    """

    steps: int
    batch_size: int = 12
    length: int = 256
    learning_rate: float = 3e-3
    warmup: int = 50
    flat: float = 0.3
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 250


def schedule(step: int, steps: int, warmup: int, flat: float) -> float:
    """Factor on the learning rate: linear warm-up, flat, then a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = max(0.0, step / steps - flat) / (1 - flat)
    return 0.5 * (1 + float(np.cos(np.pi * done)))


def pack_rows(rows: Sequence[Row], tokenizer: ByteTokenizer) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, 1 + T), beginning token first, and the loss weight (B, T) of each byte; 0 at padding."""
    ids, _ = tokenizer.pad([[tokenizer.bos_token_id, *data] for data, _ in rows])
    weights = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    for i, (_, row) in enumerate(rows):
        weights[i, : len(row)] = torch.tensor(row)
    return ids, weights


def next_token_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sum over all bytes of weight times −log p, for logits (B, 1 + T, V) of ids (B, 1 + T) and weights (B, T)."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights).sum()


def pretrain(
    config: LanguageModelConfig,
    source: RowSource,
    settings: PretrainingSettings,
    directory: Path,
    processes: int = 1,
    progress: bool = True,
) -> MambaFormerForCausalLM:
    """Train a model from scratch, or from the last checkpoint in ``directory``.

    Args:
        config: the model. source: its texts. settings: the recipe.
        directory: where the checkpoint is kept.
        processes: processes that share each batch, one thread each; they reach the same weights as one does, to
            rounding.
        progress: show a progress bar.

    Raises:
        ConfigError: the batch cannot be shared evenly, or the checkpoint is of other settings.
        BundleError: the checkpoint is damaged.
    """
    if settings.batch_size % processes:
        raise ConfigError(f"expected a batch_size that {processes} processes can share, got {settings.batch_size}")
    if processes == 1:
        return _train(0, 1, config, source, settings, directory, progress)
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (processes, config, source, settings, directory, progress, f"file://{meeting}/store")
        start_processes(_worker, args=arguments, nprocs=processes, start_method="spawn")
    return _train(0, 1, config, source, settings, directory, progress=False)  # loads the finished checkpoint


def _worker(
    rank: int,
    world: int,
    config: LanguageModelConfig,
    source: RowSource,
    settings: PretrainingSettings,
    directory: Path,
    progress: bool,
    meeting: str,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    try:
        _train(rank, world, config, source, settings, directory, progress)
    finally:
        dist.destroy_process_group()


def _train(
    rank: int,
    world: int,
    config: LanguageModelConfig,
    source: RowSource,
    settings: PretrainingSettings,
    directory: Path,
    progress: bool,
) -> MambaFormerForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = MambaFormerForCausalLM(config)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    identity = {"config": config.to_json(), "settings": asdict(settings)}
    start = _load_checkpoint(directory, model, optimizer, identity)
    steps = range(start, settings.steps)
    bar = tqdm(steps, "pre-training", initial=start, total=settings.steps, disable=not progress or rank > 0)
    parameters = list(model.parameters())
    for step in bar:
        factor = schedule(step, settings.steps, settings.warmup, settings.flat)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        rows = [
            source.row(np.random.default_rng([settings.seed, step, row]), settings.length)
            for row in range(rank, settings.batch_size, world)
        ]
        ids, weights = pack_rows(rows, ByteTokenizer())
        optimizer.zero_grad()
        loss = next_token_loss(model(ids).logits, ids, weights)
        loss.backward()
        totals = torch.cat([torch.stack([loss.detach(), weights.sum()]), *(_gradient(p).flatten() for p in parameters)])
        if world > 1:
            dist.all_reduce(totals)
        gradients = (totals[2:] / totals[1]).split([p.numel() for p in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(totals[0] / totals[1]):.3f}", refresh=False)
        if rank == 0 and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps):
            _save_checkpoint(directory, model, optimizer, identity, step + 1)
    if world > 1:
        dist.barrier()
    return model.eval()


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _named_state(model: MambaFormerForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[parameter].get(key, torch.zeros_like(parameter))
    return tensors


def _save_checkpoint(
    directory: Path, model: MambaFormerForCausalLM, optimizer: torch.optim.Optimizer, identity: object, step: int
) -> None:
    """Tensors and their step in one file, so that no crash can part them."""
    tensors = _named_state(model, optimizer) | {"step": torch.tensor(float(step))}
    write_json(directory / "pretraining.json", identity)
    write_bytes(directory / "pretraining.safetensors", safetensors.torch.save(tensors))


def _load_checkpoint(
    directory: Path, model: MambaFormerForCausalLM, optimizer: torch.optim.Optimizer, identity: object
) -> int:
    """Restore model and optimiser; the number of steps done, 0 where there is no checkpoint of these settings."""
    file = directory / "pretraining.safetensors"
    if not file.exists():
        return 0
    if read_json(directory / "pretraining.json") != identity:
        raise ConfigError(
            f"expected a checkpoint of these settings in {directory}, got one of others: use a new directory"
        )
    expected = {name: (tuple(t.shape), t.dtype) for name, t in _named_state(model, optimizer).items()}
    tensors = read_tensors(file, expected | {"step": ((), torch.float32)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            optimizer.state[parameter] = {
                "step": tensors["step"].clone(),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
    return int(tensors["step"])
