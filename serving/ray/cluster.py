"""Starts replicas in a Ray cluster, and asks them."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from bayes_dispatch.serving.ray.connection import connected  # first: it sets what Ray reads when it is imported

# isort: split
import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import AutoscalingConfig, ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from bayes_dispatch.arguments import real, whole
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.two_pass.events import tell
from bayes_dispatch.serving.ray.replica import Replica
from bayes_dispatch.serving.ray.routing import UntriedFirst
from bayes_dispatch.serving.work import BusyError, Ended, Engine, EngineState, Event, Work

__all__ = ["RayReplicas", "Scale", "replicas_on_ray"]

logger = logging.getLogger(__name__)

NAME = "replica"
HEALTH_SECONDS = 2.0  # between two looks at a replica: a dead one is missed after so long
REPORT_SECONDS = 5.0  # that a replica has to tell its state
RESTART_SECONDS = 10  # after which a client may try again that no replica could be found for
LOST = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)


@dataclass(frozen=True)
class Scale:
    """How many replicas there are.

    Attributes:
        least, most: of them. busy: requests that each is to be at, on average; with more another one is started.
        cpus, gpus: cores and GPUs that Ray sets aside for each; of a core a fraction, too.

    Raises:
        ConfigError: less than 1, or a least above the most; cores that are no number above 0.
    """

    least: int
    most: int
    busy: int
    cpus: float = 1.0
    gpus: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"expected replicas from 1 on, as 2 or 1-4, got {self.least}-{self.most}")
        whole("busy", self.busy, 1)
        whole("gpus", self.gpus, 0)
        real("cpus", self.cpus, 0, above=True)

    @classmethod
    def read(cls, text: str, busy: int, cpus: float, gpus: int = 0) -> "Scale":
        """Of ``2`` or ``1-4``.

        Raises:
            ConfigError: another text.
        """
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
        if found is None:
            raise ConfigError(f"expected a number of replicas as 2 or 1-4, got {text!r:.80}")
        return cls(int(found[1]), int(found[2] or found[1]), busy, cpus, gpus)


class RayReplicas:
    """See ``Replicas``.

    Args:
        handle: of a deployment of ``Replica``.
    """

    def __init__(self, handle: Any) -> None:
        self._run, self._handle = handle.options(method_name="run", stream=True), handle

    async def run(self, work: Work, tried: Sequence[str]) -> AsyncGenerator[tuple[str | None, Sequence[Event]], None]:
        """See ``Replicas``."""
        answer = self._run.remote(work, tried=tuple(tried))
        try:
            async for name, events in answer:
                yield name, events
        except BackPressureError:
            refusal = BusyError("expected a replica that runs, got none, and as many that wait as may", RESTART_SECONDS)
            yield None, [Ended("failed", refusal)]
        except LOST:
            return
        except (asyncio.CancelledError, GeneratorExit):
            with suppress(RayServeException, RayError):  # it has failed already
                answer.cancel()
            raise

    async def states(self) -> Mapping[str, EngineState] | None:
        """See ``Replicas``."""
        try:
            asked = self._handle.broadcast("report")
            told = await asked.results_async(timeout_s=REPORT_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:  # none runs
            return {}
        except TimeoutError:  # one is stuck, until Ray replaces it, and nothing is told of the others
            return None
        return dict(each for each in told if not isinstance(each, BaseException))


@contextmanager
def replicas_on_ray(
    make: Callable[[], Engine], scale: Scale, name: str, holds: int, waiting: int
) -> Iterator[RayReplicas]:
    """Start replicas, and end them; in the cluster of ``RAY_ADDRESS``, or in one on this machine alone.

    Args:
        make: makes an engine. It is called on the machines of the cluster, which need this package.
        scale: how many. name: of the application in the cluster; one of this name is replaced.
        holds: requests that an engine holds, before it says itself that it is full.
        waiting: that may wait while there is no replica.

    Raises:
        ConfigError: there is no such cluster, it has too few cores or GPUs, or the engines could not be made.
    """
    with connected() as own:
        _check_room(scale, own)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        deployment = serve.deployment(
            Replica,
            name=NAME,
            ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
            max_ongoing_requests=2 * holds,  # those that end are counted a little longer than the engine holds them
            max_queued_requests=waiting,
            health_check_period_s=HEALTH_SECONDS,
            request_router_config=RequestRouterConfig(request_router_class=UntriedFirst),
            **_number(scale),
        )
        serve.start(proxy_location=ProxyLocation.Disabled)
        try:
            handle = serve.run(deployment.bind(make), name=name, route_prefix=None)
        except RuntimeError:
            told = [each.message for each in serve.status().applications[name].deployments.values()]
            last = " ".join(told).strip().splitlines()[-1:]
            raise ConfigError(f"expected replicas that start, got: {' '.join(last)}") from None
        try:
            yield RayReplicas(handle)
        finally:
            handle.shutdown()
            serve.delete(name)


def _check_room(scale: Scale, own: bool) -> None:
    """Whether there are cores and GPUs enough; a cluster of other machines may grow, and is waited for.

    Raises:
        ConfigError: this machine has too few.
    """
    has = ray.cluster_resources()
    for kind, what, each in (("CPU", "cores", scale.cpus), ("GPU", "GPUs", scale.gpus)):
        there, count = has.get(kind, 0), scale.most if own else scale.least
        if count * each > there:
            if own:
                needed = f"{count} replicas of {each:g}"
                raise ConfigError(f"expected replicas for the {there:g} {what} of this machine, got {needed}")
            facts = {"for": what, "has": there, "needs": count * each}
            tell(logger, logging.WARNING, "waiting for the Ray cluster", partial(dict, facts))


def _number(scale: Scale) -> dict[str, Any]:
    if scale.least == scale.most:
        return {"num_replicas": scale.least}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.least, max_replicas=scale.most, target_ongoing_requests=scale.busy
        )
    }
