"""The exact posterior of the one-label program: a probability for each expert, averaged over draws of the globals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy.special import logsumexp
from torch import Tensor

from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts

__all__ = ["LabelProbabilities", "label_probabilities"]


@dataclass(frozen=True, eq=False)
class LabelProbabilities:
    """Probabilities of N prompts' labels, with the methods of :class:`DirichletMixtures`.

    Args:
        mean: ``(N, K+1)`` probabilities, which are the mean of one-hot weights too.
        log_evidence: ``(N,)`` log density of the evidence, nats.
    """

    mean: np.ndarray
    log_evidence: np.ndarray

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, draws: int, keys: Shaped[np.ndarray, " prompt"]) -> Float[np.ndarray, "draw prompt weight"]:
        """``(S, N, K+1)`` one-hot draws; those of a prompt depend on its own key only."""
        edges = self.mean.cumsum(1)[:, :-1]
        uniform = np.stack([np.random.default_rng(int(key)).random(draws) for key in keys])  # (N, S)
        chosen = (uniform[..., None] >= edges[:, None]).sum(-1)
        return np.eye(self.mean.shape[1])[chosen.T]

    def probability_best(self) -> Float[np.ndarray, "prompt weight"]:
        """``(N, K+1)`` the probabilities themselves."""
        return self.mean


def label_probabilities(
    model: DispatchModel,
    sites: Sequence[Mapping[str, Tensor]],
    prompts: Prompts,
    shares: Float[np.ndarray, " weight"],
    temper: float,
) -> LabelProbabilities:
    """Posterior of N prompts' labels under ``pi`` = ``shares (K+1,)`` and G equally likely draws of the globals."""
    vertices = torch.eye(model.n_experts + 1, dtype=torch.float64).unsqueeze(1)  # (K+1, 1, K+1)
    prior = torch.from_numpy(np.log(model.label_shares(shares))).unsqueeze(-1)  # (K+1, 1)
    joint = []
    for each in sites:
        double = {name: value.double() for name, value in each.items()}
        parts = model.log_likelihood(double, vertices, prompts, temper)
        joint.append(prior + torch.stack(list(parts.values())).sum(0))  # (K+1, N)
    logs = logsumexp(torch.stack(joint).numpy(), axis=0) - np.log(len(sites))
    evidence = logsumexp(logs, axis=0)
    return LabelProbabilities(np.exp(logs - evidence).T, evidence)
