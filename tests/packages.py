"""Small packages as ``pip install --target`` leaves them, so that no test needs those on PyPI."""

import io
from collections.abc import Mapping
from pathlib import Path


def install(directory: Path, name: str, version: str, files: Mapping[str, bytes], readme: str = "") -> None:
    """Put a package with some files into a folder."""
    info = f"{name.replace('-', '_').lower()}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n{readme}".encode()
    files = {**files, f"{info}/METADATA": metadata}
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in files).encode()
    for path, data in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)


def mo(entries: Mapping[str | tuple[str, str], str | tuple[str, ...]]) -> bytes:
    """A catalogue of texts, or of their singular and plural, and translations."""
    from babel.messages.catalog import Catalog
    from babel.messages.mofile import write_mo

    catalog = Catalog()
    for english, translation in entries.items():
        catalog.add(english, translation)
    file = io.BytesIO()
    write_mo(file, catalog)
    return file.getvalue()


def install_translations(directory: Path) -> None:
    """All packages that translations are read from; the first has sixty texts in each language."""
    from bayes_dispatch.experts.domains.translations import FOLDERS, SOURCES

    for source in SOURCES:
        files = {
            f"one/locale/{folders[0]}/LC_MESSAGES/django.mo": mo(
                {f"Add page {number}": f"{language} {number} página" for number in range(60)}
            )
            for language, folders in FOLDERS.items()
        }
        install(directory, source.name, source.version, files if source is SOURCES[0] else {})
