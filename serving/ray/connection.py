"""Connects this process to a Ray cluster."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Before Ray is imported, which reads them. We tell nobody that we run. A cluster of this machine alone listens at
# 127.0.0.1 where Ray believes that it can have no other machines, as it does elsewhere than on Linux; and it answers
# nobody without its token, which Ray would keep in a file that others may read.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else what still asks for a replica while all ends would start Ray again
os.environ.setdefault("RAY_task_oom_retries", "3")  # of tasks that are killed for memory: else for ever, silently
if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray

from bayes_dispatch.arguments import in_a_line
from bayes_dispatch.errors import ConfigError

__all__ = ["connected"]

OWN = os.environ.get("RAY_ADDRESS", "") in ("", "local")


@contextmanager
def connected() -> Iterator[bool]:
    """Use the cluster of ``RAY_ADDRESS``, or one on this machine alone, which ends with this.

    Yields:
        Whether the cluster is one on this machine alone.

    Raises:
        ConfigError: there is no such cluster, or one on this machine would listen to others.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        ray.init(**quiet | ({"address": "local", "include_dashboard": False} if OWN else {}))
    except Exception as error:  # Ray raises that class itself, too
        where = "that starts" if OWN else f"at {os.environ['RAY_ADDRESS']}"
        why = in_a_line(error) or type(error).__name__
        raise ConfigError(f"expected a Ray cluster {where}, got none: {why}") from None
    try:
        if OWN and (host := ray.util.get_node_ip_address()) != "127.0.0.1":
            raise ConfigError(f"expected a Ray cluster at 127.0.0.1 alone, got one at {host}")
        yield OWN
    finally:
        ray.shutdown()
