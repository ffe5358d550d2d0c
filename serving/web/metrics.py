"""What ``/metrics`` tells Prometheus. Each metric has a line in docs/serving.md."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bayes_dispatch.serving.work import Engine

__all__ = ["Metrics"]

PREFIX = "bayes_dispatch_"
FIRST = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # bounds in seconds
BETWEEN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)

GAUGES = {
    "waiting": "Requests that wait for the model.",
    "waiting_tokens": "Tokens of the waiting requests, with those that they may write.",
    "running": "Requests that the model works on.",
    "rows": "Rows of the model that run together.",
    "cache_bytes": "Bytes that the rows keep.",
    "replicas": "Engines that answer.",
}
COUNTERS = {
    "prompt_tokens": "Tokens that were read.",
    "new_tokens": "Tokens that were written.",
    "steps": "Steps of the model.",
}


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        engine: whose state is told.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_State(engine))
        self._requests = Counter(
            f"{PREFIX}requests", "Requests that were answered.", ["endpoint", "status"], registry=self._registry
        )
        self._gated = Counter(f"{PREFIX}gated", "Prompts that the gate was asked about.", registry=self._registry)
        self._foreign = Counter(
            f"{PREFIX}foreign",
            "Prompts that the gate found foreign: a p-value below the rate that was asked for.",
            registry=self._registry,
        )
        self._first = Histogram(
            f"{PREFIX}first_token_seconds",
            "From a request to the first token of a choice.",
            buckets=FIRST,
            registry=self._registry,
        )
        self._between = Histogram(
            f"{PREFIX}between_tokens_seconds",
            "From a token of a choice to its next.",
            buckets=BETWEEN,
            registry=self._registry,
        )

    def answered(self, endpoint: str, status: int) -> None:
        """A request has its answer."""
        self._requests.labels(endpoint, str(status)).inc()

    def dispatched(self, p_value: float | None, foreign: bool) -> None:
        """A prompt has its posterior."""
        if p_value is not None:
            self._gated.inc()
            self._foreign.inc(int(foreign))

    def wrote(self, first: bool, seconds: float) -> None:
        """A token has come, so long after the request, or after the token before it."""
        (self._first if first else self._between).observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _State(Collector):
    """The engine's own counts, as they are when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        state = self._engine.state
        for name, told in GAUGES.items():
            yield GaugeMetricFamily(f"{PREFIX}{name}", told, value=getattr(state, name))
        for name, told in COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}{name}", told, value=getattr(state, name))
