"""Starts replicas in a Ray cluster, and asks them."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from bayes_dispatch.serving.ray.connection import connected  # first: it sets what Ray reads when it is imported

# isort: split
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
from bayes_dispatch.serving.ray.replica import Replica
from bayes_dispatch.serving.ray.routing import UntriedFirst
from bayes_dispatch.serving.work import BusyError, Ended, Engine, EngineState, Event, Work

__all__ = ["RayReplicas", "Scale", "replicas_on_ray"]

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
        cpus: cores that Ray sets aside for each, as a fraction of one, too.

    Raises:
        ConfigError: less than 1, or a least above the most; cores that are no number above 0.
    """

    least: int
    most: int
    busy: int
    cpus: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"expected replicas from 1 on, as 2 or 1-4, got {self.least}-{self.most}")
        whole("busy", self.busy, 1)
        real("cpus", self.cpus, 0, above=True)

    @classmethod
    def read(cls, text: str, busy: int, cpus: float) -> "Scale":
        """Of ``2`` or ``1-4``.

        Raises:
            ConfigError: another text.
        """
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
        if found is None:
            raise ConfigError(f"expected a number of replicas as 2 or 1-4, got {text!r:.80}")
        return cls(int(found[1]), int(found[2] or found[1]), busy, cpus)


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

    async def states(self) -> Mapping[str, EngineState]:
        """See ``Replicas``."""
        try:
            asked = self._handle.broadcast("report")
            told = await asked.results_async(timeout_s=REPORT_SECONDS, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):  # none runs, or one is stuck: then nothing is known
            return {}
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
        ConfigError: there is no such cluster, it has too few cores, or the engines could not be made.
    """
    with connected() as cores:
        if cores is not None and scale.most * scale.cpus > cores:
            needed = f"{scale.most} replicas of {scale.cpus:g}"
            raise ConfigError(f"expected replicas for the {cores:g} cores of this machine, got {needed}")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        deployment = serve.deployment(
            Replica,
            name=NAME,
            ray_actor_options={"num_cpus": scale.cpus},
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


def _number(scale: Scale) -> dict[str, Any]:
    if scale.least == scale.most:
        return {"num_replicas": scale.least}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.least, max_replicas=scale.most, target_ongoing_requests=scale.busy
        )
    }
