"""Text domains made from the Python installation: no downloads.

``code`` and ``prose`` train the base model; ``json`` and ``capitals`` are kept for experts; ``rot13`` and ``base64``
have no expert at all. A file (or help topic) is in one split only, by hash of its name.
"""

import ast
import base64
import codecs
import json
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics

import numpy as np

from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Split, agreement, held_out

__all__ = ["BASE_TEXTS", "EXPERT_TEXTS", "FOREIGN_TEXTS", "TextDomain"]

SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "__pycache__",
    "turtledemo",
    "encodings",
}


@dataclass(frozen=True)
class TextDomain:
    """Passages of some texts.

    Attributes:
        name: the domain's name.
        texts: gives the texts of a split. Passages begin at the start of a line.
    """

    name: str
    texts: Callable[[Split], Sequence[str]]

    @property
    def content(self) -> dict[str, list[str]]:
        """The texts of each split."""
        return {split: list(self.texts(split)) for split in ("train", "held_out")}

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """A passage of ``total_bytes``; all after the prompt is scored."""
        texts = self.texts(split)
        sizes = np.array([len(text) for text in texts], dtype=float)
        text = texts[int(rng.choice(len(texts), p=sizes / sizes.sum()))]
        start = int(rng.integers(max(len(text) - total_bytes, 0) + 1))
        newline = text.rfind("\n", 0, start) + 1
        passage = text[newline : newline + total_bytes]
        return Document(passage, min(prompt_bytes, len(passage)))

    def reward(self, question: str, expected: str, answer: str) -> float:
        """Share of the bytes that agree with the true continuation."""
        return agreement(expected, answer)


@cache
def _sources() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts) and not any(
            part.startswith(("config-", "_sysconfigdata")) for part in name.parts
        ):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if len(text) > 2000 and text.isascii():
                found[name.as_posix()] = text
    return found


@cache
def _definitions() -> dict[str, list[dict[str, object]]]:
    """What each file defines: its classes and functions, with line, arguments and first line of documentation."""
    found = {}
    for name, text in _sources().items():
        records: list[dict[str, object]] = []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                doc = ast.get_docstring(node) or ""
                record: dict[str, object] = {"name": node.name, "line": node.lineno}
                if isinstance(node, ast.FunctionDef):
                    record["arguments"] = [argument.arg for argument in node.args.args]
                else:
                    record["public"] = not node.name.startswith("_")
                record["doc"] = doc.partition("\n")[0] or None
                records.append(record)
        found[name] = records
    return found


def _split(texts: dict[str, str], split: Split) -> list[str]:
    return [text for name, text in texts.items() if held_out(name) == (split == "held_out") and len(text) > 400]


@cache
def _code(split: Split) -> list[str]:
    return _split(_sources(), split)


@cache
def _passages() -> dict[str, list[str]]:
    """Help topics, and the longer docstrings of each source file."""
    found = {f"topic {name}": [text] for name, text in topics.topics.items() if text.isascii()}
    for name, source in _sources().items():
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        found[name] = [doc for node in nodes if len(doc := ast.get_docstring(node) or "") > 200]
    return found


@cache
def _prose(split: Split) -> list[str]:
    passages = _passages()
    if split == "held_out":  # some topics have two names, some docstrings stand in two files
        seen = {text for name, texts in passages.items() if not held_out(name) for text in texts}
        passages = {name: [text for text in texts if text not in seen] for name, texts in passages.items()}
    return _split({name: "\n\n".join(texts) for name, texts in passages.items()}, split)


@cache
def _json(split: Split) -> list[str]:
    texts = {name: "\n".join(map(json.dumps, records)) for name, records in _definitions().items()}
    return _split(texts, split)


@cache
def _capitals(split: Split) -> list[str]:
    return [text.upper() for text in _prose(split)]


@cache
def _rot13(split: Split) -> list[str]:
    return [codecs.encode(text, "rot13") for text in _prose(split)]


@cache
def _base64(split: Split) -> list[str]:
    return [base64.encodebytes(text.encode()).decode() for text in _prose(split)]


BASE_TEXTS = (TextDomain("code", _code), TextDomain("prose", _prose))
EXPERT_TEXTS = (TextDomain("json", _json), TextDomain("capitals", _capitals))
FOREIGN_TEXTS = (TextDomain("rot13", _rot13), TextDomain("base64", _base64))
