"""Makes engines of a bundle, here or on another machine: what is sent there is its path, and the engine's settings."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.shipped import bundle_directory, is_smollm2
from bayes_dispatch.errors import BundleError
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.system import System
from bayes_dispatch.serving.engine import BatchedEngine, Limits
from bayes_dispatch.serving.work import Engine

__all__ = ["EngineOf", "started"]


@dataclass(frozen=True)
class EngineOf:
    """Called, it makes an engine of the bundle at a path; other kinds of engines want a class like this one.

    Attributes:
        bundle, dtype: as for ``load_bundle``. checksum: of its index. limits: of the engine.
    """

    bundle: Path | None
    checksum: str
    limits: Limits
    dtype: str | None = None

    @classmethod
    def here(cls, bundle: Path | None, limits: Limits, dtype: str | None = None) -> "EngineOf":
        """Of a bundle that lies on this machine; elsewhere it has to be the same one, at the same path."""
        named = bundle is None or is_smollm2(bundle)
        return cls(bundle if named else Path(str(bundle)).absolute(), _checksum(bundle), limits, dtype)

    def __call__(self) -> Engine:
        """Load and start.

        Raises:
            BundleError: there is none, or another one.
        """
        if (found := _checksum(self.bundle)) != self.checksum:
            raise BundleError(f"expected the bundle {self.checksum:.12}, as at the gateway, got {found:.12}")
        return started(load_bundle(self.bundle, dtype=self.dtype), self.limits)


def started(system: System, limits: Limits) -> Engine:
    """An engine that has compiled what would hold up its first request."""
    TwoPassGenerator(system).generate(["a", "b"], max_new_tokens=2)
    return BatchedEngine(system, limits)


def _checksum(bundle: Path | None) -> str:
    """Of the index, which has those of all other files."""
    index = bundle_directory(bundle) / "bundle.json"
    if not index.is_file():
        raise BundleError(f"expected a bundle at {index.parent}, got none")
    return hashlib.sha256(index.read_bytes()).hexdigest()
