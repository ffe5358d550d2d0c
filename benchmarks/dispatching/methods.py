"""Methods that give shares of the experts: the dispatcher, and the ELBO-trained guide of the same program."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from dispatching.elbo_guide import ELBOGuide

__all__ = ["ELBO", "Answer", "Method", "Ours"]

PROPOSALS = 96  # for k-hat


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method says of N prompts.

    Attributes:
        shares: ``(N, K+1)`` expected shares, base last. best: ``(N, K+1)`` probability to have the largest.
        foreign: ``(N,)`` how foreign a prompt seems, by its share of base or its largest probability.
        surprise: ``(N,)`` −log density of the evidence; ``None`` where a method has none.
        posterior: draws of the shares; ``None`` for a point. k_hat: ``(N,)`` of importance weights.
    """

    shares: np.ndarray
    best: np.ndarray
    foreign: np.ndarray
    surprise: np.ndarray | None = None
    posterior: DispatchPosterior | None = None
    k_hat: np.ndarray | None = None


class Method(Protocol):
    """Anything that answers for prompts."""

    def __call__(self, evidence: Evidence) -> Answer:
        """The answer for N prompts."""


@dataclass(frozen=True, eq=False)
class Ours:
    """The dispatcher; where ``resample``, its draws are corrected by importance sampling."""

    dispatcher: Dispatcher
    resample: bool
    draws: int = 256

    def __call__(self, evidence: Evidence) -> Answer:
        posterior = self.dispatcher.posterior(evidence, self.draws, seed=1, resample=self.resample)
        if self.resample:
            assert posterior.log_evidence is not None
            smooth = (self.draws * posterior.probability_best + 0.5) / (self.draws + 0.5 * posterior.weights.shape[2])
            base = posterior.mean[:, -1]
            return Answer(posterior.mean, smooth, base, -posterior.log_evidence, posterior, posterior.k_hat)
        best, k_hat = self.dispatcher.predict_proba(evidence), self.dispatcher.weigh(evidence, PROPOSALS, 1).k_hat
        return Answer(posterior.mean, best, posterior.mean[:, -1], None, posterior, k_hat)


@dataclass(frozen=True, eq=False)
class ELBO:
    """The ELBO-trained guide of the same program."""

    guide: ELBOGuide
    draws: int = 256

    def __call__(self, evidence: Evidence) -> Answer:
        posterior = self.guide.posterior(evidence, self.draws, seed=1)
        k_hat = self.guide.weigh(evidence, PROPOSALS, 1).k_hat
        best = self.guide.predict_proba(evidence)
        return Answer(posterior.mean, best, posterior.mean[:, -1], None, posterior, k_hat)
