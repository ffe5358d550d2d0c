"""Guarantees beside the model: intervals and sets of stated coverage, from held-out prompts whose mixtures are known.

A posterior is right where its program is. Split conformal prediction (Vovk et al., 2005; Lei et al., 2018) needs no
program: it scores how far off the posterior was of each of n prompts, and allows a new prompt what p of them, and a
little more, would have needed. If the new prompt is exchangeable with the n, that is enough with probability at least
p, whatever the posterior is worth, and at most p + 1/(n + 1) where scores do not tie. (Those do of which the truth is
where the posterior has half of its mass, as at a share of 0: any interval holds it.) The probability is over the
calibration prompts and the new one together, not for every kind of prompt; but prompts are told apart by their length,
as far as the n go, for short ones are harder: all this is then of each bin of lengths and its own n. The bins are cut
by the calibration prompts' own lengths, which moves the probability by one prompt of a bin at most. A prompt of unknown
length is in the bin of the shortest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from bayes_dispatch.arguments import fraction, simplex
from bayes_dispatch.dispatcher.arrays import Frozen
from bayes_dispatch.dispatcher.exact.cells import RESOLUTION, Cells
from bayes_dispatch.dispatcher.fitting.flat import Dirichlets
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.errors import ConfigError

__all__ = ["Answer", "Conformal", "ConformalIntervals", "conformal_quantile", "counted"]

Answer = Cells | Dirichlets  # distributions themselves, and not draws
FEWEST, BINS = 200, 8  # prompts of a bin of lengths, at least, and bins, at most
COUNTED = 0.05  # posterior mean of an expert from which on its interval is promised anything
ROUNDING = 1e-12  # of probabilities: what just meets a quantile is inside
HALVINGS = 14  # of 0 to 1, where the ends of intervals are sought: a sixteenth of RESOLUTION


@dataclass(frozen=True, eq=False)
class Conformal(Frozen):
    """What a calibration keeps of its n prompts.

    Attributes:
        shares: ``(K+1,)`` prior mean of the experts' shares that prompts are scored under: that of calibration, so that
            later feedback moves no score.
        levels: ``(n,)`` of one counted expert of each prompt, the least level at which the central posterior interval
            holds its true share, to a ``RESOLUTION``.
        doubts: ``(n,)`` of each prompt, 1 − the probability that the expert of the largest true share is best.
        lengths: ``(n,)`` of each prompt, in tokens; 0 where unknown.
    """

    shares: np.ndarray
    levels: np.ndarray
    doubts: np.ndarray
    lengths: np.ndarray

    def __post_init__(self) -> None:
        simplex("shares", self.shares)
        for name, most in (("levels", 1), ("doubts", 1), ("lengths", np.inf)):
            scores = getattr(self, name)
            if scores.shape != self.levels.shape or scores.ndim != 1 or not len(scores):
                raise ConfigError(f"expected {name} of one prompt or more, got shapes {scores.shape}")
            if not (scores.min() >= 0 and scores.max() <= most and np.isfinite(scores).all()):  # NaN fails, too
                raise ConfigError(f"expected {name} from 0 to {most}, got others")
        super().__post_init__()

    @classmethod
    def of(
        cls,
        answers: Iterable[Answer],
        truth: Float[np.ndarray, "prompt weight"],
        shares: Float[np.ndarray, " weight"],
        lengths: Float[np.ndarray, " prompt"],
        seed: int,
    ) -> Conformal:
        """Scores of N prompts.

        Args:
            answers: their posteriors, in pieces, under a prior of mean ``shares (K+1,)``.
            truth: ``(N, K+1)`` their weights.
            lengths: ``(N,)`` in tokens; 0 where unknown.
            seed: of the choice among the experts that the posterior of a prompt counts.

        Raises:
            ConfigError: no prompts, or one whose weights are NaN.
        """
        if not len(known := np.isfinite(truth).all(1)) or not known.all():
            raise ConfigError(f"expected prompts whose mixtures are known, got {known.sum()} of {len(known)} that are")
        # The choice may not depend on the truth: then prompts, and with them these scores, are exchangeable.
        random = np.random.default_rng(seed).random(truth.shape)
        levels, doubts = list[np.ndarray](), list[np.ndarray]()
        for answer in answers:
            rows = slice(start := sum(map(len, levels)), start + len(answer))
            own = truth[rows]
            above, below = answer.below(np.minimum(own + RESOLUTION, 1)), answer.below(own - RESOLUTION)
            every = np.clip(np.maximum(1 - 2 * above, 2 * below - 1), 0, 1)
            chosen = np.where(counted(answer.mean), random[rows], -1).argmax(1)
            levels.append(every[np.arange(len(own)), chosen])
            largest = own >= own.max(1, keepdims=True) - RESOLUTION
            doubts.append(np.where(largest, 1 - answer.probability_best(), 0).max(1))
        return cls(np.array(shares), np.concatenate(levels), np.clip(np.concatenate(doubts), 0, 1), np.array(lengths))

    def same(self, other: Conformal) -> bool:
        """Whether the other one is of the same prompts."""
        return all(np.array_equal(getattr(self, each.name), getattr(other, each.name)) for each in fields(self))

    def quantiles(
        self, name: str, lengths: Float[np.ndarray, " prompt"], probability: float
    ) -> Float[np.ndarray, "prompt 1"]:
        """``(N, 1)`` what another score ``name``, of a prompt as long, is not above with such a probability."""
        edges = self._edges(max(FEWEST, _fewest(probability)))
        places, own = (np.searchsorted(edges, each, side="right") for each in (lengths, self.lengths))
        found, scores = np.zeros((len(lengths), 1)), getattr(self, name)
        for place in np.unique(places):
            found[places == place] = conformal_quantile(np.sort(scores[own == place]), probability)
        return found

    def ends(
        self, answer: Answer, lengths: Float[np.ndarray, " prompt"], probability: float
    ) -> Float[np.ndarray, "2 prompt weight"]:
        """``(2, N, K+1)`` ends of the central posterior interval at the calibrated level, of the posterior's
        distribution itself and not of draws, a ``RESOLUTION`` further out.
        """
        level = self.quantiles("levels", lengths, probability) + ROUNDING
        low, high = np.zeros((2, 2, len(answer), len(self.shares)))  # each end lies between the two
        high += 1
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = np.stack([answer.below(middle[0]) >= (1 - level) / 2, answer.below(middle[1]) > (1 + level) / 2])
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return np.clip(np.stack([low[0] - RESOLUTION, high[1] + RESOLUTION]), 0, 1)

    def _edges(self, fewest: int) -> Float[np.ndarray, " edge"]:
        """Lengths that part the prompts into bins of so many, at least; one bin where there are not twice as many."""
        ordered, found, start = np.sort(self.lengths), list[float](), 0
        wanted = min(BINS, len(ordered) // fewest)
        for place in range(1, wanted):
            edge = ordered[len(ordered) * place // wanted]
            shorter = int(np.searchsorted(ordered, edge))
            if min(shorter - start, len(ordered) - shorter) >= fewest:
                found.append(float(edge))
                start = shorter
        return np.array(found)

    def sets(
        self,
        best: Float[np.ndarray, "prompt weight"],
        lengths: Float[np.ndarray, " prompt"],
        probability: float,
    ) -> Bool[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` the least ambiguous sets (Sadinle et al., 2019), with the likeliest expert in each, where the
        posterior says that each is ``best``."""
        doubts = 1 - best
        most = np.maximum(self.quantiles("doubts", lengths, probability), doubts.min(1, keepdims=True))
        return doubts <= most + ROUNDING


