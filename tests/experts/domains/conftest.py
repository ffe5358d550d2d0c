"""Small packages as ``pip install --target`` leaves them, so that no test needs those on PyPI."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests import packages


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """Puts a package with some files into a folder, and returns that folder."""

    def put(name: str, version: str, files: Mapping[str, bytes], readme: str = "") -> Path:
        packages.install(tmp_path, name, version, files, readme)
        return tmp_path

    return put
