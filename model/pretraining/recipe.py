"""What a model is pre-trained by, and, apart from it, how that is computed."""

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from bayes_dispatch.arguments import real, set_whole
from bayes_dispatch.errors import ConfigError

__all__ = ["ComputeSettings", "Device", "Precision", "PretrainingSettings", "schedule"]

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """How a model is trained from random weights.

    Attributes:
        steps: optimiser steps. batch_size: rows in a step, over all processes. length: bytes in a row.
        learning_rate: its peak, after ``warmup`` steps; flat until the share ``flat`` of all steps, then a cosine to 0.
        weight_decay: on matrices only. clip: largest gradient norm. seed: of initial weights and batches.
        checkpoint_every: steps between checkpoints.

    Raises:
        ConfigError: a number that is not whole, or outside its bounds.
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

    def __post_init__(self) -> None:
        set_whole(self, steps=1, batch_size=1, length=4, warmup=0, checkpoint_every=1)
        real("learning_rate", self.learning_rate, 0, above=True)
        real("flat", self.flat, 0, 1)
        real("weight_decay", self.weight_decay, 0)
        real("clip", self.clip, 0, above=True)


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """How a recipe is computed. All but ``precision`` change a result by rounding alone, and so may change on resuming.

    Attributes:
        device: ``"cuda"`` takes one GPU per process.
        precision: of products; with ``"bfloat16"`` they are autocast, while weights, optimiser and loss stay float32.
        gradient_checkpointing: keep only what goes into each block, and run it again in the backward pass: less memory
            for more time.
        compile: let ``torch.compile`` fuse what each block does. Blocks of a kind share a graph, rows are padded to
            their full length so that one shape serves all, and torch keeps its work on disk for later runs.
    """

    device: Device = "cpu"
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (("device", self.device, Device), ("precision", self.precision, Precision)):
            if value not in get_args(allowed):
                raise ConfigError(f"expected {name} to be one of {', '.join(get_args(allowed))}, got {value!r}")

    def check(self) -> None:
        """See whether this machine can do it.

        Raises:
            ConfigError: there is no GPU, or no C++ compiler.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("expected a GPU that torch can use for device 'cuda', got none: use 'cpu'")
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # torch's own choice
        if self.compile and shutil.which(compiler) is None:
            raise ConfigError(f"expected a C++ compiler for compile, got no {compiler}: install it, or set CXX")


def schedule(step: int, steps: int, warmup: int, flat: float) -> float:
    """Factor on the learning rate: linear warm-up, flat, then a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = max(0.0, step / steps - flat) / (1 - flat) if flat < 1 else 0.0
    return 0.5 * (1 + float(np.cos(np.pi * done)))
