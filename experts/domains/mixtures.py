"""Texts whose parts come from several domains, and which: what a posterior of weights should find."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from bayes_dispatch.arguments import several, whole
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains.domain import Domain, Split

__all__ = [
    "LONGEST_CHARACTER",
    "beginning_of",
    "joined_text",
    "mixed_parts",
    "mixed_text",
    "owners_of",
    "shortest_and_longest",
]

LONGEST_CHARACTER = 4  # bytes of UTF-8: a text that is cut to fewer may be left without any


def shortest_and_longest(name: str, lengths: object) -> tuple[int, int]:
    """Lengths of prompts in bytes.

    Raises:
        ConfigError: not two whole numbers that ascend, or one of less than ``LONGEST_CHARACTER``.
    """
    low, high = (whole(f"each of {name}", each, LONGEST_CHARACTER) for each in several(name, lengths, 2))
    if low > high:
        raise ConfigError(f"expected {name} that ascend, got {low} and {high}")
    return low, high


def mixed_text(
    domains: Sequence[Domain], weights: Sequence[float], rng: np.random.Generator, total_bytes: int, split: Split
) -> tuple[str, Int[np.ndarray, " byte"]]:
    """Lines of several domains in random order, cut at ``total_bytes``; an answer stays with its question.

    Args:
        domains: where they come from. weights: wanted share of the bytes of each.
        rng: randomness. total_bytes: length of the text. split: of all domains.

    Returns:
        The text, and the index of the domain of each of its bytes.
    """
    parts = mixed_parts(domains, weights, rng, total_bytes, split)
    text = b"".join(part for _, part in parts).decode(errors="ignore")  # the end may cut a character
    return text, owners_of(parts)[: len(text.encode())]


def joined_text(
    texts: Sequence[str], weights: Sequence[float], total_bytes: int
) -> tuple[str, Int[np.ndarray, " byte"]]:
    """Beginnings of texts, each on a line of its own, as long together as the longest of the texts at most.

    Args:
        texts: none empty. weights: wanted share of the bytes of each. total_bytes: of all, but for what parts them.

    Returns:
        As :func:`mixed_text`.
    """
    size = min(total_bytes, max(len(text.encode()) for text in texts))
    pieces = [beginning_of(text, round(weight * size)) for text, weight in zip(texts, weights, strict=True)]
    pieces[:-1] = [piece.removesuffix("\n") + "\n" for piece in pieces[:-1]]
    return "".join(pieces), owners_of([(which, piece.encode()) for which, piece in enumerate(pieces)])


def beginning_of(text: str, size: int) -> str:
    """The whole characters of a text's first ``size`` bytes, one at least."""
    return text.encode()[:size].decode(errors="ignore") or text[:1]


def owners_of(parts: Sequence[tuple[int, bytes]]) -> Int[np.ndarray, " byte"]:
    """The index of the domain of each byte of lines that are joined."""
    whose, sizes = [which for which, _ in parts], [len(part) for _, part in parts]
    return np.repeat(np.array(whose, dtype=int), sizes)


def mixed_parts(
    domains: Sequence[Domain], weights: Sequence[float], rng: np.random.Generator, total_bytes: int, split: Split
) -> list[tuple[int, bytes]]:
    """The lines that :func:`mixed_text` joins, each after the index of its domain."""
    parts = [_parts(domain.document(rng, 0, 2 * total_bytes, split)) for domain in domains]
    found, counts, size = list[tuple[int, bytes]](), np.zeros(len(domains)), 0
    while size < total_bytes:
        lacking = np.maximum(np.asarray(weights) * (size + 40) - counts, 0) + 1e-9
        which = int(rng.choice(len(domains), p=lacking / lacking.sum()))
        if not parts[which]:
            parts[which] = _parts(domains[which].document(rng, 0, 2 * total_bytes, split))
        part = parts[which].pop(0)[: total_bytes - size]
        found.append((which, part))
        counts[which] += len(part)
        size += len(part)
    return found


def _parts(document: Document) -> list[bytes]:
    """Lines, but that none ends between what is asked and the end of a scored answer."""
    lines = [line.encode() for line in document.text.splitlines(keepends=True)]
    if document.scored is None:
        return lines
    ends, parts, part, reached = [stop for _, stop in document.scored], list[bytes](), b"", 0
    for line in lines:
        part += line
        reached += len(line)
        if not ends or ends[0] <= reached:
            parts.append(part)
            part = b""
            ends = [end for end in ends if end > reached]
    return [*parts, part] if part else parts
