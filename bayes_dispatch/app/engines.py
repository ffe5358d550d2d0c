"""Makes engines of a bundle, here or on another machine: what is sent there is its path, and the engine's settings."""

from dataclasses import dataclass

from bayes_dispatch.app.bundle_at import BundleAt
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.system import System
from bayes_dispatch.serving.engine import BatchedEngine, Limits
from bayes_dispatch.serving.work import Engine

__all__ = ["EngineOf", "started"]


@dataclass(frozen=True)
class EngineOf:
    """Called, it makes an engine of a bundle; other kinds of engines want a class like this one.

    Attributes:
        bundle: what to load. limits: of the engine.
    """

    bundle: BundleAt
    limits: Limits

    def __call__(self) -> Engine:
        """Load and start.

        Raises:
            BundleError: see ``BundleAt.load``.
        """
        return started(self.bundle.load(), self.limits)


def started(system: System, limits: Limits) -> Engine:
    """An engine that has compiled what would hold up its first request."""
    TwoPassGenerator(system).generate(["a", "b"], max_new_tokens=2)
    return BatchedEngine(system, limits)
