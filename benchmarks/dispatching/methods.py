"""Methods that give shares of the experts: the dispatcher, and whatever else answers as it does."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.posterior import DispatchPosterior

__all__ = ["Answer", "Method", "Ours"]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method says of N prompts.

    Attributes:
        shares: ``(N, K+1)`` expected shares, base last. best: ``(N, K+1)`` probability to have the largest.
        foreign: ``(N,)`` how foreign a prompt seems, by its share of base or its largest probability.
        surprise: ``(N,)`` −log density of the evidence; ``None`` where a method has none.
        posterior: draws of the shares; ``None`` for a point.
    """

    shares: np.ndarray
    best: np.ndarray
    foreign: np.ndarray
    surprise: np.ndarray | None = None
    posterior: DispatchPosterior | None = None


class Method(Protocol):
    """Anything that answers for prompts."""

    def __call__(self, evidence: Evidence) -> Answer:
        """The answer for N prompts."""


@dataclass(frozen=True, eq=False)
class Ours:
    """The dispatcher."""

    dispatcher: Dispatcher
    draws: int = 256

    def __call__(self, evidence: Evidence) -> Answer:
        posterior = self.dispatcher.posterior(evidence, self.draws, seed=1)
        best, density = self.dispatcher.predict_proba(evidence), posterior.log_evidence
        assert density is not None
        return Answer(posterior.mean, best, posterior.mean[:, -1], -density, posterior)
