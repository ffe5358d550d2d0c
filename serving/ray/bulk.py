"""The same work on many blocks of items, as tasks of a Ray cluster."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from bayes_dispatch.serving.ray.connection import connected  # first: it sets what Ray reads when it is imported

# isort: split
import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from bayes_dispatch.errors import BayesDispatchError, ConfigError

__all__ = ["blocks_on_ray"]

RETRIES = 3  # of a task whose process is lost; one that raises is not tried again
SILENT = 10.0  # seconds that a task may wait for a core before it is said so


@contextmanager
def blocks_on_ray() -> Iterator[Callable[..., list[Any]]]:
    """Connect to a cluster; yields ``map_blocks``, whose results are to be read while the connection lasts.

    What is printed meanwhile goes to stderr.

    Raises:
        ConfigError: see ``connected``; or the cluster has no core.
    """
    with redirect_stdout(sys.stderr), connected():  # where a process is lost, Ray says so on stdout
        if (cores := ray.cluster_resources().get("CPU", 0)) < 1:
            raise ConfigError(f"expected a Ray cluster with a core for each block, got {cores:g} cores in all")
        yield map_blocks


def map_blocks(
    work: Callable[..., Any], blocks: Sequence[Sequence[Any]], *constants: Any, progress: bool = False
) -> list[Any]:
    """``work(block, *constants)`` of every block, in their order.

    Args:
        work: a function of this package, which is called in processes of the cluster, by one core each. A process is
            asked for many blocks, one after the other, so that it may keep what it loads.
        blocks, constants: are pickled. progress: show a progress bar over the items of the blocks.

    Raises:
        ConfigError: a block lost its process, and lost it again each time it was tried. BayesDispatchError: what the
            work raised.
    """
    _wait_for_a_core(len(blocks))
    task = ray.remote(max_retries=RETRIES)(work)
    asked = [task.remote(block, *constants) for block in blocks]
    found, begin = [], 0
    with tqdm(total=sum(map(len, blocks)), desc="on Ray", disable=None if progress else True) as bar:
        for block, each in zip(blocks, asked, strict=True):
            try:
                found.append(ray.get(each))
            except RayError as error:
                raise _told(error, f"items {begin} to {begin + len(block) - 1}") from None
            begin += len(block)
            bar.update(len(block))
    return found


def _wait_for_a_core(blocks: int) -> None:
    """Until a task that does nothing has had one: a block would wait as long, and Ray does not say for what."""
    asked = ray.remote(max_retries=RETRIES)(_nothing).remote()
    if not ray.wait([asked], timeout=SILENT)[0]:
        free, cores = (found().get("CPU", 0) for found in (ray.available_resources, ray.cluster_resources))
        told = f"{blocks} blocks want a core each, or one in turn; {free:g} of {cores:g} cores are free"
        print(f"bayes-dispatch: waiting for the Ray cluster: {told}", file=sys.stderr, flush=True)
    try:
        ray.get(asked)
    except RayError as error:
        raise _told(error, f"{blocks} blocks") from None


def _nothing() -> None:
    pass


def _told(error: RayError, items: str) -> BayesDispatchError:
    """In one line; the cause, where the work itself raised it. Items are counted from 0, as in messages elsewhere."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, BayesDispatchError):
        return type(cause)(f"{cause}, in the block of {items}")
    what = " ".join(str(cause).split())
    return ConfigError(f"expected results of {items} from the Ray cluster, got {type(cause).__name__}: {what:.200}")
