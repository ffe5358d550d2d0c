"""Is a prompt foreign to all experts? A conformal gate that sends such prompts to base, at a stated false-alarm rate.

**Score.** How badly the experts explain a prompt: minus the log predictive density of its evidence under the fitted
program without base. What base alone explains is foreign, and so is what nothing does. The density drifts with length,
so the score is a residual of its regression on the log length and its square, divided by that of its absolute residual.

**Guarantee.** The regressions are of a quarter of the held-out prompts, the ranks of the others. A prompt's p-value is
its rank among the calibration prompts of a group that fall into its bin of length, (1 + how many score at least as
high) / (1 + how many there are), and the largest of these over the groups. If the prompt is exchangeable with the
calibration prompts of any one group in its bin, P(p ≤ α) ≤ α, whatever the distribution and however few they are: split
conformal prediction by category (Vovk, Gammerman & Shafer 2005, *Algorithmic Learning in a Random World*, §4.5; as a
test for outliers: Bates et al. 2023, arXiv 2104.08279), and the largest of p-values is valid wherever one of them is.
That is an average over calibration sets: given one of n prompts, the rate of exchangeable prompts is distributed as
Beta(k, n + 1 − k) with k = ⌊α(n + 1)⌋, or below (Vovk 2012, arXiv 1209.2673). A prompt shorter than those
of calibration has nothing to be compared with: its p-value is 1. A longer one counts to the last bin, without a
guarantee.

>>> gate = Gate.calibrate(dispatcher, held_out)                                     # doctest: +SKIP
>>> decision = gate.decide(dispatcher, evidence, false_alarm_rate=0.05)             # doctest: +SKIP
>>> posterior = decision.to_base(posterior)                                         # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped

from bayes_dispatch.arguments import number, shown, whole
from bayes_dispatch.arguments import seed as a_seed
from bayes_dispatch.dispatcher.arrays import Frozen, as_numbers, on_simplex, short_repr
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence, as_evidence
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import BundleError, ConfigError, TensorError
from bayes_dispatch.storage import read_directory, write_directory

__all__ = ["Gate", "GateDecision"]

KIND = "gate"
VERSION = 3
FITTED = 4  # every fourth prompt is for the regressions
FEWEST_PROMPTS = 80  # that a gate is calibrated on
SHORTEST = 0.02  # quantile of calibrated lengths; fewer are odd ones, such as the rest of a line
PER_BIN = 60  # calibration prompts of each group, at least, where there are several bins
LENGTH = 64.0  # tokens, where the regressions have their intercepts
ARRAYS = ("shares", "location", "spread", "edges", "scores", "bins", "groups")
NEVER = 1e-300  # share of base, whose logarithm is finite


@dataclass(frozen=True, eq=False)
class GateDecision:
    """What the gate found of N prompts.

    Attributes:
        p_values: ``(N,)``, near 0 for foreign prompts.
        foreign: ``(N,)`` which prompts to send to base, or to abstain from: p ≤ ``false_alarm_rate``.
        false_alarm_rate: of prompts from the experts' domains, at most this share is sent to base.
    """

    p_values: np.ndarray
    foreign: np.ndarray
    false_alarm_rate: float
    __repr__ = short_repr

    def to_base(self, posterior: DispatchPosterior) -> DispatchPosterior:
        """The posterior with all draws of foreign prompts at the base vertex; the others' draws, and what is known of
        the evidence (``log_evidence``, ``calibrated``), stay.

        Raises:
            TensorError: a posterior of other prompts.
        """
        if len(posterior) != len(self.foreign):
            raise TensorError(f"expected a posterior of {len(self.foreign)} prompts, got one of {len(posterior)}")
        base = np.eye(len(posterior.experts))[-1]
        weights = np.where(self.foreign[:, None], base, posterior.weights)
        return replace(posterior, weights=weights)


@dataclass(frozen=True, eq=False)
class Gate(Frozen):
    """A calibrated gate; it belongs to one fitted dispatcher.

    Attributes:
        dispatcher: fingerprint of the dispatcher's fit.
        shares: ``(K+1,)`` prior mean of the experts' shares that prompts are scored under, but for base's: that of
            calibration, so that later feedback moves no score.
        location, spread: ``(3,)`` intercept, at 64 tokens, slope and curvature in the log length: of minus the log
            density, and of its absolute residual.
        edges: ``(B,)`` length where each of the B bins begins, in tokens, increasing; none where all are unknown.
        scores, bins, groups: ``(M,)`` of the calibration prompts; bin 0 is of unknown lengths, then 1 … B.
    """

    dispatcher: str
    shares: np.ndarray
    location: np.ndarray
    spread: np.ndarray
    edges: np.ndarray
    scores: np.ndarray
    bins: np.ndarray
    groups: np.ndarray
    __repr__ = short_repr

    @classmethod
    def calibrate(
        cls,
        dispatcher: Dispatcher,
        evidence: Evidence | Shaped[np.ndarray, "prompt feature"],
        groups: Int[np.ndarray, " prompt"] | Sequence[int] | None = None,
        bins: int = 8,
        seed: int = 0,
    ) -> Gate:
        """A gate from prompts of the experts' domains that the dispatcher was not fitted on.

        Args:
            dispatcher: fitted.
            evidence: of N ≥ 80 prompts, or an array ``(N, F)`` taken as their hidden view; with the views that prompts
                to come have: without one, scores are on another scale. The smallest rate that can be asked for is some
                ``bins · groups / N``.
            groups: ``(N,)`` integers ≥ 0: kinds of prompts, such as pure and mixed ones, for each of which the rate is
                to hold, whatever the kinds' shares among prompts to come; one group by default.
            bins: of length, at most: quantiles of the lengths, fewer where a group has too few prompts for them.
            seed: of the split into prompts for the regressions (a quarter) and for the ranks.

        Raises:
            NotFittedError: a dispatcher before ``fit``.
            EvidenceError, TensorError: evidence of other views, or groups of other prompts.
            ConfigError: fewer prompts, or fewer than four of a group, none of a group of known length where others have
                some, or fewer than one bin.
        """
        evidence = as_evidence(evidence)
        count = len(evidence)
        kinds = np.zeros(count, np.int64) if groups is None else as_numbers(groups, "groups", None)
        if kinds.shape != (count,) or not np.issubdtype(kinds.dtype, np.integer) or kinds.min(initial=0) < 0:
            raise TensorError(f"expected groups ≥ 0 of {count} prompts, got {kinds.dtype} of shape {kinds.shape}")
        bins, seed = whole("bins", bins, 1), a_seed(seed)
        if count < FEWEST_PROMPTS:
            raise ConfigError(f"expected at least {FEWEST_PROMPTS} prompts, got {count}")
        names, kinds, sizes = np.unique(kinds, return_inverse=True, return_counts=True)
        if sizes.min() < FITTED:
            smallest = names[sizes.argmin()]
            raise ConfigError(f"expected at least {FITTED} prompts of each group, got {sizes.min()} of {smallest}")
        dispatcher = copy(dispatcher)  # of this moment, whatever other threads fit
        shares = dispatcher.prior.mean
        unlikely, lengths = _unlikely(dispatcher, evidence, shares), evidence.known_lengths()
        fitted, order = np.zeros(count, bool), np.random.default_rng(seed).permutation(count)
        for kind in range(len(names)):  # of each its part: none is left without ranks
            own = order[kinds[order] == kind]
            fitted[own[: len(own) // FITTED]] = True
        location, spread = _regressions(unlikely[fitted], lengths[fitted])
        known, none = lengths[fitted & (lengths > 0)], np.zeros(0)
        empty = cls(dispatcher.fingerprint, shares, location, spread, none, none, kinds[:0], kinds[:0])
        gate = replace(empty, scores=empty._score(unlikely[~fitted], lengths[~fitted]), groups=kinds[~fitted])
        for most in range(min(bins, count // PER_BIN), 0, -1):
            starts = np.append(SHORTEST, np.arange(1, most) / most)
            gate = replace(gate, edges=np.unique(np.quantile(known, starts)) if len(known) else none)
            gate = replace(gate, bins=gate._bins(lengths[~fitted]))
            if gate.least_rate <= 1 / (1 + PER_BIN) or (most == 1 and gate.least_rate < 1):
                return gate
        unknown = names[[not (gate.bins[gate.groups == kind] > 0).any() for kind in range(len(names))]]
        raise ConfigError(f"expected prompts of known length in every group, got none in {unknown.tolist()}")

    @property
    def least_rate(self) -> float:
        """The smallest false-alarm rate at which prompts of every known length (or, where none is, of unknown length)
        can still be sent to base.
        """
        counts = np.zeros((len(self.edges) + 1, self.groups.max() + 1), np.int64)
        np.add.at(counts, (self.bins, self.groups), 1)
        rows = counts[1:] if (self.bins > 0).any() else counts[:1]
        return float(1 / (1 + rows.min()))

    @property
    def least_rate_shown(self) -> str:
        """:attr:`least_rate` in three digits, rounded up: a rate that can be asked for as it is read."""
        digits = 2 - math.floor(math.log10(self.least_rate))
        return f"{math.ceil(round(self.least_rate * 10**digits, 6)) / 10**digits:.3g}"

    def foreignness(
        self, dispatcher: Dispatcher, evidence: Evidence | Shaped[np.ndarray, "prompt feature"]
    ) -> Float[np.ndarray, " prompt"]:
        """``(N,)`` scores, comparable between lengths; more is more foreign.

        Raises:
            As :meth:`p_values`.
        """
        dispatcher = copy(dispatcher)  # of this moment, whatever other threads fit
        self.check_dispatcher(dispatcher)
        evidence = as_evidence(evidence)
        return self._score(_unlikely(dispatcher, evidence, self.shares), evidence.known_lengths())

    def p_values(
        self, dispatcher: Dispatcher, evidence: Evidence | Shaped[np.ndarray, "prompt feature"]
    ) -> Float[np.ndarray, " prompt"]:
        """``(N,)`` conformal p-values; a prompt's depends on its own evidence alone.

        Raises:
            ConfigError: another dispatcher than it was calibrated for.
            EvidenceError, TensorError: evidence of other views.
        """
        evidence = as_evidence(evidence)
        return self.ranked(self.foreignness(dispatcher, evidence), evidence.known_lengths())

    def ranked(
        self, scores: Float[np.ndarray, " prompt"], lengths: Float[np.ndarray, " prompt"]
    ) -> Float[np.ndarray, " prompt"]:
        """``(N,)`` conformal p-values of prompts of these scores of :meth:`foreignness`.

        Args:
            scores: ``(N,)``. lengths: ``(N,)`` tokens read, 0 where unknown.
        """
        places = self._bins(lengths)
        found = np.zeros(len(scores))
        for place in np.unique(places):
            here = places == place
            for group in range(self.groups.max() + 1):
                ranked = np.sort(self.scores[(self.bins == place) & (self.groups == group)])
                above = len(ranked) - np.searchsorted(ranked, scores[here], side="left")
                found[here] = np.maximum(found[here], (1 + above) / (1 + len(ranked)))
        return np.where((lengths > 0) & (lengths < self.edges.min(initial=np.inf)), 1.0, found)

    def decide(
        self,
        dispatcher: Dispatcher,
        evidence: Evidence | Shaped[np.ndarray, "prompt feature"],
        false_alarm_rate: float = 0.05,
    ) -> GateDecision:
        """Which prompts are foreign.

        Args:
            dispatcher: the one that it was calibrated for.
            evidence: of N prompts, or an array as above.
            false_alarm_rate: share of prompts of the experts' domains that may be sent to base.

        Returns:
            The decision. No prompt is foreign that there is nothing to compare with, and its p-value is 1: one shorter
            than those of calibration, of unknown length where these were all of known length, or the other way round.

        Raises:
            ConfigError: another dispatcher, or a rate outside ``least_rate`` to 1.
            EvidenceError, TensorError: evidence of other views.
        """
        self.check_rate(false_alarm_rate)
        found = self.p_values(dispatcher, evidence)
        return GateDecision(found, found <= false_alarm_rate, float(false_alarm_rate))

    def check_rate(self, false_alarm_rate: float) -> None:
        """Raise ``ConfigError`` unless the rate is one that so many prompts can guarantee."""
        if not self.least_rate <= number(false_alarm_rate) < 1:
            wanted = f"expected a false-alarm rate of at least {self.least_rate_shown} (for less, calibrate with more"
            raise ConfigError(f"{wanted} prompts) and below 1, got {shown(false_alarm_rate)}")

    def check_dispatcher(self, dispatcher: Dispatcher) -> None:
        """Refuse another dispatcher.

        Raises:
            ConfigError: it is another, or the same fitted again. NotFittedError: it is not fitted.
        """
        if (got := dispatcher.fingerprint) != self.dispatcher:
            raise ConfigError(
                f"expected the dispatcher {self.dispatcher[:12]}… that the gate was calibrated for, got {got[:12]}…: "
                "calibrate another for it, or leave the gate out"
            )

    def save(self, directory: str | Path) -> None:
        """Write ``gate.json`` and ``gate.safetensors`` into a directory, in the place of an earlier save.

        Raises:
            BundleError: the directory is a link, or holds anything else.
        """
        arrays = {name: getattr(self, name) for name in ARRAYS}
        write_directory(Path(directory), KIND, {"version": VERSION, "dispatcher": self.dispatcher}, arrays)

    @classmethod
    def load(cls, directory: str | Path) -> Gate:
        """Read a gate that :meth:`save` wrote.

        Raises:
            BundleError: a file is missing, truncated, edited, of another format, or holds no gate.
        """
        document, arrays = read_directory(Path(directory), KIND)
        if document.get("version") != VERSION:
            raise BundleError(f"expected a gate of version {VERSION} in {directory}, got {document.get('version')!r}")
        if set(arrays) != set(ARRAYS) or not isinstance(document.get("dispatcher"), str):
            raise BundleError(f"expected a dispatcher and the arrays {list(ARRAYS)} in {directory}, got {list(arrays)}")
        gate = cls(document["dispatcher"], **arrays)
        if reason := gate._fault():
            raise BundleError(f"expected a gate in {directory}, got {reason}")
        return gate

    def _score(
        self, unlikely: Float[np.ndarray, " prompt"], lengths: Float[np.ndarray, " prompt"]
    ) -> Float[np.ndarray, " prompt"]:
        design = _design(lengths)
        least = 0.1 * abs(self.spread[0]) + 1e-9  # far from calibrated lengths a curve may fall below 0
        return (unlikely - design @ self.location) / np.maximum(design @ self.spread, least)

    def _bins(self, lengths: Float[np.ndarray, " prompt"]) -> Int[np.ndarray, " prompt"]:
        """0 where the length is unknown, then 1 … B."""
        return np.where(lengths > 0, np.searchsorted(self.edges, lengths, side="right").clip(1), 0)

    def _fault(self) -> str | None:
        """What no calibration could have made."""
        integers = all(np.issubdtype(array.dtype, np.integer) for array in (self.bins, self.groups))
        if not integers or not len(self.scores) == len(self.bins) == len(self.groups) > 0:
            return "scores, bins and groups of different prompts"
        if self.location.shape != (3,) or self.spread.shape != (3,) or self.shares.ndim != 1 or self.edges.ndim != 1:
            return f"regressions of shapes {self.location.shape} and {self.spread.shape}, or shares or edges in rows"
        if not all(np.isfinite(getattr(self, name)).all() for name in ARRAYS) or not (np.diff(self.edges) > 0).all():
            return "numbers that are not finite, or edges that do not increase"
        if self.bins.min() < 0 or self.bins.max() > len(self.edges) or self.groups.min() < 0:
            return "bins or groups outside their ranges"
        return None


def _unlikely(
    dispatcher: Dispatcher, evidence: Evidence, shares: Float[np.ndarray, " weight"]
) -> Float[np.ndarray, " prompt"]:
    """``(N,)`` minus the log density, in nats, of evidence that base has no share in, under label shares ``(K+1,)``."""
    state = dispatcher.state
    of_experts = on_simplex(np.append(state.labels(shares)[:-1], NEVER))
    return -state.log_evidence(evidence, of_experts)


def _regressions(
    unlikely: Float[np.ndarray, " prompt"], lengths: Float[np.ndarray, " prompt"]
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Least squares, of the scores before calibration and then of their absolute residuals."""
    design = _design(lengths)
    location = np.linalg.lstsq(design, unlikely)[0]
    return location, np.linalg.lstsq(design, np.abs(unlikely - design @ location))[0]


def _design(lengths: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, "prompt 3"]:
    """Powers of the log length; unknown ones count as the reference length."""
    logs = np.log(np.where(lengths > 0, lengths, LENGTH) / LENGTH)
    return np.stack([np.ones(len(lengths)), logs, logs**2], axis=1)
