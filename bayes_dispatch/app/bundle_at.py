"""A bundle as it is named to other processes and machines: by its path, and the checksum of what is there."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from bayes_dispatch.app.bundle import Bundle, load_bundle
from bayes_dispatch.app.shipped import bundle_directory, is_smollm2
from bayes_dispatch.errors import BundleError
from bayes_dispatch.storage import read_saved

__all__ = ["BundleAt"]


@dataclass(frozen=True)
class BundleAt:
    """Where a bundle lies.

    Attributes:
        path, device, dtype: as for ``load_bundle``. checksum: of its index.
    """

    path: Path | None
    checksum: str
    device: str = "cpu"
    dtype: str | None = None

    @classmethod
    def here(cls, path: Path | None, device: str = "cpu", dtype: str | None = None) -> "BundleAt":
        """One that lies on this machine; elsewhere it has to be the same one, at the same path.

        Raises:
            BundleError: there is none.
        """
        named = path is None or is_smollm2(path)
        return cls(path if named else Path(str(path)).absolute(), _checksum(path), device, dtype)

    def load(self) -> Bundle:
        """Load it.

        Raises:
            BundleError: there is none, or another one.
        """
        return read_saved(bundle_directory(self.path), "bundle.json", self._load)

    def _load(self, place: Path) -> Bundle:
        if (found := _of_index(place)) != self.checksum:
            raise BundleError(f"expected the bundle {self.checksum:.12}, as where it was named, got {found:.12}")
        return load_bundle(self.path, device=self.device, dtype=self.dtype)


def _checksum(path: Path | None) -> str:
    """Of the index, which has those of all other files."""
    return read_saved(bundle_directory(path), "bundle.json", _of_index)


def _of_index(place: Path) -> str:
    index = place / "bundle.json"
    if not index.is_file():
        raise BundleError(f"expected a bundle at {index.parent}, got none")
    return hashlib.sha256(index.read_bytes()).hexdigest()
