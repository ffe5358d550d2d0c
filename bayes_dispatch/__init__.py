"""bayes-dispatch: a language model that adapts itself to each prompt, and knows how sure it is about it.

The public names are loaded when they are first used (PEP 562), so that ``import bayes_dispatch`` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from bayes_dispatch.errors import (
    BayesDispatchError,
    BundleError,
    CacheFullError,
    ConfigError,
    EvidenceError,
    ForeignExpertError,
    LabelError,
    MissingDependencyError,
    NotFittedError,
    PromptError,
    RewardError,
    StaleCacheError,
    TensorError,
    UnknownNameError,
)

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle, load_bundle
    from bayes_dispatch.checks.calibration import (
        AUROC,
        Abstention,
        Coverage,
        CoverageCurve,
        PairedComparison,
        RankBand,
        RankUniformity,
        ReliabilityCurve,
        RiskCoverage,
        SimulationBasedCalibration,
        Simulator,
        abstention_threshold,
        attainable_coverage,
        attainable_coverage_curve,
        brier_score,
        coverage_curve,
        expected_calibration_error,
        interval_coverage,
        log_score,
        ood_auroc,
        paired_comparison,
        posterior_ranks,
        rank_band,
        rank_uniformity,
        reliability_curve,
        risk_coverage,
        simulation_based_calibration,
    )
    from bayes_dispatch.checks.distances import Agreement, agreement
    from bayes_dispatch.checks.program_comparison import ProgramComparison, compare_programs
    from bayes_dispatch.checks.reference import ReferencePosterior, joint_posterior, reference_posterior
    from bayes_dispatch.dispatcher.classifier import DispatcherClassifier
    from bayes_dispatch.dispatcher.drift import DriftMonitor, drift_monitor, watch
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from bayes_dispatch.dispatcher.evidence.evidence import Evidence
    from bayes_dispatch.dispatcher.gate import Gate, GateDecision
    from bayes_dispatch.dispatcher.posterior import DispatchPosterior
    from bayes_dispatch.dispatcher.prior.online import PriorState, prior_state
    from bayes_dispatch.dispatcher.program.settings import Admixture, OneLabelMixture
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.bank_files import ExpertCheck, verify_bank
    from bayes_dispatch.experts.documents import Document
    from bayes_dispatch.experts.vectors import ExpertVector
    from bayes_dispatch.inference.chat.chat import Chat
    from bayes_dispatch.inference.chat.state import Turn
    from bayes_dispatch.inference.few_shot.answers import AnswerLikelihood
    from bayes_dispatch.inference.few_shot.layered import LayeredMean, LayeredPredictive
    from bayes_dispatch.inference.few_shot.methods import (
        CrossEntropy,
        ImportanceSampling,
        SequentialMonteCarlo,
        VariationalInference,
    )
    from bayes_dispatch.inference.few_shot.program import FewShotFit, FewShotProgram
    from bayes_dispatch.inference.few_shot.strategies import (
        AskedExpert,
        AskedModel,
        Classified,
        Dispatched,
        FewShot,
        Given,
        Strategy,
    )
    from bayes_dispatch.inference.generator import TwoPassGenerator
    from bayes_dispatch.inference.scoring.compare import compare_blends, compare_systems
    from bayes_dispatch.inference.scoring.scores import Comparison, SystemComparison
    from bayes_dispatch.inference.two_pass.blends import (
        BestExpert,
        Blend,
        PosteriorMean,
        PosteriorPredictive,
        RefinedMean,
        ThompsonSample,
        TopK,
    )
    from bayes_dispatch.inference.two_pass.cost import Cost
    from bayes_dispatch.inference.two_pass.first_pass import FirstPass, first_pass
    from bayes_dispatch.inference.two_pass.generation import Generation, Streamed
    from bayes_dispatch.model.adaptation import Adaptation
    from bayes_dispatch.model.heads import MambaFormerForFeatureExtraction, MambaFormerForSequenceClassification
    from bayes_dispatch.model.mambaformer.cache import Cache
    from bayes_dispatch.model.mambaformer.config import (
        ClassifierConfig,
        FeatureExtractorConfig,
        LanguageModelConfig,
        MambaFormerConfig,
        Seq2SeqConfig,
    )
    from bayes_dispatch.model.mambaformer.network import MambaFormer, MambaFormerForCausalLM
    from bayes_dispatch.model.seq2seq.model import MambaFormerForSeq2Seq
    from bayes_dispatch.model.tokenizer import ByteTokenizer

__version__ = "0.1.0"

__all__ = [
    "load_bundle",
    "Bundle",
    "first_pass",
    "FirstPass",
    "Evidence",
    "Dispatcher",
    "DispatcherClassifier",
    "DispatchPosterior",
    "Admixture",
    "OneLabelMixture",
    "PriorState",
    "prior_state",
    "DriftMonitor",
    "drift_monitor",
    "watch",
    "Gate",
    "GateDecision",
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
    "ReliabilityCurve",
    "risk_coverage",
    "RiskCoverage",
    "abstention_threshold",
    "Abstention",
    "ood_auroc",
    "AUROC",
    "paired_comparison",
    "PairedComparison",
    "compare_programs",
    "ProgramComparison",
    "reference_posterior",
    "joint_posterior",
    "ReferencePosterior",
    "agreement",
    "Agreement",
    "TwoPassGenerator",
    "Generation",
    "Streamed",
    "Chat",
    "Turn",
    "Cost",
    "Blend",
    "PosteriorMean",
    "TopK",
    "BestExpert",
    "ThompsonSample",
    "PosteriorPredictive",
    "RefinedMean",
    "compare_blends",
    "Comparison",
    "compare_systems",
    "SystemComparison",
    "FewShotProgram",
    "FewShotFit",
    "LayeredMean",
    "LayeredPredictive",
    "AnswerLikelihood",
    "SequentialMonteCarlo",
    "ImportanceSampling",
    "VariationalInference",
    "CrossEntropy",
    "Strategy",
    "Dispatched",
    "AskedModel",
    "AskedExpert",
    "Classified",
    "FewShot",
    "Given",
    "Document",
    "ExpertBank",
    "ExpertCheck",
    "ExpertVector",
    "verify_bank",
    "MambaFormerConfig",
    "LanguageModelConfig",
    "ClassifierConfig",
    "FeatureExtractorConfig",
    "Seq2SeqConfig",
    "MambaFormer",
    "MambaFormerForCausalLM",
    "MambaFormerForSequenceClassification",
    "MambaFormerForFeatureExtraction",
    "MambaFormerForSeq2Seq",
    "Adaptation",
    "Cache",
    "ByteTokenizer",
    "BayesDispatchError",
    "BundleError",
    "CacheFullError",
    "ConfigError",
    "EvidenceError",
    "ForeignExpertError",
    "LabelError",
    "MissingDependencyError",
    "NotFittedError",
    "PromptError",
    "RewardError",
    "StaleCacheError",
    "TensorError",
    "UnknownNameError",
]

_MODULE_OF = {
    "load_bundle": "app.bundle",
    "Bundle": "app.bundle",
    "first_pass": "inference.two_pass.first_pass",
    "FirstPass": "inference.two_pass.first_pass",
    "Evidence": "dispatcher.evidence.evidence",
    "Dispatcher": "dispatcher.estimator",
    "DispatcherClassifier": "dispatcher.classifier",
    "DispatchPosterior": "dispatcher.posterior",
    "simulation_based_calibration": "checks.calibration",
    "SimulationBasedCalibration": "checks.calibration",
    "Simulator": "checks.calibration",
    "posterior_ranks": "checks.calibration",
    "rank_uniformity": "checks.calibration",
    "RankUniformity": "checks.calibration",
    "rank_band": "checks.calibration",
    "RankBand": "checks.calibration",
    "interval_coverage": "checks.calibration",
    "attainable_coverage": "checks.calibration",
    "Coverage": "checks.calibration",
    "coverage_curve": "checks.calibration",
    "attainable_coverage_curve": "checks.calibration",
    "CoverageCurve": "checks.calibration",
    "brier_score": "checks.calibration",
    "log_score": "checks.calibration",
    "expected_calibration_error": "checks.calibration",
    "reliability_curve": "checks.calibration",
    "ReliabilityCurve": "checks.calibration",
    "risk_coverage": "checks.calibration",
    "RiskCoverage": "checks.calibration",
    "abstention_threshold": "checks.calibration",
    "Abstention": "checks.calibration",
    "ood_auroc": "checks.calibration",
    "AUROC": "checks.calibration",
    "paired_comparison": "checks.calibration",
    "PairedComparison": "checks.calibration",
    "compare_programs": "checks.program_comparison",
    "ProgramComparison": "checks.program_comparison",
    "reference_posterior": "checks.reference",
    "joint_posterior": "checks.reference",
    "ReferencePosterior": "checks.reference",
    "agreement": "checks.distances",
    "Agreement": "checks.distances",
    "TwoPassGenerator": "inference.generator",
    "Generation": "inference.two_pass.generation",
    "Streamed": "inference.two_pass.generation",
    "Chat": "inference.chat.chat",
    "Turn": "inference.chat.state",
    "Cost": "inference.two_pass.cost",
    "Blend": "inference.two_pass.blends",
    "PosteriorMean": "inference.two_pass.blends",
    "TopK": "inference.two_pass.blends",
    "BestExpert": "inference.two_pass.blends",
    "ThompsonSample": "inference.two_pass.blends",
    "PosteriorPredictive": "inference.two_pass.blends",
    "RefinedMean": "inference.two_pass.blends",
    "compare_blends": "inference.scoring.compare",
    "Comparison": "inference.scoring.scores",
    "compare_systems": "inference.scoring.compare",
    "SystemComparison": "inference.scoring.scores",
    "FewShotProgram": "inference.few_shot.program",
    "FewShotFit": "inference.few_shot.program",
    "LayeredMean": "inference.few_shot.layered",
    "LayeredPredictive": "inference.few_shot.layered",
    "AnswerLikelihood": "inference.few_shot.answers",
    "SequentialMonteCarlo": "inference.few_shot.methods",
    "ImportanceSampling": "inference.few_shot.methods",
    "VariationalInference": "inference.few_shot.methods",
    "CrossEntropy": "inference.few_shot.methods",
    "Strategy": "inference.few_shot.strategies",
    "Dispatched": "inference.few_shot.strategies",
    "AskedModel": "inference.few_shot.strategies",
    "AskedExpert": "inference.few_shot.strategies",
    "Classified": "inference.few_shot.strategies",
    "FewShot": "inference.few_shot.strategies",
    "Given": "inference.few_shot.strategies",
    "Document": "experts.documents",
    "ExpertBank": "experts.bank",
    "ExpertCheck": "experts.bank_files",
    "verify_bank": "experts.bank_files",
    "ExpertVector": "experts.vectors",
    "MambaFormerConfig": "model.mambaformer.config",
    "LanguageModelConfig": "model.mambaformer.config",
    "ClassifierConfig": "model.mambaformer.config",
    "FeatureExtractorConfig": "model.mambaformer.config",
    "Seq2SeqConfig": "model.mambaformer.config",
    "MambaFormer": "model.mambaformer.network",
    "MambaFormerForCausalLM": "model.mambaformer.network",
    "MambaFormerForSequenceClassification": "model.heads",
    "MambaFormerForFeatureExtraction": "model.heads",
    "MambaFormerForSeq2Seq": "model.seq2seq.model",
    "Adaptation": "model.adaptation",
    "Cache": "model.mambaformer.cache",
    "ByteTokenizer": "model.tokenizer",
    "Admixture": "dispatcher.program.settings",
    "OneLabelMixture": "dispatcher.program.settings",
    "PriorState": "dispatcher.prior.online",
    "prior_state": "dispatcher.prior.online",
    "DriftMonitor": "dispatcher.drift",
    "drift_monitor": "dispatcher.drift",
    "watch": "dispatcher.drift",
    "Gate": "dispatcher.gate",
    "GateDecision": "dispatcher.gate",
}

if not TYPE_CHECKING:  # a type checker would take any name for a public one

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
