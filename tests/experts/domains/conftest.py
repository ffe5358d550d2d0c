"""Small packages as ``pip install --target`` leaves them, so that no test needs those on PyPI."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """Puts a package with some files into a folder, and returns that folder."""

    def put(name: str, version: str, files: Mapping[str, bytes], readme: str = "") -> Path:
        info = f"{name.replace('-', '_').lower()}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n{readme}".encode()
        files = {**files, f"{info}/METADATA": metadata}
        files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in files).encode()
        for path, data in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(data)
        return tmp_path

    return put
