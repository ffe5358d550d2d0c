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
    from bayes_dispatch.bundle import Bundle, load_bundle
    from bayes_dispatch.calibration import (
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
    from bayes_dispatch.dispatcher import Dispatcher
    from bayes_dispatch.distances import Agreement, agreement
    from bayes_dispatch.drift import DriftMonitor, drift_monitor, watch
    from bayes_dispatch.estimator import DispatcherClassifier
    from bayes_dispatch.evidence import Evidence
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.experts.bank_files import ExpertCheck, verify_bank
    from bayes_dispatch.experts.documents import Document
    from bayes_dispatch.experts.vectors import ExpertVector
    from bayes_dispatch.gate import Gate, GateDecision
    from bayes_dispatch.inference.answers import AnswerLikelihood
    from bayes_dispatch.inference.blends import (
        BestExpert,
        Blend,
        PosteriorMean,
        PosteriorPredictive,
        RefinedMean,
        ThompsonSample,
        TopK,
    )
    from bayes_dispatch.inference.chat import Chat
    from bayes_dispatch.inference.chat_state import Turn
    from bayes_dispatch.inference.compare import compare_blends, compare_systems
    from bayes_dispatch.inference.cost import Cost
    from bayes_dispatch.inference.few_shot import FewShotFit, FewShotProgram
    from bayes_dispatch.inference.few_shot_methods import (
        CrossEntropy,
        ImportanceSampling,
        SequentialMonteCarlo,
        VariationalInference,
    )
    from bayes_dispatch.inference.first_pass import FirstPass, first_pass
    from bayes_dispatch.inference.generation import Generation, Streamed
    from bayes_dispatch.inference.generator import TwoPassGenerator
    from bayes_dispatch.inference.layered import LayeredMean, LayeredPredictive
    from bayes_dispatch.inference.scores import Comparison, SystemComparison
    from bayes_dispatch.inference.strategies import (
        AskedExpert,
        AskedModel,
        Classified,
        Dispatched,
        FewShot,
        Given,
        Strategy,
    )
    from bayes_dispatch.model.adaptation import Adaptation
    from bayes_dispatch.model.cache import Cache
    from bayes_dispatch.model.config import (
        ClassifierConfig,
        FeatureExtractorConfig,
        LanguageModelConfig,
        MambaFormerConfig,
        Seq2SeqConfig,
    )
    from bayes_dispatch.model.heads import MambaFormerForFeatureExtraction, MambaFormerForSequenceClassification
    from bayes_dispatch.model.mambaformer import MambaFormer, MambaFormerForCausalLM
    from bayes_dispatch.model.seq2seq import MambaFormerForSeq2Seq
    from bayes_dispatch.model.tokenizer import ByteTokenizer
    from bayes_dispatch.online import PriorState, prior_state
    from bayes_dispatch.posterior import DispatchPosterior
    from bayes_dispatch.program import Admixture, OneLabelMixture
    from bayes_dispatch.program_comparison import ProgramComparison, compare_programs
    from bayes_dispatch.reference import ReferencePosterior, joint_posterior, reference_posterior

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
    "load_bundle": "bundle",
    "Bundle": "bundle",
    "first_pass": "inference.first_pass",
    "FirstPass": "inference.first_pass",
    "Evidence": "evidence",
    "Dispatcher": "dispatcher",
    "DispatcherClassifier": "estimator",
    "DispatchPosterior": "posterior",
    "simulation_based_calibration": "calibration",
    "SimulationBasedCalibration": "calibration",
    "Simulator": "calibration",
    "posterior_ranks": "calibration",
    "rank_uniformity": "calibration",
    "RankUniformity": "calibration",
    "rank_band": "calibration",
    "RankBand": "calibration",
    "interval_coverage": "calibration",
    "attainable_coverage": "calibration",
    "Coverage": "calibration",
    "coverage_curve": "calibration",
    "attainable_coverage_curve": "calibration",
    "CoverageCurve": "calibration",
    "brier_score": "calibration",
    "log_score": "calibration",
    "expected_calibration_error": "calibration",
    "reliability_curve": "calibration",
    "ReliabilityCurve": "calibration",
    "risk_coverage": "calibration",
    "RiskCoverage": "calibration",
    "abstention_threshold": "calibration",
    "Abstention": "calibration",
    "ood_auroc": "calibration",
    "AUROC": "calibration",
    "paired_comparison": "calibration",
    "PairedComparison": "calibration",
    "compare_programs": "program_comparison",
    "ProgramComparison": "program_comparison",
    "reference_posterior": "reference",
    "joint_posterior": "reference",
    "ReferencePosterior": "reference",
    "agreement": "distances",
    "Agreement": "distances",
    "TwoPassGenerator": "inference.generator",
    "Generation": "inference.generation",
    "Streamed": "inference.generation",
    "Chat": "inference.chat",
    "Turn": "inference.chat_state",
    "Cost": "inference.cost",
    "Blend": "inference.blends",
    "PosteriorMean": "inference.blends",
    "TopK": "inference.blends",
    "BestExpert": "inference.blends",
    "ThompsonSample": "inference.blends",
    "PosteriorPredictive": "inference.blends",
    "RefinedMean": "inference.blends",
    "compare_blends": "inference.compare",
    "Comparison": "inference.scores",
    "compare_systems": "inference.compare",
    "SystemComparison": "inference.scores",
    "FewShotProgram": "inference.few_shot",
    "FewShotFit": "inference.few_shot",
    "LayeredMean": "inference.layered",
    "LayeredPredictive": "inference.layered",
    "AnswerLikelihood": "inference.answers",
    "SequentialMonteCarlo": "inference.few_shot_methods",
    "ImportanceSampling": "inference.few_shot_methods",
    "VariationalInference": "inference.few_shot_methods",
    "CrossEntropy": "inference.few_shot_methods",
    "Strategy": "inference.strategies",
    "Dispatched": "inference.strategies",
    "AskedModel": "inference.strategies",
    "AskedExpert": "inference.strategies",
    "Classified": "inference.strategies",
    "FewShot": "inference.strategies",
    "Given": "inference.strategies",
    "Document": "experts.documents",
    "ExpertBank": "experts.bank",
    "ExpertCheck": "experts.bank_files",
    "verify_bank": "experts.bank_files",
    "ExpertVector": "experts.vectors",
    "MambaFormerConfig": "model.config",
    "LanguageModelConfig": "model.config",
    "ClassifierConfig": "model.config",
    "FeatureExtractorConfig": "model.config",
    "Seq2SeqConfig": "model.config",
    "MambaFormer": "model.mambaformer",
    "MambaFormerForCausalLM": "model.mambaformer",
    "MambaFormerForSequenceClassification": "model.heads",
    "MambaFormerForFeatureExtraction": "model.heads",
    "MambaFormerForSeq2Seq": "model.seq2seq",
    "Adaptation": "model.adaptation",
    "Cache": "model.cache",
    "ByteTokenizer": "model.tokenizer",
    "Admixture": "program",
    "OneLabelMixture": "program",
    "PriorState": "online",
    "prior_state": "online",
    "DriftMonitor": "drift",
    "drift_monitor": "drift",
    "watch": "drift",
    "Gate": "gate",
    "GateDecision": "gate",
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
