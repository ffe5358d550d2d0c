"""Where texts come from: files of packages on PyPI, as pip installed them. Nothing is imported, executed or fetched."""

import sys
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

    def files(self, suffix: str, directory: Path | None = None, under: str = "") -> dict[str, Path]:
        """The package's files whose names end with ``suffix``, in order, by their paths in the package.

        Args:
            suffix: such as ``".mo"``.
            directory: looked at before Python's own path, as ``pip install --target`` filled it.
            under: how the paths begin.

        Raises:
            ConfigError: the package is not there, or in another version.
        """
        found = self._distribution(directory)
        names = sorted(file.as_posix() for file in found.files or () if ".." not in file.parts)
        own = [name for name in names if name.startswith(under) and name.endswith(suffix)]
        return {name: Path(str(found.locate_file(name))) for name in own}

    def texts(self, suffix: str, directory: Path | None = None, under: str = "") -> dict[str, str]:
        """What stands in those files, as UTF-8.

        Raises:
            ConfigError: as ``files``.
        """
        files = self.files(suffix, directory, under)
        return {name: path.read_text(encoding="utf-8", errors="ignore") for name, path in files.items()}

    def readme(self, directory: Path | None = None) -> str:
        """The package's description on PyPI.

        Raises:
            ConfigError: as ``files``.
        """
        return str(self._distribution(directory).metadata.json.get("description", ""))

    def _distribution(self, directory: Path | None) -> metadata.Distribution:
        path = [*([] if directory is None else [str(directory)]), *sys.path]
        found = next(iter(metadata.distributions(name=self.name, path=path)), None)
        if found is None or found.version.partition("+")[0] != self.version:
            target = "" if directory is None else f" --target {directory}"
            raise ConfigError(
                f"expected {self.name} {self.version} (pip install --no-deps{target} {self.name}=={self.version}), got "
                f"{'none' if found is None else found.version}"
            )
        return found
