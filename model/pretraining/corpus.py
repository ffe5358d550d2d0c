"""Texts of a user as training data."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bayes_dispatch.errors import ConfigError, PromptError
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["TextCorpus"]


@dataclass(frozen=True)
class TextCorpus:
    """Windows of documents, each as likely as any other; all bytes weigh 1. Nothing is cut within a character.

    Attributes:
        documents: UTF-8 of each, none empty.

    Raises:
        ConfigError: there are no documents, or one is empty.
    """

    documents: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not self.documents or not all(self.documents):
            raise ConfigError(
                f"expected documents that are not empty, got sizes {[len(d) for d in self.documents][:9]}"
            )

    @classmethod
    def read(cls, path: Path) -> "TextCorpus":
        """A text file, or all text files below a folder, in the order of their names, but for empty and hidden ones.

        Raises:
            ConfigError: there is no text, a file cannot be read, or it is not UTF-8.
        """
        files = [path]
        if path.is_dir():
            below = (file for file in sorted(path.rglob("*")) if file.is_file())
            files = [file for file in below if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        texts = [text for file in files if (text := _read(file))]
        if not texts:
            raise ConfigError(f"expected text in {path}, got {len(files)} empty files")
        return cls(tuple(texts))

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return sum(len(document) for document in self.documents)

    def row(self, rng: np.random.Generator, length: int) -> tuple[bytes, list[float]]:
        """Up to ``length`` bytes of a document, or a whole one that is shorter, and their weights."""
        ends = np.cumsum([max(1, len(document) - length + 1) for document in self.documents])
        place = int(rng.integers(ends[-1]))
        index = int(np.searchsorted(ends, place, side="right"))
        start = place - (int(ends[index - 1]) if index else 0)
        window = _between(self.documents[index], start, start + length)[:length].decode(errors="ignore").encode()
        return window, [1.0] * len(window)

    def split(self, share: float) -> tuple["TextCorpus", "TextCorpus"]:
        """Without the last ``share`` of each document's bytes, and these.

        Raises:
            ConfigError: one of both would be empty.
        """
        cuts = [len(document) - round(len(document) * share) for document in self.documents]
        pairs = [(_between(d, 0, cut), _between(d, cut, len(d))) for d, cut in zip(self.documents, cuts, strict=True)]
        rest, held_out = (tuple(part for part in parts if part) for parts in zip(*pairs, strict=True))
        if not rest or not held_out:
            raise ConfigError(f"expected enough text to hold out the share {share}, got {self.size} bytes")
        return TextCorpus(rest), TextCorpus(held_out)

    def windows(self, length: int, most: int) -> list[bytes]:
        """The documents in pieces of ``length`` bytes and the rest of a character; ``most`` of them, evenly spread."""
        places = [(d, start) for d in self.documents for start in range(0, len(d), length)]
        pieces = [piece for d, start in places if (piece := _between(d, start, start + length))]
        chosen = np.linspace(0, len(pieces) - 1, min(most, len(pieces))).round().astype(int)
        return [pieces[i] for i in chosen]

    def digest(self) -> str:
        """A hash of all documents."""
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            digest.update(len(document).to_bytes(8, "little") + document)
        return digest.hexdigest()


def _between(document: bytes, start: int, stop: int) -> bytes:
    """The characters that begin between two places."""

    def begun(at: int) -> int:
        while at < len(document) and document[at] & 0xC0 == 0x80:
            at += 1
        return at

    return document[begun(start) : begun(stop)]


def _read(file: Path) -> bytes:
    try:
        return utf8(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"expected a readable text file {file}, got: {error.strerror}") from None
    except PromptError as error:
        raise ConfigError(f"{file}: {error}") from None
