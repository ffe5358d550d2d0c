"""Threads that share one compiled loop: numba's, which are asked within microseconds, as those of torch are."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch

__all__ = ["shared", "sharing", "start_threads"]


def sharing() -> int:
    """How many threads may share a loop: as many as torch may use, where numba has OpenMP or TBB; else one.

    numba's last resort, ``workqueue``, ends the process when two threads ask at once.
    """
    wanted = torch.get_num_threads()
    return 1 if wanted == 1 else min(wanted, start_threads())


@contextmanager
def shared(threads: int) -> Iterator[None]:
    """Within this context, loops of this thread that are parallel run on so many."""
    import numba

    if threads == 1 or (before := numba.get_num_threads()) == threads:
        yield
        return
    numba.set_num_threads(threads)
    try:
        yield
    finally:
        numba.set_num_threads(before)


@cache
def start_threads() -> int:
    """Have numba start its threads; how many may share a loop, whatever torch's setting is.

    It does so in a thread that ends, since OpenMP, which torch uses too, is told their number as this thread's own.
    """
    import numba

    if _forked:
        return 1
    with ThreadPoolExecutor(1) as passing:
        most = passing.submit(numba.get_num_threads).result()
    return most if numba.threading_layer() in ("omp", "tbb") else 1  # type: ignore[attr-defined]


_forked: list[int] = []  # GNU's OpenMP ends a process that was forked from one with its threads


def _after_fork() -> None:
    _forked.append(os.getpid())
    start_threads.cache_clear()


os.register_at_fork(after_in_child=_after_fork)
