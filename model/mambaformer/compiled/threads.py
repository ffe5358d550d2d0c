"""Threads that share one compiled loop: numba's, which are asked within microseconds, as those of torch are."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

__all__ = ["passing", "prepare_threads", "sharing"]

T = TypeVar("T")


@contextmanager
def sharing() -> Iterator[int]:
    """How many threads may share a loop within this context: as many as torch may use, where numba has OpenMP or TBB.

    Else one: numba's last resort, ``workqueue``, ends the process when two threads ask at once.
    """
    wanted = torch.get_num_threads()
    if wanted == 1 or (threads := min(wanted, prepare_threads())) == 1:
        yield 1
        return
    import numba

    before = numba.get_num_threads()  # of this thread
    if before != threads:
        numba.set_num_threads(threads)
    try:
        yield threads
    finally:
        if before != threads:
            numba.set_num_threads(before)


@cache
def prepare_threads() -> int:
    """Make numba ready for parallel loops; how many threads these may have, whatever torch's setting is.

    It tells OpenMP, which torch uses too, how many threads the asking one is to have, and multiprocessing how processes
    are to be started: neither is to be seen outside.
    """
    import numba

    unsettled = multiprocessing.get_start_method(allow_none=True) is None
    most = passing(numba.get_num_threads)
    if unsettled:
        multiprocessing.set_start_method(None, force=True)
    known = numba.threading_layer() in ("omp", "tbb")  # type: ignore[attr-defined]
    return most if known and not _forked else 1


def passing(work: Callable[[], T]) -> T:
    """Do it in a thread that ends, and with it the threads that OpenMP gave it.

    Each thread that has computed keeps its own, and where there are more of these than cores, they sleep between two
    products and have to be woken for the next. A thread that computes all day is to be the only one that has any.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


_forked = False  # where numba had parallel loops before, it ends a forked process that has them, too


def _after_fork() -> None:
    global _forked
    _forked = True
    prepare_threads.cache_clear()


os.register_at_fork(after_in_child=_after_fork)
