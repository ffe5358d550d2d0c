"""The peak memory of a training step, in a process of its own."""

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from peers.groups import GROUPS
from peers.tasks import training_step

__all__ = ["grown", "peak_of_training"]

STATUS = Path("/proc/self/status")


def peak_of_training(group: str, entry: str, shape: tuple[int, int], threads: int) -> int | None:
    """Bytes that one training step adds to the resident memory of a fresh process, gradients included.

    From the kernel's own high-water mark, so it counts what the allocator keeps and fragments, as ``top`` would.
    ``None`` where there is no such mark (it is Linux's).
    """
    if not STATUS.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, group, entry, shape, threads).result()


def _peak(group: str, entry: str, shape: tuple[int, int], threads: int) -> int:
    torch.set_num_threads(threads)
    entries = {e.name: e for g in GROUPS if g.name == group for e in g.entries}
    contestant = entries[entry].build()
    training_step(contestant, torch.zeros(1, 8, dtype=torch.long))  # loads what is loaded on first use
    contestant.module.zero_grad(set_to_none=True)
    return grown(lambda: training_step(contestant, torch.zeros(shape, dtype=torch.long)))


def grown(run: Callable[[], object]) -> int:
    """Bytes by which this process is larger at the peak of ``run`` than before, on Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is in use now
    before = _kilobytes("VmRSS")
    run()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found.group(1))
