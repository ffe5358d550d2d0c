"""Where texts come from: files of packages on PyPI, as pip installed them. Nothing is imported, executed or fetched."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bayes_dispatch.errors import ConfigError

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """A package whose files are read.

    Attributes:
        name: on PyPI. version: whose files they are; another version has other texts.
    """

    name: str
    version: str

    def files(self, suffix: str, directory: Path | None = None) -> Sequence[Path]:
        """The package's files whose names end with ``suffix``, sorted.

        Args:
            suffix: such as ``".mo"``. directory: what ``pip install --target`` filled; without one, Python's own path.

        Raises:
            ConfigError: the package is not there, or in another version.
        """
        path = sys.path if directory is None else [str(directory)]
        found = next(iter(metadata.distributions(name=self.name, path=path)), None)
        if found is None or found.version.partition("+")[0] != self.version:
            target = "" if directory is None else f" --target {directory}"
            raise ConfigError(
                f"expected {self.name} {self.version} (pip install --no-deps{target} {self.name}=={self.version}), got "
                f"{'none' if found is None else found.version}"
            )
        paths = [file for file in found.files or () if file.name.endswith(suffix) and ".." not in file.parts]
        return [Path(str(found.locate_file(file))) for file in sorted(paths)]
