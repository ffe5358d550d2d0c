"""Threads that share one compiled loop."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

__all__ = ["in_parts"]


def in_parts(loop: Callable[..., None], count: int, *arguments: object, threads: int | None = None) -> None:
    """``loop(*arguments, start, stop)`` for all of 0 … ``count``, by so many threads, or as many as torch may use.

    The parts must not touch each other's results. The loop holds no lock while it runs.
    """
    threads = min(threads or torch.get_num_threads(), count)
    if threads == 1:
        loop(*arguments, 0, count)
        return
    bounds = [count * part // threads for part in range(threads + 1)]
    pairs = list(pairwise(bounds))
    jobs = [_helpers(threads - 1).submit(loop, *arguments, *pair) for pair in pairs[1:]]
    try:
        loop(*arguments, *pairs[0])
    finally:  # whatever happens here, nobody writes into these arrays afterwards
        for job in jobs:
            job.result()


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="compiled-loop")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not come along
