"""Whether the dispatcher's uncertainty can be trusted: plain functions on draws, probabilities and scores.

- Weight posteriors: :func:`simulation_based_calibration`, :func:`interval_coverage`, :func:`coverage_curve`.
- Class probabilities: :func:`brier_score`, :func:`log_score`, :func:`expected_calibration_error`,
  :func:`reliability_curve`, :func:`confidence_curve`.
- What to do with them: :func:`risk_coverage`, :func:`abstention_threshold`, :func:`ood_auroc`.
- Two systems on the same prompts: :func:`paired_comparison`.
"""

from bayes_dispatch.checks.coverage import (
    Coverage,
    CoverageCurve,
    attainable_coverage,
    attainable_coverage_curve,
    coverage_curve,
    interval_coverage,
)
from bayes_dispatch.checks.detection import AUROC, ood_auroc
from bayes_dispatch.checks.paired import PairedComparison, paired_comparison
from bayes_dispatch.checks.rank_bands import RankBand, rank_band
from bayes_dispatch.checks.reliability import (
    ReliabilityCurve,
    brier_score,
    confidence_curve,
    expected_calibration_error,
    log_score,
    reliability_curve,
)
from bayes_dispatch.checks.sbc import (
    RankUniformity,
    SimulationBasedCalibration,
    Simulator,
    posterior_ranks,
    rank_uniformity,
    simulation_based_calibration,
)
from bayes_dispatch.checks.selective import Abstention, RiskCoverage, abstention_threshold, risk_coverage

__all__ = [
    "simulation_based_calibration",
    "SimulationBasedCalibration",
    "Simulator",
    "posterior_ranks",
    "rank_uniformity",
    "RankUniformity",
    "rank_band",
    "RankBand",
    "interval_coverage",
    "attainable_coverage",
    "Coverage",
    "coverage_curve",
    "attainable_coverage_curve",
    "CoverageCurve",
    "brier_score",
    "log_score",
    "expected_calibration_error",
    "reliability_curve",
    "confidence_curve",
    "ReliabilityCurve",
    "risk_coverage",
    "RiskCoverage",
    "abstention_threshold",
    "Abstention",
    "ood_auroc",
    "AUROC",
    "paired_comparison",
    "PairedComparison",
]
