"""What Ray Serve runs on each machine: one engine, asked over the cluster's own wire."""

import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from ray import serve

from bayes_dispatch.inference.two_pass.events import of_error
from bayes_dispatch.serving.replicas import events_of
from bayes_dispatch.serving.work import Ended, Engine, EngineState, Event, Work

__all__ = ["Replica"]

logger = logging.getLogger("ray.serve")  # goes to the replica's file in Ray's folder of logs


class Replica:
    """One engine.

    Args:
        make: makes it, on the machine where it is to run.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._engine = make()
        self._name: str = serve.get_replica_context().replica_id.unique_id

    async def run(self, work: Work, tried: Sequence[str]) -> AsyncGenerator[tuple[str, list[Event]], None]:
        """See ``Replicas``; what was tried is for the router."""
        yield self._name, []
        async for events in events_of(self._engine, work):
            if isinstance(last := events[-1], Ended) and last.error is not None and last.reason in ("broken", "closed"):
                events[-1] = Ended(last.reason, _plain(last.error))
            yield self._name, events

    async def report(self) -> tuple[str, EngineState]:
        """Its name, and what it is at."""
        return self._name, self._engine.state

    def check_health(self) -> None:
        """Ray Serve replaces a replica where this raises.

        Raises:
            RuntimeError: the engine has ended.
        """
        if self._engine.state.closing:
            raise RuntimeError("expected an engine that runs, got one that has ended")

    def __del__(self) -> None:
        """Ray Serve calls this when the replica is to stop; what it was at has ended by then."""
        if hasattr(self, "_engine"):
            self._engine.close(0)


def _plain(error: BaseException) -> RuntimeError:
    """For other processes, which may not know its class. Its message may have words of a prompt, and stays."""
    logger.error("an engine failed: %s", of_error(error))
    return RuntimeError(f"a replica's engine failed with {type(error).__name__}")
