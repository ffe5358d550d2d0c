"""lm-polygraph's scores of generated answers and its prediction–rejection ratio, with scores of ours beside its own.

    pip install --no-deps lm-polygraph      # 0.7.0; its classes that are used here need transformers and Pillow

The package imports some thirty others, from openai to spacy. What is used here needs none of them: its modules are
loaded without the ``__init__`` of any package. Its ensemble estimators raise NotImplementedError; what they would make
of several models, ours read of the particles of one posterior.

Sources: Fadeeva et al. 2023, arXiv 2311.07383; the ratio: Malinin & Gales 2021, arXiv 2002.07650.
"""

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec, module_from_spec
from typing import Any

import numpy as np

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.two_pass.generation import Generation

__all__ = ["FIRST", "OURS", "estimators", "rejection_ratios", "statistics"]

FIRST = "MaximumSequenceProbability"
OURS: dict[str, tuple[tuple[str, ...], Callable[[np.ndarray], Any]]] = {
    "mutual information, summed": (("mutual_information",), np.sum),
    "mutual information, mean": (("mutual_information",), np.mean),
    "predictive entropy, summed": (("entropy",), np.sum),
    "entropy + mutual information, summed": (("entropy", "mutual_information"), np.sum),
    "surprise + mutual information, summed": (("surprise", "mutual_information"), np.sum),
}
"""Our scores: which statistics of each token are added, and what is made of an answer's tokens."""


def statistics(generation: Generation) -> dict[str, list[np.ndarray]]:
    """What estimators read, of each token of each answer, in nats: lm-polygraph's names, and ours."""
    numbers = {
        "greedy_log_likelihoods": generation.log_probabilities,
        "entropy": generation.predictive_entropy,
        "mutual_information": generation.mutual_information,
        "surprise": -generation.log_probabilities,
    }
    return {
        name: [own[:length] for own, length in zip(values, generation.lengths, strict=True)]
        for name, values in numbers.items()
    }


def estimators() -> list[Any]:
    """lm-polygraph's three, then ours; each is called with ``statistics`` and gives (N,), more is less sure.

    Raises:
        ConfigError: it is not installed, or what it needs.
    """
    _load()
    from lm_polygraph.estimators.estimator import Estimator
    from lm_polygraph.estimators.max_probability import MaximumSequenceProbability
    from lm_polygraph.estimators.perplexity import Perplexity
    from lm_polygraph.estimators.token_entropy import MeanTokenEntropy

    class OfTokens(Estimator):  # type: ignore[misc]
        """One of ``OURS``."""

        def __init__(self, name: str) -> None:
            self.name, (names, self.reduce) = name, OURS[name]
            super().__init__(list(names), "sequence")

        def __str__(self) -> str:
            return self.name

        def __call__(self, stats: Mapping[str, list[np.ndarray]]) -> np.ndarray:
            tokens = zip(*(stats[name] for name in self.stats_dependencies), strict=True)
            return np.array([self.reduce(np.sum(parts, axis=0)) for parts in tokens])

    return [MaximumSequenceProbability(), Perplexity(), MeanTokenEntropy(), *map(OfTokens, OURS)]


def rejection_ratios(uncertainty: Mapping[str, np.ndarray], right: np.ndarray) -> dict[str, float]:
    """The ratio (PRR) of each score, as lm-polygraph's ``UEManager`` reckons it: 1 for the best order, 0 for a random
    one, NaN where all answers are right, or none.

    Args:
        uncertainty: name → (N,), more is less sure. right: (N,) booleans.

    Raises:
        ConfigError: lm-polygraph is not installed, or what it needs.
    """
    _load()
    from lm_polygraph.ue_metrics.pred_rej_area import PredictionRejectionArea
    from lm_polygraph.ue_metrics.ue_metric import get_random_scores, normalize_metric

    target = np.asarray(right, dtype=float)
    if target.min() == target.max():
        return dict.fromkeys(uncertainty, float("nan"))
    area = PredictionRejectionArea()
    best, random = area(-target, target), get_random_scores(area, target)
    return {name: float(normalize_metric(area(own, target), best, random)) for name, own in uncertainty.items()}


def _load() -> None:
    """Make lm-polygraph's modules importable one by one."""
    missing = "expected lm-polygraph for prediction–rejection ratios (pip install --no-deps lm-polygraph), got none"
    for name in ("lm_polygraph", "lm_polygraph.utils", "lm_polygraph.estimators", "lm_polygraph.ue_metrics"):
        if name not in sys.modules:
            if (spec := find_spec(name)) is None:
                raise ConfigError(missing)
            sys.modules[name] = module_from_spec(spec)
    try:
        import lm_polygraph.utils.common  # noqa: F401  (it asks for transformers and Pillow)
    except ImportError as error:
        raise ConfigError(f"{missing}: {error}") from None
