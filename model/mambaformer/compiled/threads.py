"""Threads that share one compiled loop."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise

import torch

__all__ = ["in_parts"]


def in_parts(loop: Callable[..., None], count: int, *arguments: object) -> None:
    """``loop(*arguments, start, stop)`` for all of 0 … ``count``, by as many threads as torch may use.

    The parts must not touch each other's results. The loop holds no lock while it runs.
    """
    threads = min(torch.get_num_threads(), count)
    here, *others = pairwise(count * part // threads for part in range(threads + 1))
    jobs, mine = [], [here]
    try:
        for part in others:
            try:
                jobs.append(_helpers(threads - 1).submit(loop, *arguments, *part))
            except RuntimeError:  # no more threads are to be had, as when the interpreter ends
                mine.append(part)
        for part in mine:
            loop(*arguments, *part)
    finally:  # whatever failed, the others end before anyone reads, or changes, these arrays
        wait(jobs)
    for job in jobs:
        job.result()


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="compiled-loop")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not come along
