"""Whether a bundle's posterior can be trusted: calibration on simulations, and on held-out prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import log_loss

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.app.held_out import held_out_domains
from bayes_dispatch.arguments import fraction, set_whole, several, whole
from bayes_dispatch.checks.coverage import (
    Coverage,
    CoverageCurve,
    calibrated_coverage,
    coverage_curve,
    interval_coverage,
    simulated_coverage,
)
from bayes_dispatch.checks.detection import AUROC, ood_auroc
from bayes_dispatch.checks.reliability import (
    ReliabilityCurve,
    brier_score,
    expected_calibration_error,
    reliability_curve,
)
from bayes_dispatch.checks.sbc import SimulationBasedCalibration, simulation_based_calibration
from bayes_dispatch.checks.selective import Abstention, RiskCoverage, abstention_threshold, risk_coverage
from bayes_dispatch.dispatcher.conformal import COUNTED
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import FOREIGN_TEXTS, Domain
from bayes_dispatch.experts.domains.mixtures import LONGEST_CHARACTER, shortest_and_longest
from bayes_dispatch.inference.scoring.evidence_sets import foreign_evidence, mixed_evidence, pure_evidence
from bayes_dispatch.storage import finite

__all__ = ["Diagnosis", "DiagnosisSettings", "HeldOutDiagnosis", "diagnose"]

JUDGED = (0.5, 0.9)  # levels of intervals, by length


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings:
    """How much is measured, and at which risk.

    Attributes:
        simulations: prompts drawn from the fitted program, for ranks and for coverage.
        mixtures: held-out prompts of known mixture. mixture_lengths: their shortest and longest, in bytes.
        prompts: held-out prompts of each domain at each of ``lengths``, and foreign ones of each foreign domain.
        draws: posterior draws of each prompt. risk, delta: of the certified threshold. seed: of everything random.

    Raises:
        ConfigError: fewer than 20 prompts of a kind or 19 draws, no length, a length that is no whole number ≥ 4, or
            a risk or delta outside 0 to 1.
    """

    simulations: int = 1000
    mixtures: int = 1000
    mixture_lengths: tuple[int, int] = (16, 256)
    prompts: int = 100
    lengths: tuple[int, ...] = (32, 64, 128)
    draws: int = 255
    risk: float = 0.05
    delta: float = 0.1
    seed: int = 1

    def __post_init__(self) -> None:
        set_whole(self, simulations=20, mixtures=20, prompts=20, draws=19)
        for name in ("risk", "delta"):
            object.__setattr__(self, name, fraction(name, getattr(self, name)))
        given = several("lengths", self.lengths)
        object.__setattr__(self, "lengths", tuple(whole("each of lengths", each, LONGEST_CHARACTER) for each in given))
        object.__setattr__(self, "mixture_lengths", shortest_and_longest("mixture_lengths", self.mixture_lengths))
        if not self.lengths:
            raise ConfigError("expected at least one length of prompts, got none")


@dataclass(frozen=True, eq=False)
class HeldOutDiagnosis:
    """What held-out prompts of the experts' domains tell.

    Attributes:
        coverage, simulated: of intervals on held-out mixtures, and on simulations at the same weights.
        by_length: of intervals at 50 and 90% on the mixtures of a range of lengths in tokens: the posterior's, and the
            calibrated ones where the dispatcher has any.
        pure: accuracy, ECE, Brier score and log loss of ``predict_proba`` on held-out prompts of one domain, by length.
        reliability: of all of these. risk_coverage: of that half of them that did not choose the threshold.
        abstention: the certified threshold, chosen by the other half; ``None`` where none was certified.
        foreign: how well the weight of base tells foreign prompts from those of the experts' domains.
    """

    coverage: CoverageCurve
    simulated: CoverageCurve
    by_length: Mapping[str, Mapping[str, Coverage]]
    pure: Mapping[int, Mapping[str, float]]
    reliability: ReliabilityCurve
    risk_coverage: RiskCoverage
    abstention: Abstention | None
    foreign: AUROC

    @property
    def served(self) -> tuple[float, float] | None:
        """Share of the second half that the threshold serves, and share of these that is wrong."""
        if self.abstention is None:
            return None
        count = int((self.risk_coverage.confidence >= self.abstention.threshold).sum())
        return count / len(self.risk_coverage.risk), float(self.risk_coverage.risk[count - 1]) if count else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        parts = ("levels", "values", "standard_errors", "widths")
        both = (("found", self.coverage), ("simulated", self.simulated))
        curves = {name: {part: getattr(curve, part).tolist() for part in parts} for name, curve in both}
        return {
            "coverage": curves,
            "coverage_by_length": {
                length: {name: each._asdict() for name, each in row.items()} for length, row in self.by_length.items()
            },
            "pure": {str(length): dict(scores) for length, scores in self.pure.items()},
            "risk_coverage": {"aurc": self.risk_coverage.aurc, "excess_aurc": self.risk_coverage.excess_aurc},
            "abstention": None if self.abstention is None else asdict(self.abstention) | {"served_after": self.served},
            "foreign_auroc": asdict(self.foreign),
        }


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What was found.

    Attributes:
        settings: what was asked for.
        unjudged: experts of which there is no held-out text: they compete for the prompts of the others, and the
            simulations are of them too, but no prompt is theirs.
        ranks: simulation-based calibration: the posterior against the program that it is of.
        held_out: ``None`` where fewer than two experts have held-out text: then simulations alone were judged.
    """

    settings: DiagnosisSettings
    unjudged: tuple[str, ...]
    ranks: SimulationBasedCalibration
    held_out: HeldOutDiagnosis | None

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report, as JSON values; ``None`` for numbers that are NaN or infinite."""
        found = {
            "settings": asdict(self.settings),
            "unjudged": list(self.unjudged),
            "ranks": _verdicts(self.ranks),
        } | ({} if self.held_out is None else self.held_out.to_dict())
        return {name: finite(value) for name, value in found.items()}


def diagnose(
    bundle: Bundle,
    settings: DiagnosisSettings | None = None,
    progress: bool = False,
    own: Mapping[str, Domain] | None = None,
    packages: Path | None = None,
) -> Diagnosis:
    """Measure the calibration of a bundle's dispatcher on simulations and on held-out prompts of its experts' domains.

    Args:
        bundle: whose dispatcher it is. settings: how much to measure. progress: show progress bars.
        own: text of experts from a user's files, by their names; of others the project has its own. Experts without
            any are not judged, and with fewer than two that have some, simulations alone are.
        packages: where pip put those of real documents (docs/domains.md), for experts of these.

    Raises:
        UnknownNameError: text of an expert that the bundle does not have.
    """
    settings = settings or DiagnosisSettings()
    known, names = held_out_domains(bundle, own or {}, packages), bundle.experts.names
    dispatcher, seed = bundle.dispatcher, settings.seed
    return Diagnosis(
        settings,
        tuple(name for name in names if name not in known),
        simulation_based_calibration(dispatcher, settings.simulations, settings.draws, seed),
        _judge(bundle, settings, known, progress) if len(known) > 1 else None,
    )


def _judge(
    bundle: Bundle, settings: DiagnosisSettings, known: Mapping[str, Domain], progress: bool
) -> HeldOutDiagnosis:
    """On held-out prompts of these experts."""
    names = bundle.experts.names
    domains, places, count = list(known.values()), [names.index(name) for name in known], len(names)
    model, dispatcher, seed, cut = bundle.model, bundle.dispatcher, settings.seed, bundle.cut
    mixed = mixed_evidence(model, domains, settings.mixtures, settings.mixture_lengths, "held_out", seed, progress, cut)
    mixed = mixed.among(places, count)
    posterior = dispatcher.posterior(mixed.evidence, draws=settings.draws, seed=seed)
    coverage = coverage_curve(posterior, mixed.mixtures)
    simulated = simulated_coverage(
        dispatcher, mixed.mixtures, count=settings.simulations, draws=settings.draws, seed=seed
    )
    pure, probabilities, labels = {}, [], []
    for length in settings.lengths:
        found = pure_evidence(
            model, domains, settings.prompts, (length, length), "held_out", seed + length, progress, cut
        )
        found = found.among(places, count)
        of_length = dispatcher.predict_proba(found.evidence)
        pure[length] = _scores(of_length, found.labels)
        probabilities.append(of_length)
        labels.append(found.labels)
    joint, truth = np.concatenate(probabilities), np.concatenate(labels)
    confidence, wrong = joint.max(1), joint.argmax(1) != truth
    first = np.random.default_rng([seed, 4]).permutation(len(truth)) < len(truth) // 2
    foreign = foreign_evidence(
        model, FOREIGN_TEXTS, count, settings.prompts, (settings.lengths[-1], settings.lengths[-1]), seed, cut
    )
    base_weight = [
        dispatcher.posterior(evidence, draws=settings.draws, seed=seed).mean[:, -1]
        for evidence in (found.evidence, foreign.evidence)
    ]
    return HeldOutDiagnosis(
        coverage,
        simulated,
        _by_length(posterior, mixed.mixtures, mixed.evidence.known_lengths(), settings.lengths),
        pure,
        reliability_curve(joint, truth),
        risk_coverage(confidence[~first], wrong[~first]),
        abstention_threshold(confidence[first], wrong[first], settings.risk, settings.delta),
        ood_auroc(*base_weight),
    )


def _by_length(
    posterior: DispatchPosterior, truth: np.ndarray, lengths: np.ndarray, edges: Sequence[int]
) -> dict[str, dict[str, Coverage]]:
    """Coverage in each range of lengths, and in all, where there are components that the posterior counts."""
    ends = [1, *sorted(set(edges) - {1}), math.inf]
    ranges = {
        f"{low} to {high - 1}" if math.isfinite(high) else f"{low} and more": (lengths >= low) & (lengths < high)
        for low, high in pairwise(ends)
    } | {"all": lengths > 0}
    found = {}
    for name, chosen in ranges.items():
        some, known = posterior.select(np.flatnonzero(chosen)), truth[chosen]
        if (some.mean > COUNTED).any():
            found[name] = {f"posterior {level:.0%}": interval_coverage(some, known, level) for level in JUDGED}
            if some.calibrated is not None:
                found[name] |= {f"calibrated {p:.0%}": calibrated_coverage(some, known, p) for p in JUDGED}
    return found


def _verdicts(ranks: SimulationBasedCalibration) -> dict[str, Any]:
    components = [{"component": c.component, "inside": c.inside, "excess": c.excess} for c in ranks.components]
    return {"false_alarm_rate": ranks.false_alarm_rate, "passed": ranks.passed, "components": components}


def _scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    one_hot = np.eye(probabilities.shape[1])[labels]
    return {
        "accuracy": float((probabilities.argmax(1) == labels).mean()),
        "ECE": expected_calibration_error(probabilities, labels),
        "Brier": brier_score(probabilities, one_hot),
        "log loss": log_loss(labels, probabilities, labels=range(probabilities.shape[1])),
    }
