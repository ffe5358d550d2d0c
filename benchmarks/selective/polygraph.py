"""lm-polygraph's scores of generated answers and its prediction–rejection ratio, with scores of ours beside its own.

    pip install --no-deps lm-polygraph sacrebleu lxml portalocker tabulate regex colorama    # 0.7.0, 2.6.0

lm-polygraph imports some thirty packages, from openai to spacy. What is used here needs transformers and Pillow alone:
its modules are loaded without the ``__init__`` of any package. Its ensemble estimators raise NotImplementedError; what
they would make of several models, ours read of the particles of one posterior.

Sources: Fadeeva et al. 2023, arXiv 2311.07383; the ratio: Malinin & Gales 2021, arXiv 2002.07650; chrF: Popović 2015.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec, module_from_spec
from typing import Any, NamedTuple

import numpy as np

from bayes_dispatch.errors import ConfigError

__all__ = ["BOTH", "FIRST", "OURS", "Score", "chrf", "estimators", "rejection_ratios", "statistics"]

FIRST = "MaximumSequenceProbability"


class Score(NamedTuple):
    """Of an answer: ``of`` of each token, and ``weight`` times its mutual information; summed, or their mean."""

    of: str
    weight: float
    mean: bool

    def __str__(self) -> str:
        with_information = f" + {self.weight:g} × mutual information" if self.weight else ""
        return f"{self.of.replace('_', ' ')}{with_information}, {'mean' if self.mean else 'summed'}"


OURS = {
    str(score): score
    for score in (Score(of, 0, mean) for of in ("mutual_information", "entropy") for mean in (False, True))
    if str(score) != "entropy, mean"  # lm-polygraph's
}
"""Our scores of one statistic."""
BOTH = {
    str(score): score
    for score in (
        Score(of, weight, mean)
        for of in ("entropy", "surprise")
        for weight in (0.5, 1, 2, 4, 8)
        for mean in (False, True)
    )
}
"""Combinations: one of them is chosen, on other answers than those that it ranks."""


def statistics(tokens: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """What estimators read, of each token of each answer, in nats: lm-polygraph's names, and ours.

    Args:
        tokens: of each answer (T, 3): log-probabilities, entropies, mutual information.
    """
    logs, entropy, information = ([own[:, k] for own in tokens] for k in range(3))
    surprise = [-own for own in logs]
    return {
        "greedy_log_likelihoods": logs,
        "entropy": entropy,
        "mutual_information": information,
        "surprise": surprise,
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
        """One of ``OURS`` or ``BOTH``."""

        def __init__(self, score: Score) -> None:
            self.score = score
            super().__init__([score.of, "mutual_information"], "sequence")

        def __str__(self) -> str:
            return str(self.score)

        def __call__(self, stats: Mapping[str, list[np.ndarray]]) -> np.ndarray:
            tokens = zip(*(stats[name] for name in self.stats_dependencies), strict=True)
            reduce = np.mean if self.score.mean else np.sum
            return np.array([reduce(own + self.score.weight * information) for own, information in tokens])

    ours = map(OfTokens, (*OURS.values(), *BOTH.values()))
    return [MaximumSequenceProbability(), Perplexity(), MeanTokenEntropy(), *ours]


def rejection_ratios(uncertainty: Sequence[np.ndarray], quality: np.ndarray) -> np.ndarray:
    """The ratio (PRR) of each of S scores, as lm-polygraph's ``UEManager`` reckons it: 1 for the best order, 0 for a
    random one, NaN where all answers are as good.

    Args:
        uncertainty: S times (N,), more is less sure. quality: (N,) of the answers, 0 … 1.

    Raises:
        ConfigError: lm-polygraph is not installed, or what it needs.
    """
    _load()
    from lm_polygraph.ue_metrics.pred_rej_area import PredictionRejectionArea
    from lm_polygraph.ue_metrics.ue_metric import get_random_scores, normalize_metric

    if quality.min() == quality.max():
        return np.full(len(uncertainty), np.nan)
    area = PredictionRejectionArea()
    best, random = area(-quality, quality), get_random_scores(area, quality)
    return np.array([normalize_metric(area(own, quality), best, random) for own in uncertainty])


def chrf(answer: str, expected: str) -> float:
    """How much of an expected text's character n-grams a text has, and the reverse: 0 … 1, by sacrebleu's defaults."""
    from sacrebleu import sentence_chrf

    return float(sentence_chrf(answer.strip(), [expected.strip()]).score) / 100


def _load() -> None:
    """Make lm-polygraph's modules importable one by one."""
    missing = "expected lm-polygraph and sacrebleu for prediction–rejection ratios (selective/polygraph.py), got none"
    for name in ("lm_polygraph", "lm_polygraph.utils", "lm_polygraph.estimators", "lm_polygraph.ue_metrics"):
        if name not in sys.modules:
            if (spec := find_spec(name)) is None:
                raise ConfigError(missing)
            sys.modules[name] = module_from_spec(spec)
    try:
        import lm_polygraph.utils.common  # noqa: F401  (it asks for transformers and Pillow)
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{missing}: {error}") from None
