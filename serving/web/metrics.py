"""What ``/metrics`` tells Prometheus. Each metric has a line in docs/serving.md."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.serving.web.arrivals import DRIFT_RATE, FOREIGN_RATE, Arrivals
from bayes_dispatch.serving.web.feedback import Learner
from bayes_dispatch.serving.work import Begun, Engine

__all__ = ["Metrics"]

PREFIX = "bayes_dispatch_"
FIRST = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # bounds in seconds
BETWEEN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)

GAUGES = {
    "waiting": "Requests that wait for the model.",
    "waiting_tokens": "Tokens of the waiting requests, with those that they may write.",
    "running": "Requests that the model works on.",
    "rows": "Rows of the model that run together.",
    "cache_bytes": "Bytes that the rows keep, and of what may follow.",
    "replicas": "Engines that answer.",
}
COUNTERS = {
    "prompt_tokens": "Tokens that were read.",
    "new_tokens": "Tokens that were written.",
    "steps": "Steps of the model.",
}
ARRIVALS = {
    "gated": "Prompts that the gate was asked about, for these counts.",
    "foreign": f"Prompts of these whose p-value is at most {FOREIGN_RATE:g}.",
}


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        engine: whose state is told. dispatcher: whose prior is told.
        arrivals: hears of every prompt; ``None`` in a bundle without a gate. learner: if there is one.
    """

    def __init__(
        self, engine: Engine, dispatcher: Dispatcher, arrivals: Arrivals | None = None, learner: Learner | None = None
    ) -> None:
        self._arrivals = arrivals
        self._registry = CollectorRegistry()
        self._registry.register(_State(engine, dispatcher, arrivals, learner))
        self._requests = Counter(
            f"{PREFIX}requests", "Requests that were answered.", ["endpoint", "status"], registry=self._registry
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

    def dispatched(self, begun: Begun) -> None:
        """A prompt has its posterior; once, however many choices it has."""
        if self._arrivals is not None:
            self._arrivals.add(begun.evidence)

    def wrote(self, first: bool, seconds: float) -> None:
        """A token has come, so long after the request, or after the token before it."""
        (self._first if first else self._between).observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _State(Collector):
    """Others' own counts, as they are when they are asked for."""

    def __init__(
        self, engine: Engine, dispatcher: Dispatcher, arrivals: Arrivals | None, learner: Learner | None
    ) -> None:
        self._engine, self._dispatcher, self._arrivals, self._learner = engine, dispatcher, arrivals, learner

    def collect(self) -> Iterator[Metric]:
        state = self._engine.state
        for name, told in GAUGES.items():
            yield GaugeMetricFamily(f"{PREFIX}{name}", told, value=getattr(state, name))
        for name, told in COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}{name}", told, value=getattr(state, name))
        arrivals, learner = self._arrivals, self._learner
        for name, told in ARRIVALS.items():
            count = 0 if arrivals is None else getattr(arrivals, name)
            yield CounterMetricFamily(f"{PREFIX}{name}", told, value=count)
        yield GaugeMetricFamily(
            f"{PREFIX}drift_log_martingale",
            "Evidence that the prompts have drifted from the held-out ones: a log of what a bet against it has won.",
            value=0 if arrivals is None else arrivals.monitor.log_martingale,
        )
        yield GaugeMetricFamily(
            f"{PREFIX}drift_alarmed",
            f"Whether that has ever reached log(1 / {DRIFT_RATE:g}) since the start.",
            value=0 if arrivals is None else int(arrivals.monitor.alarmed),
        )
        yield GaugeMetricFamily(
            f"{PREFIX}prior_events",
            "Labels and rewards that the prior has taken in.",
            value=self._dispatcher.prior.events,
        )
        yield GaugeMetricFamily(
            f"{PREFIX}remembered",
            "Choices that feedback may be given on.",
            value=0 if learner is None else learner.held,
        )
