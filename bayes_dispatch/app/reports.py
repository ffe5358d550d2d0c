"""Reports and their pictures, which take the place of those of an earlier run and of nothing else."""

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from bayes_dispatch.errors import BundleError
from bayes_dispatch.storage import write_output

__all__ = ["check_report", "write_report"]


@contextmanager
def write_report(directory: Path, names: Collection[str], title: str) -> Iterator[Path]:
    """A new directory to fill with a report and its pictures, which take their places in ``directory`` after the block.

    Other files in ``directory`` stay, and all do if the block ends with an error.

    Args:
        directory: made if need be. names: of the files; those of an earlier run that the block does not make go.
        title: first line of ``report.md``, one of them.

    Raises:
        BundleError: as :func:`check_report`.
    """
    check_report(directory, names, title)
    with tempfile.TemporaryDirectory() as new:
        yield Path(new)
        for name in sorted(names, key=lambda name: name != "report.md"):  # by which a stopped run is known
            if Path(new, name).exists():
                write_output(directory / name, Path(new, name).read_bytes())
            else:
                (directory / name).unlink(missing_ok=True)


def check_report(directory: Path, names: Collection[str], title: str) -> None:
    """Refuse a directory that has files of these names, unless its ``report.md`` is an earlier one of this title.

    Raises:
        BundleError: likewise, or it is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise BundleError(f"expected a directory at {directory}, got a file")
    report = directory / "report.md"
    if not (report.is_file() and report.read_bytes().startswith(title.encode() + b"\n")):
        for name in names:
            if os.path.lexists(directory / name):
                raise BundleError(f"expected no {name} in {directory}, or that of an earlier run, got another")
