"""Running the particles of a blend, and filtering their weights by the tokens read (DESIGN §8).

Particle s has weight ``v_s``; a token multiplies it by that particle's probability of the token, and then a fixed share
goes back to the prior (Herbster and Warmuth 1998), so that a document may change its domain. Particles stay where they
are, so their caches stay valid; only weights move.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.blends import Particles
from bayes_dispatch.model.backbone import Backbone

__all__ = ["CachedReader", "ParticleFilter", "Predictive", "Reader", "UncachedReader", "predictive"]


class ParticleFilter:
    """Joint posterior of particle and switching rate for each of N prompts, given the tokens read."""

    def __init__(self, particles: Particles) -> None:
        mass = torch.from_numpy(particles.mass).double()
        target = (1 - particles.flat) * mass + particles.flat / mass.shape[1]
        rates = torch.tensor(particles.switching, dtype=torch.double)
        self._log_target = target.log()[:, None]  # (N, 1, S)
        self._log_stay, self._log_switch = (-rates).log1p()[:, None], rates.log()[:, None]  # (E, 1)
        self._joint = (self._log_target - np.log(len(rates))).repeat(1, len(rates), 1)  # (N, E, S)

    @property
    def log_weights(self) -> Float[Tensor, "N S"]:
        """Log posterior probabilities of the particles."""
        return self._joint.logsumexp(1)

    @property
    def log_rates(self) -> Float[Tensor, "N E"]:
        """Log posterior probabilities of the switching rates."""
        return self._joint.logsumexp(2)

    def update(self, log_likelihood: Float[Tensor, "N S"], read: Bool[Tensor, " N"] | None = None) -> None:
        """Count one token: its log-probability under each particle.

        Args:
            log_likelihood: (N, S). read: (N,), false for prompts that have no token here; their weights stay.
        """
        joint = self._joint + log_likelihood.double()[:, None]
        joint = joint - joint.logsumexp((1, 2), keepdim=True)
        of_rate = joint.logsumexp(2, keepdim=True)  # (N, E, 1): a switch changes the particle, not the rate
        joint = torch.logaddexp(joint + self._log_stay, of_rate + self._log_switch + self._log_target)
        self._joint = joint if read is None else torch.where(read[:, None, None], joint, self._joint)

    def mean(self, particles: Particles) -> np.ndarray:
        """(N, K + 1), the filtered mean of the blend weights."""
        return np.einsum("ns,nsk->nk", self.log_weights.exp().numpy(), particles.weights)


class Predictive(NamedTuple):
    """The mixture of the particles' next-token distributions, and its uncertainty in nats.

    Attributes:
        log_probabilities: (N, V). entropy: (N,), of the mixture.
        mutual_information: (N,), between particle and token: the epistemic part of the entropy.
    """

    log_probabilities: Float[Tensor, "N V"]
    entropy: Float[Tensor, " N"]
    mutual_information: Float[Tensor, " N"]


def predictive(log_weights: Float[Tensor, "N S"], log_probabilities: Float[Tensor, "N S V"]) -> Predictive:
    """Mix the particles' distributions by their weights."""
    log_probabilities = log_probabilities.double()
    mixed = torch.logsumexp(log_weights[..., None] + log_probabilities, dim=1)
    entropy = _entropy(mixed)
    within = (log_weights.exp() * _entropy(log_probabilities)).sum(1)
    return Predictive(mixed, entropy, (entropy - within).clamp(min=0))


def _entropy(log_probabilities: Tensor) -> Tensor:
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


@runtime_checkable
class Reader(Protocol):
    """Reads tokens under all particles."""

    def read(self, ids: Int[Tensor, "N T"], tokens: Int[Tensor, " N"]) -> Float[Tensor, "N S T V"]:
        """Log-probabilities after each of the next tokens of right-padded rows; ``tokens`` are real in each row."""
        ...


class CachedReader:
    """Reads on from the cached states of all N · S rows."""

    def __init__(self, model: Backbone, bank: ExpertBank, particles: Particles, capacity: int) -> None:
        self._model = model
        self._shape = particles.mass.shape
        self._adaptation = bank.blend(_rows(particles, model))
        self._cache = model.init_cache(particles.mass.size, capacity)

    def read(self, ids: Int[Tensor, "N T"], tokens: Int[Tensor, " N"]) -> Float[Tensor, "N S T V"]:
        copies = self._shape[1]
        mask = (torch.arange(ids.shape[1]) < tokens[:, None]).long()
        out = self._model(
            ids.repeat_interleave(copies, 0),
            attention_mask=mask.repeat_interleave(copies, 0),
            cache=self._cache,
            adaptation=self._adaptation,
        )
        return out.logits.log_softmax(-1).unflatten(0, self._shape)


class UncachedReader:
    """The slow reference: keeps the tokens and reads everything again each time."""

    def __init__(self, model: Backbone, bank: ExpertBank, particles: Particles) -> None:
        self._model = model
        self._shape = particles.mass.shape
        self._adaptation = bank.blend(_rows(particles, model))
        self._seen: list[list[int]] = [[] for _ in range(self._shape[0])]

    def read(self, ids: Int[Tensor, "N T"], tokens: Int[Tensor, " N"]) -> Float[Tensor, "N S T V"]:
        before = [len(row) for row in self._seen]
        for row, new, count in zip(self._seen, ids.tolist(), tokens.tolist(), strict=True):
            row.extend(new[:count])
        width = max(len(row) for row in self._seen)
        padded = torch.zeros(len(self._seen), width, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for i, row in enumerate(self._seen):
            padded[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        copies = self._shape[1]
        logits = self._model(
            padded.repeat_interleave(copies, 0),
            attention_mask=mask.repeat_interleave(copies, 0),
            adaptation=self._adaptation,
        ).logits
        everything = logits.log_softmax(-1).unflatten(0, self._shape)  # (N, S, width, V)
        place = torch.tensor(before)[:, None] + torch.arange(ids.shape[1])
        index = place.clamp(max=width - 1)[:, None, :, None].expand(-1, copies, -1, everything.shape[-1])
        return everything.gather(2, index)


def _rows(particles: Particles, model: Backbone) -> Tensor:
    return (
        torch.tensor(particles.weights).flatten(0, 1).to(model.dtype)
    )  # a copy: a posterior's own draws are read-only
