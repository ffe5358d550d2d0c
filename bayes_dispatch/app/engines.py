"""Makes engines of a bundle, here or on another machine: what is sent there is its path, and the engine's settings."""

from dataclasses import dataclass, field
from functools import partial

from bayes_dispatch.app.bundle_at import BundleAt
from bayes_dispatch.errors import MissingDependencyError
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.system import System
from bayes_dispatch.model.mambaformer.compiled.threads import passing
from bayes_dispatch.serving.engine import BatchedEngine, Limits
from bayes_dispatch.serving.work import Engine

__all__ = ["EngineOf"]


@dataclass(frozen=True)
class EngineOf:
    """Called, it makes an engine of a bundle.

    Attributes:
        bundle: what to load. limits: of the engine.
        vllm: URL of a vLLM server that writes, as the engine's machine reaches it; ``None`` to write in process.
        key: of that server, if it has one.
    """

    bundle: BundleAt
    limits: Limits
    vllm: str | None = None
    key: str | None = field(default=None, repr=False)

    def __call__(self) -> Engine:
        """Load and start.

        Raises:
            BundleError: see ``BundleAt.load``. BayesDispatchError: see :meth:`start`.
        """
        return self.start(passing(self.bundle.load))

    def start(self, system: System) -> Engine:
        """An engine of what has been loaded; it has compiled what would hold up its first request.

        Raises:
            MissingDependencyError: vLLM's server cannot be asked. UpstreamError, ConfigError: see ``VllmEngine``.
        """
        if self.vllm is None:
            return passing(partial(self._batched, system))
        try:
            from bayes_dispatch.serving.vllm.engine import VllmEngine
        except ImportError as error:
            raise MissingDependencyError.of("vllm", error) from None
        return VllmEngine(system, self.vllm, self.limits, self.key)

    def _batched(self, system: System) -> Engine:
        TwoPassGenerator(system).generate(["a", "b"], max_new_tokens=2)
        return BatchedEngine(system, self.limits)
