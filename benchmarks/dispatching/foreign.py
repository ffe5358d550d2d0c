"""Kinds of text that no expert was trained for, beside the project's own foreign texts: made from held-out prose."""

import random
from functools import cache

from bayes_dispatch.experts.domains import BASE_TEXTS, FOREIGN_TEXTS, Split, TextDomain

__all__ = ["DISGUISED", "FOREIGN_KINDS"]

PROSE = next(domain for domain in BASE_TEXTS if domain.name == "prose")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIGNS = ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.."
MORSE = dict(zip(LETTERS, SIGNS.split(), strict=True))
BYTES = 1500  # of each passage that is encoded
COUNT = 40  # texts of what is drawn


@cache
def _hexdump(split: Split) -> list[str]:
    def lines(data: bytes) -> str:
        return "\n".join(f"{at:08x}  {data[at : at + 16].hex(' ')}" for at in range(0, len(data), 16))

    return [lines(text[:BYTES].encode()) for text in PROSE.texts(split)]


@cache
def _morse(split: Split) -> list[str]:
    return [" ".join(MORSE.get(letter, "/") for letter in text[:BYTES].lower()) for text in PROSE.texts(split)]


@cache
def _markup(split: Split) -> list[str]:
    return ["".join(f"<p><b>{word}</b></p>\n" for word in text[:BYTES].split()) for text in PROSE.texts(split)]


@cache
def _characters(split: Split) -> list[str]:
    rng = random.Random(split)
    return ["".join(chr(rng.randrange(32, 127)) for _ in range(BYTES)) for _ in range(COUNT)]


@cache
def _numbers(split: Split) -> list[str]:
    rng = random.Random(split)
    rows = [[",".join(f"{rng.gauss(0, 9):.3f}" for _ in range(5)) for _ in range(60)] for _ in range(COUNT)]
    return ["\n".join(table) for table in rows]


def _pairs(split: Split) -> list[list[tuple[int, int]]]:
    rng = random.Random(split)
    return [[(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(150)] for _ in range(COUNT)]


@cache
def _differences(split: Split) -> list[str]:
    """Nearly sums."""
    return ["\n".join(f"{a}-{b}={a - b}" for a, b in pairs) for pairs in _pairs(split)]


@cache
def _products(split: Split) -> list[str]:
    """In the clothes of sums."""
    return ["\n".join(f"{a}+{b}={a * b}" for a, b in pairs) for pairs in _pairs(split)]


FOREIGN_KINDS = (
    *FOREIGN_TEXTS,
    TextDomain("hexdump", _hexdump),
    TextDomain("morse", _morse),
    TextDomain("markup", _markup),
    TextDomain("characters", _characters),
    TextDomain("numbers", _numbers),
    TextDomain("differences", _differences),
)
DISGUISED = TextDomain("products", _products)
