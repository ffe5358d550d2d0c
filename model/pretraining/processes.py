"""The processes that share a training run: one alone, those that ``pretrain`` starts, or those of ``torchrun``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.pretraining.recipe import Device

__all__ = ["Worker", "alone", "is_first", "join", "join_launched", "launched"]

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


class Worker(NamedTuple):
    """One of the processes.

    Attributes:
        rank: its number. world: how many there are. device: where it computes.
    """

    rank: int
    world: int
    device: torch.device

    def add_up(self, values: Tensor) -> None:
        """Replace ``values``, of one shape in all processes, by their sum over these."""
        if self.world > 1:
            dist.all_reduce(values)

    def agree(self, number: int) -> bool:
        """Whether all processes came with the same number."""
        if self.world == 1:
            return True
        bounds = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(bounds, dist.ReduceOp.MIN)
        return bool(bounds[0] == -bounds[1])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, has started this process."""
    return all(name in os.environ for name in LAUNCHER)


def is_first() -> bool:
    """Whether this is the one process to write files and to report."""
    return not launched() or os.environ["RANK"] == "0"


def alone(device: Device) -> Worker:
    """The only process."""
    return Worker(0, 1, _place(device, 0))


@contextmanager
def join_launched(device: Device) -> Iterator[Worker]:
    """Join the processes of ``torchrun``; a process group that the caller has made already is used, and left open.

    Raises:
        ConfigError: the machine has fewer GPUs than processes.
    """
    if dist.is_initialized():
        yield Worker(dist.get_rank(), dist.get_world_size(), _place(device, int(os.environ["LOCAL_RANK"])))
    else:
        rank, local, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        with join(device, rank, local, world, "env://") as worker:
            yield worker


@contextmanager
def join(device: Device, rank: int, local_rank: int, world: int, meeting: str) -> Iterator[Worker]:
    """Join a new process group, gloo on the CPU and nccl on GPUs, and leave it at the end.

    Args:
        device: where to compute. rank, world: this process, of how many; ``local_rank``: on this machine.
        meeting: URL at which all processes meet.

    Raises:
        ConfigError: the machine has fewer GPUs than processes.
    """
    place = _place(device, local_rank)
    backend, bound = ("nccl", place) if device == "cuda" else ("gloo", None)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, device_id=bound)
    try:
        yield Worker(rank, world, place)
    finally:
        dist.destroy_process_group()


def _place(device: Device, local_rank: int) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"expected a GPU for each process, got {torch.cuda.device_count()} for process {local_rank} of this machine"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
