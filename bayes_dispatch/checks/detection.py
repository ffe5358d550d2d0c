"""How well a score tells prompts from outside the experts' domains apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from bayes_dispatch.dispatcher.arrays import as_values
from bayes_dispatch.errors import TensorError

__all__ = ["AUROC", "ood_auroc"]


@dataclass(frozen=True)
class AUROC:
    """Area under the ROC curve.

    Attributes:
        value: probability that an outside prompt scores above an inside one, ties by half.
        standard_error: DeLong's.
        inside, outside: prompts of each kind.
    """

    value: float
    standard_error: float
    inside: int
    outside: int


def ood_auroc(inside: Float[np.ndarray, " inside"], outside: Float[np.ndarray, " outside"]) -> AUROC:
    """AUROC of a score for "out of domain", with the standard error of DeLong, DeLong & Clarke-Pearson (1988).

    Args:
        inside: scores of prompts from the experts' domains.
        outside: scores of prompts from elsewhere, more is more foreign: E[w_base], the entropy of the mean, or
            1 − confidence.

    Returns:
        The area. Its standard error is 0 where the scores separate the prompts completely.

    Raises:
        TensorError: fewer than two prompts of a kind, or scores that are not finite.
    """
    from sklearn.metrics import roc_auc_score  # heavy, and used here alone

    negative, positive = as_values(inside, "inside scores"), as_values(outside, "outside scores")
    if min(len(negative), len(positive)) < 2:
        raise TensorError(f"expected at least 2 prompts of each kind, got {len(negative)} and {len(positive)}")
    scores = np.concatenate([negative, positive])
    value = roc_auc_score(np.repeat([0, 1], [len(negative), len(positive)]), scores)
    ranks = rankdata(scores)
    # For each prompt, the share of the other kind on its right side; midranks count ties by half (Sun & Xu 2014).
    above = 1 - (ranks[: len(negative)] - rankdata(negative)) / len(positive)
    below = (ranks[len(negative) :] - rankdata(positive)) / len(negative)
    variance = above.var(ddof=1) / len(negative) + below.var(ddof=1) / len(positive)
    return AUROC(float(value), float(np.sqrt(variance)), len(negative), len(positive))
