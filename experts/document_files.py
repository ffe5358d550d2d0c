"""Documents from a file of JSON lines: text with its prompt, and what of it is scored."""

import json
from collections.abc import Mapping, Set
from pathlib import Path

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document

__all__ = ["check_keys", "read_documents"]

KEYS = {"text", "prompt_bytes", "scored"}


def read_documents(path: Path, longest: int) -> list[Document]:
    """A document from each line ``{"text": …, "prompt_bytes": …, "scored": [[start, stop], …]}``; blank lines are none.

    ``scored`` may be left out: all bytes after the prompt.

    Args:
        path: of a UTF-8 file. longest: most bytes of a text.

    Raises:
        ConfigError: the file cannot be read or is no UTF-8, a line is no such object, its text is longer, it has no
            prompt or no scored bytes, or there is no document.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"expected a readable file {path}, got: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected UTF-8 in {path}, got another byte at position {error.start}") from None
    documents = [_document(f"line {n} of {path}", line, longest) for n, line in enumerate(lines, 1) if line.strip()]
    if not documents:
        raise ConfigError(f"expected a document in each line of {path}, got no line with text")
    return documents


def check_keys(found: Mapping[str, object], keys: Set[str], where: str) -> None:
    """Raise ``ConfigError`` where an object has other keys: one that is misspelt would count as left out."""
    if unknown := found.keys() - keys:
        raise ConfigError(f"expected the keys {', '.join(sorted(keys))} in {where}, got {min(unknown)!r:.60}")


def _document(where: str, line: str, longest: int) -> Document:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected JSON in {where}, got: {error}") from None
    if (
        not isinstance(found, dict)
        or not isinstance(found.get("text"), str)
        or type(found.get("prompt_bytes")) is not int
    ):
        raise ConfigError(
            f'expected an object with a text "text" and a number "prompt_bytes" in {where}, got {line!r:.60}'
        )
    check_keys(found, KEYS, where)
    try:
        size = len(found["text"].encode())
    except UnicodeEncodeError:
        raise ConfigError(f'expected a "text" of whole characters in {where}, got a lone surrogate') from None
    if size > longest:
        raise ConfigError(f"expected at most {longest} bytes of text in {where}, got {size}")
    if found["prompt_bytes"] < 1:
        raise ConfigError(f"expected prompt_bytes of at least 1 in {where}, got {found['prompt_bytes']}")
    scored = found.get("scored")
    if scored is not None and not (isinstance(scored, list) and all(map(_is_range, scored))):
        raise ConfigError(f'expected "scored" as [[start, stop], …] in {where}, got {json.dumps(scored):.60}')
    try:
        document = Document(found["text"], found["prompt_bytes"], None if scored is None else tuple(map(tuple, scored)))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not document.prompt:
        raise ConfigError(f"expected a whole character within prompt_bytes in {where}, got {found['prompt_bytes']}")
    if not any(stop > start for start, stop in document.ranges):
        raise ConfigError(f"expected scored bytes after the prompt in {where}, got none")
    return document


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(place) is int for place in value)
