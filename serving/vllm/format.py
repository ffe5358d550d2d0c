"""What the two sides of vLLM agree on: files, names, and how the weights of a blend are written.

Weights are a text, ``de=0.4,fr=0.6``: each component that has some, once, in any order; they sum to 1. ``base`` is a
component, too. The text is a field of ``vllm_xargs``, or stands after ``blend:`` as the name of a model.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "BANK",
    "FIELD",
    "FORMAT",
    "INDEX",
    "PREFIX",
    "RANKS",
    "Index",
    "Probe",
    "gap",
    "told",
    "tolerance",
    "weights_of",
]

INDEX = "vllm.json"  # of an exported bank
FORMAT = 1
BANK = "bank"  # the one adapter that holds all experts: its folder, and vLLM's model of which each request has weights
FIELD = "blend_weights"  # of vllm_xargs
PREFIX = "blend:"  # of models that are one blend each
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes
SLACK = 1e-4  # by which weights may miss a sum of 1
TOLERANCE = 0.1  # nats, the mean over a probe's tokens: half precision is off by less
LEAST_GAP = 3e-4  # nats by which two probes must differ: a third is far above what single precision is off by


class Probe(NamedTuple):
    """A blend of the bank, and what it must say after the index's tokens: the log-probability of each that is asked."""

    weights: str
    log_probabilities: tuple[float, ...]


class Index(NamedTuple):
    """What ``vllm.json`` tells.

    Attributes:
        ranks: of each expert, in order: so many columns of the bank's adapter are its own.
        tokens, probes: with which a server shows that it computes the blends. asked: the different ones of the tokens.
    """

    ranks: Mapping[str, int]
    tokens: tuple[int, ...]
    probes: tuple[Probe, ...]

    @classmethod
    def read(cls, directory: Path) -> "Index":
        """That of an exported bank.

        Raises:
            ValueError: it is missing, damaged or of another format.
        """
        path = directory / INDEX
        try:
            document: Any = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise ValueError
            ranks = {str(name): int(rank) for name, rank in document["ranks"].items()}
            probes = tuple(
                Probe(str(each["weights"]), tuple(map(float, each["log_probabilities"]))) for each in document["probes"]
            )
            return cls(ranks, tuple(map(int, document["tokens"])), probes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"expected a bank of export-vllm, of format {FORMAT}, in {path}, got {error!r:.120}"
            ) from None

    @property
    def asked(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.tokens))

    @property
    def components(self) -> tuple[str, ...]:
        """The experts, then base."""
        return (*self.ranks, "base")

    @property
    def rank(self) -> int:
        """Of the bank's adapter."""
        return sum(self.ranks.values())

    @property
    def server_rank(self) -> int:
        """What vLLM's ``--max-lora-rank`` is to be: the least that it takes for the bank."""
        return min(each for each in RANKS if each >= self.rank)


def told(weights: Sequence[float], components: Sequence[str]) -> str:
    """Weights as a text that ``weights_of`` reads as the same numbers."""
    return ",".join(f"{name}={float(w)!r}" for name, w in zip(components, weights, strict=True) if w)


def weights_of(text: object, components: Sequence[str]) -> list[float]:
    """The weights that a text tells, in the order of the components.

    Raises:
        ValueError: it is none, names what there is not, or its weights are none or of another sum than 1.
    """
    found = dict.fromkeys(components, 0.0)
    expected = f"expected weights such as {components[0]}=0.4,base=0.6"
    if not isinstance(text, str):
        raise ValueError(f"{expected}, got {text!r:.80}")
    named = set()
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in found or name in named:
            raise ValueError(f"{expected} of {', '.join(components)}, each once, got {part!r:.80}")
        named.add(name)
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"{expected}, got {part!r:.80}") from None
    values = list(found.values())
    if not all(0 <= w <= 1 + SLACK for w in values) or abs(math.fsum(values) - 1) > SLACK:  # NaN is neither
        raise ValueError(f"{expected}, from 0 on and of sum 1, got {text!r:.200}")
    return values


def tolerance(probes: Sequence[Probe]) -> float:
    """Nats, the mean over a probe's tokens, that a server may be off: at most a third of what any two probes differ by.

    A server that gives one blend in the place of another is then always off by more.

    Raises:
        ValueError: two probes differ by too little to be told apart.
    """
    pairs = itertools.combinations(probes, 2)
    gaps = [(_apart(a.log_probabilities, b.log_probabilities), a.weights, b.weights) for a, b in pairs]
    least, one, other = min(gaps, key=lambda each: -math.inf if math.isnan(each[0]) else each[0])
    if not least >= LEAST_GAP:
        message = f"expected blends of the bank that differ by {LEAST_GAP:g} nats or more on its probe"
        raise ValueError(f"{message}, got {one} and {other}, which differ by {least:.2g}: a mix-up could not be seen")
    return min(TOLERANCE, least / 3)


def gap(found: Sequence[Sequence[float]], probes: Sequence[Probe]) -> float:
    """By how many nats the log-probabilities of a probe are off, in the mean over its tokens, at most.

    Raises:
        ValueError: by more than may be (``tolerance``).
    """
    most, worst = tolerance(probes), 0.0
    for own, probe in zip(found, probes, strict=True):
        off = _apart(own, probe.log_probabilities)
        if not off <= most:  # NaN is not
            message = f"expected the log-probabilities of the blend {probe.weights} within {most:.2g} nats"
            why = "another model, other experts, weights unheard, or too coarse a dtype"
            raise ValueError(f"{message}, got ones {off:.3g} off: {why}")
        worst = max(worst, off)
    return worst


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
