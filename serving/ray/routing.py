"""Which replica has a request: the one that is at the least, of those that have not refused it."""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

__all__ = ["UntriedFirst"]


class UntriedFirst(RequestRouter):
    """Ray Serve's router takes the least busy of the first list, and of the next one if all of that are full."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All of them, in any order: first those that are not named in ``tried``."""
        asked: dict[Any, Any] = {} if pending_request is None else pending_request.kwargs
        tried = set(asked.get("tried", ()))
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))
        return [
            [each for each in shuffled if each.replica_id.unique_id not in tried],
            [each for each in shuffled if each.replica_id.unique_id in tried],
        ]
