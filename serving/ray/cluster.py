"""Starts replicas in a Ray cluster, and asks them."""

import asyncio
import logging
import os
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

# Before Ray is imported, which reads them. A server tells nobody that it runs. A cluster of this machine alone listens
# at 127.0.0.1 where Ray believes that it can have no other machines, as it does elsewhere than on Linux; and it answers
# nobody without its token, which Ray would keep in a file that others may read.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else what still asks for a replica while all ends would start Ray again
if "RAY_ADDRESS" not in os.environ:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

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
        ConfigError: less than 1, or a least above the most.
    """

    least: int
    most: int
    busy: int
    cpus: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"expected replicas from 1 on, as 2 or 1-4, got {self.least}-{self.most}")

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
    _connect(scale)
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
    try:
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
    finally:
        ray.shutdown()


def _number(scale: Scale) -> dict[str, Any]:
    if scale.least == scale.most:
        return {"num_replicas": scale.least}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.least, max_replicas=scale.most, target_ongoing_requests=scale.busy
        )
    }


def _connect(scale: Scale) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    own = "RAY_ADDRESS" not in os.environ
    try:
        ray.init(**quiet | ({"address": "local", "include_dashboard": False} if own else {}))
    except Exception as error:  # Ray raises that class itself, too
        where = "that starts" if own else f"at {os.environ['RAY_ADDRESS']}"
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"expected a Ray cluster {where}, got none: {why:.300}") from None
    if not own:
        return
    host, cores = ray.util.get_node_ip_address(), ray.cluster_resources()["CPU"]
    if host == "127.0.0.1" and scale.most * scale.cpus <= cores:
        return
    ray.shutdown()
    if host != "127.0.0.1":
        raise ConfigError(f"expected a Ray cluster at 127.0.0.1 alone, got one at {host}")
    needed = f"{scale.most} replicas of {scale.cpus:g}"
    raise ConfigError(f"expected replicas for the {cores:g} cores of this machine, got {needed}")