@runtime_checkable
class Program(Protocol):
    """What knows the posterior of prompts, as the fitted parts of a dispatcher do."""

    @property
    def fingerprint(self) -> str:
        """Of all that answers are computed from."""

    def labels(self, pi: Float[np.ndarray, " weight"]) -> Float[np.ndarray, " weight"]:
        """``(K+1,)`` label shares under ``pi``."""

    def answer(self, prompts: Prompts, labels: Float[np.ndarray, " weight"]) -> Answer:
        """The posterior of prompts under label shares."""


@dataclass(frozen=True, eq=False)
class ConformalIntervals:
    """Calibrated intervals of N prompts, at any probability: computed when they are asked for, a few at a time.

    Attributes:
        known: the calibration. program: of the dispatcher that was calibrated. prompts: the N.
    """

    known: Conformal
    program: Program
    prompts: Prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __call__(
        self, probability: float
    ) -> tuple[Float[np.ndarray, "2 prompt weight"], Bool[np.ndarray, "prompt weight"]]:
        """Lower and upper ends ``(2, N, K+1)``, and of which experts ``(N, K+1)`` they are promised."""
        labels, found = self.program.labels(self.known.shares), []
        for some in self.prompts.pieces():
            answer = self.program.answer(some, labels)
            found.append((self.known.ends(answer, some.lengths.numpy(), probability), counted(answer.mean)))
        ends, promised = zip(*found, strict=True)
        return np.concatenate(ends, axis=1), np.concatenate(promised)

    def select(self, rows: Int[np.ndarray, " selected"]) -> ConformalIntervals:
        """Those of some prompts."""
        return replace(self, prompts=self.prompts.select(torch.from_numpy(rows)))

    @classmethod
    def concatenate(cls, parts: Sequence[ConformalIntervals | None]) -> ConformalIntervals | None:
        """Those of all prompts; ``None`` where a part has none, or one of another calibration."""
        given = [part for part in parts if part is not None]
        first = given[0] if given else None
        if first is None or len(given) < len(parts) or not all(part._same(first) for part in given):
            return None
        return replace(first, prompts=Prompts.concatenate([part.prompts for part in given]))

    def _same(self, other: ConformalIntervals) -> bool:
        """Whether they are of one calibration of one program."""
        return self.known.same(other.known) and self.program.fingerprint == other.program.fingerprint


def counted(mean: Float[np.ndarray, "prompt weight"]) -> Bool[np.ndarray, "prompt weight"]:
    """``(N, K+1)`` of which experts a posterior's intervals are promised anything: one of each prompt, at least."""
    return mean >= np.minimum(COUNTED, mean.max(1, keepdims=True))


def conformal_quantile(scores: Float[np.ndarray, " score"], probability: float) -> float:
    """The ⌈(n + 1) p⌉-th of n sorted scores, which one more is not above with probability at least p.

    Raises:
        ConfigError: a probability outside 0 to 1, or one that takes more scores.
    """
    count, fewest = len(scores), _fewest(probability)
    if count < fewest:
        raise ConfigError(f"expected {fewest} or more calibration prompts for {probability:g}, got {count}")
    return float(scores[math.ceil(round((count + 1) * probability, 9)) - 1])  # 20 · 0.9 may be 18.000000000000004


def _fewest(probability: float) -> int:
    """The scores that a probability takes.

    Raises:
        ConfigError: it is outside 0 to 1.
    """
    probability = fraction("a probability", probability)
    return math.ceil(round(probability / (1 - probability), 9))
