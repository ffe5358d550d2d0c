"""Shared by the tests of ``app``: a bundle on disk, and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle


@pytest.fixture(scope="module")
def saved(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle on disk."""
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    bundle.save(directory)
    return directory


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in this process."""
    from bayes_dispatch.app.commands.main import main

    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return (int(exit_.value.code or 0), *capfd.readouterr())
