"""What is timed: reading a prompt, decoding after one, and a training step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayes_dispatch.model.mambaformer.products import times
from peers.contestant import Contestant
from peers.timing import Rounds, Work

__all__ = ["Scale", "decode", "filled", "parameters", "prefill", "products", "prompt", "training", "training_step"]


@dataclass(frozen=True)
class Scale:
    """How much to measure.

    Attributes:
        prefill, after: lengths of the prompts to read, and to decode after. tokens: number of tokens to decode.
        batch: rows and length of a training step. lengths: contexts of the section "length".
        generated: numbers of new tokens of the section "cache". rounds: how often everything is measured.
    """

    prefill: tuple[int, ...] = (512, 4096)
    after: tuple[int, ...] = (32, 4096)
    tokens: int = 64
    batch: tuple[int, int] = (4, 256)
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    generated: tuple[int, ...] = (10, 20, 50, 500)
    rounds: Rounds = field(default_factory=Rounds)

    @classmethod
    def quick(cls) -> "Scale":
        """Short prompts and few rounds, for a look while working."""
        return cls(
            prefill=(512,),
            after=(32,),
            tokens=32,
            batch=(2, 128),
            lengths=(1024, 4096),
            generated=(10, 50),
            rounds=Rounds(repeats=3, budget=15.0),
        )


def prompt(length: int, batch: int = 1) -> Tensor:
    """Random bytes, the same in every call."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(length))


def parameters(contestant: Contestant) -> int:
    """Numbers in its weights; tied ones count once."""
    return sum(p.numel() for p in contestant.module.parameters())


def prefill(contestant: Contestant, length: int) -> Work:
    """Read a prompt."""
    ids = prompt(length)
    return Work(lambda _: contestant.prefill(ids))


def filled(contestant: Contestant, context: int, room: int, piece: int | None = None) -> Any:
    """A cache that holds a prompt of ``context`` tokens, read in pieces if wanted, with room for more."""
    state = contestant.start(context + room)
    for ids in prompt(context).split(piece or context, dim=1):
        contestant.extend(ids, state)
    return state


def decode(contestant: Contestant, fill: Callable[[], Any], tokens: int) -> Work:
    """Read ``tokens`` one by one into a copy of the cache that ``fill`` makes; making and copying it is not timed."""
    steps = prompt(tokens).split(1, dim=1)
    states: list[Any] = []

    def prepare() -> Any:
        if not states:
            states.append(fill())
        return contestant.clone(states[0])

    def run(state: Any) -> None:
        for token in steps:
            contestant.extend(token, state)

    return Work(run, prepare)


def products(weights: list[Tensor], tokens: int, steps: int) -> Work:
    """Only the matrix products of a model: ``tokens`` at once, so many times in a row."""
    inputs = {w.shape[1]: torch.randn(1, tokens, w.shape[1]) for w in weights}

    def run(_: object) -> None:
        for _step in range(steps):
            for weight in weights:
                times(inputs[weight.shape[1]], weight)

    return Work(run)


def training(contestant: Contestant, batch: tuple[int, int]) -> Work:
    """One training step, over rows and length ``batch``."""
    ids = prompt(batch[1], batch[0])
    return Work(lambda _: training_step(contestant, ids))


def training_step(contestant: Contestant, ids: Tensor) -> None:
    """Forward, next-token loss and backward; gradients are made anew. No optimiser: it costs the same for all."""
    contestant.module.train()
    contestant.module.zero_grad(set_to_none=True)
    logits = contestant.logits(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
