"""Filtering the weights of particles by the tokens read.

Particle s has weight ``v_s``; a token multiplies it by that particle's probability of the token, and then a fixed share
goes back to the prior (Herbster and Warmuth 1998), so that a document may change its domain. Once the prompt is read it
goes to ``Particles.target`` instead. Particles stay where they are, so their caches stay valid; only weights move.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.model.mambaformer.compiled.switch import array, can_compile

__all__ = ["FilterState", "ParticleFilter", "Predictive", "entropy_of", "predictive"]


class FilterState(NamedTuple):
    """All that a filter of N prompts knows, E switching rates being possible.

    Attributes:
        joint: (N, E, S), log-probabilities of rate and particle. target: (N, S), those of the particles after a switch.
        rates: (N, E). blends: (N, S, K + 1), the blend weights that particles stand for.
    """

    joint: Float[Tensor, "N E S"]
    target: Float[Tensor, "N S"]
    rates: Float[Tensor, "N E"]
    blends: Float[np.ndarray, "N S components"]

    @classmethod
    def prior(cls, particles: Particles) -> "FilterState":
        """Before any token."""
        target = torch.tensor(particles.mass, dtype=torch.double).log()
        rates = torch.tensor([particles.switching], dtype=torch.double).repeat(len(target), 1)
        return cls(target[:, None], target, rates, np.array(particles.weights)).forgotten()

    def aimed(self, target: Float[np.ndarray, "N S"] | None) -> "FilterState":
        """With other probabilities of the particles after a switch; ``None`` for the same."""
        return self if target is None else self._replace(target=torch.tensor(target, dtype=torch.double).log())

    def forgotten(self) -> "FilterState":
        """The same particles before any token."""
        count = self.rates.shape[1]
        return self._replace(joint=(self.target[:, None] - np.log(count)).repeat(1, count, 1))


class ParticleFilter:
    """Joint posterior of particle and switching rate for each of N prompts, given the tokens read.

    Particles may be merged: then what is left of them stands for all that went into them.
    """

    def __init__(self, particles: Particles) -> None:
        self.state = FilterState.prior(particles)

    @classmethod
    def at(cls, state: FilterState) -> "ParticleFilter":
        """A filter that goes on from ``state``."""
        filter_ = cls.__new__(cls)
        filter_.state = state
        return filter_

    @property
    def state(self) -> FilterState:
        """What is known now; what follows does not change it."""
        return FilterState(torch.from_numpy(self._joint), torch.from_numpy(self._target), self._rates, self._blends)

    @state.setter
    def state(self, state: FilterState) -> None:
        self._joint, self._target, self._rates = array(state.joint), array(state.target), state.rates
        self._stay, self._switch = array((-state.rates).log1p()), array(state.rates.log())  # (N, E)
        self._blends = state.blends  # (N, S, K + 1)
        self._log_weights: np.ndarray | None = None  # (N, S) of the joint, where they are known

    @property
    def log_weights(self) -> Float[Tensor, "N S"]:
        """Log posterior probabilities of the particles."""
        if self._log_weights is None:
            self._log_weights = torch.from_numpy(self._joint).logsumexp(1).numpy()
        return torch.from_numpy(self._log_weights)

    def update(
        self, log_likelihood: Float[Tensor, "N S T"], counts: Bool[Tensor, "N T"] | None = None
    ) -> Float[Tensor, "N T S"]:
        """Count tokens, one after the other: the log-probability of each under each particle.

        Args:
            log_likelihood: (N, S, T). counts: (N, T), false where a prompt has no such token, or it is no evidence:
                its weights stay. So they do at a token that no particle can say.

        Returns:
            ``log_weights`` after each token.
        """
        values = log_likelihood.double()
        prompts, particles, tokens = values.shape
        read = np.ones((prompts, tokens), dtype=np.bool_) if counts is None else array(counts)
        if not can_compile(values):
            return self._update_by_tensors(values, torch.from_numpy(read))
        joint, found = self._joint.copy(), np.empty((prompts, tokens, particles))
        _kernels().filter_tokens(joint, self._target, self._stay, self._switch, array(values), read, found)
        self._joint = joint
        if tokens:
            self._log_weights = found[:, -1]
        return torch.from_numpy(found)

    def _update_by_tensors(self, values: Float[Tensor, "N S T"], counts: Bool[Tensor, "N T"]) -> Float[Tensor, "N T S"]:
        """The slow reference."""
        joint, target = torch.from_numpy(self._joint), torch.from_numpy(self._target)[:, None]
        stay, switch = (torch.from_numpy(each)[:, :, None] for each in (self._stay, self._switch))
        found = [values.new_empty(len(values), 0, values.shape[1])]
        for value, read in zip(values.detach().unbind(2), counts.unbind(1), strict=True):
            counted = joint + value[:, None]
            total = counted.logsumexp((1, 2), keepdim=True)
            counted = counted - total
            of_rate = counted.logsumexp(2, keepdim=True)  # (N, E, 1): a switch changes the particle, not the rate
            counted = torch.logaddexp(counted + stay, of_rate + switch + target)
            joint = torch.where(read[:, None, None] & (total != -torch.inf), counted, joint)
            found.append(joint.logsumexp(1)[:, None])
        self._joint, self._log_weights = joint.numpy(), None
        return torch.cat(found, 1)

    def mean(self) -> Float[np.ndarray, "N components"]:
        """(N, K + 1), the filtered mean of the blend weights."""
        return self.means(self.log_weights[:, None])[:, 0]

    def means(self, log_weights: Float[Tensor, "N T S"]) -> Float[np.ndarray, "N T components"]:
        """The means of the blend weights under these probabilities of the particles."""
        return np.matmul(log_weights.exp().numpy(), self._blends)

    def select(self, prompts: Sequence[int], particles: int) -> None:
        """Keep some prompts, in that order, and their first ``particles``: others have no probability."""
        kept, state = torch.tensor(prompts), self.state
        blends = state.blends[np.asarray(prompts), :particles]
        joint, target = state.joint[kept][..., :particles], state.target[kept][:, :particles]
        self.state = FilterState(joint, target, state.rates[kept], blends)

    def join(self, other: "ParticleFilter") -> None:
        """Take over another's prompts, after one's own.

        Where one has fewer particles or rates, it gets more of no probability.
        """
        own, more = self.state, other.state
        most, particles = (max(own.joint.shape[place], more.joint.shape[place]) for place in (1, 2))
        wide = [
            FilterState(
                _padded(each.joint, (most, particles), -torch.inf),
                _padded(each.target, (particles,), -torch.inf),
                _padded(each.rates, (most,), 0.0),
                _padded(torch.from_numpy(each.blends).mT, (particles,), 0.0).mT.numpy(),
            )
            for each in (own, more)
        ]
        joint, target, rates = (torch.cat([getattr(each, name) for each in wide]) for name in FilterState._fields[:3])
        self.state = FilterState(joint, target, rates, np.concatenate([each.blends for each in wide]))

    def merge(self, representative: Int[np.ndarray, "N S"]) -> list[list[int]]:
        """Give each particle's probability, now and after a switch, to its representative.

        Args:
            representative: (N, S), a representative being its own. Weights that the filtered mean reports are the
                weighted means of what was merged.

        Returns:
            The particles that are left of each prompt, by their old indices. Prompts with fewer than another have
            particles of no probability at their end.
        """
        left = [np.unique(row).tolist() for row in representative]
        width = max(map(len, left))
        count = self._joint.shape[2]
        joint, target = torch.from_numpy(self._joint), torch.from_numpy(self._target)
        into = torch.zeros(len(left), count, width, dtype=torch.double)  # one where s goes into r
        for n, (row, kept) in enumerate(zip(representative, left, strict=True)):
            into[n, torch.arange(count), torch.from_numpy(np.searchsorted(kept, row))] = 1.0
        own = self.log_weights.exp()[:, :, None] * into  # (N, S, R)
        even = into / into.sum(1, keepdim=True).clamp(min=1.0)
        total = own.sum(1, keepdim=True)
        share = torch.where(total > 0, own / total.clamp(min=1e-300), even)
        self._blends = np.einsum("nsr,nsk->nrk", share.numpy(), self._blends)
        gaps = into.log()
        self._joint = (joint[..., None] + gaps[:, None]).logsumexp(2).numpy()
        self._target = (target[..., None] + gaps).logsumexp(1).numpy()
        self._log_weights = None
        return left


def _padded(values: Tensor, shape: tuple[int, ...], value: float) -> Tensor:
    """Filled up with a value at the end of the last dimensions."""
    gaps = [wanted - got for wanted, got in zip(shape, values.shape[-len(shape) :], strict=True)]
    return torch.nn.functional.pad(values, [n for gap in reversed(gaps) for n in (0, gap)], value=value)


class Predictive(NamedTuple):
    """The mixture of the particles' next-token distributions, and its uncertainty in nats.

    Attributes:
        log_probabilities: (N, V). entropy: (N,), of the mixture.
        mutual_information: (N,), between particle and token: the epistemic part of the entropy.
    """

    log_probabilities: Float[Tensor, "N V"]
    entropy: Float[Tensor, " N"]
    mutual_information: Float[Tensor, " N"]


def predictive(
    log_weights: Float[Tensor, "N S"],
    log_probabilities: Float[Tensor, "N S V"],
    entropies: Float[Tensor, "N S"] | None = None,
) -> Predictive:
    """Mix the particles' distributions by their weights; ``entropies``: theirs, where they are known."""
    if entropies is None and can_compile(log_weights) and can_compile(log_probabilities):
        return _mixed_by_kernel(log_weights, log_probabilities)
    log_probabilities = log_probabilities.double()
    own = entropy_of(log_probabilities) if entropies is None else entropies.double()
    if log_weights.shape[1] == 1:
        return Predictive(log_probabilities[:, 0], own[:, 0], torch.zeros_like(own[:, 0]))
    mixed = torch.logsumexp(log_weights[..., None] + log_probabilities, dim=1)
    entropy = entropy_of(mixed)
    within = (log_weights.exp() * own).sum(1)
    return Predictive(mixed, entropy, (entropy - within).clamp(min=0))


def _mixed_by_kernel(log_weights: Float[Tensor, "N S"], log_probabilities: Float[Tensor, "N S V"]) -> Predictive:
    prompts, _, tokens = log_probabilities.shape
    mixed, entropy, information = np.empty((prompts, tokens)), np.empty(prompts), np.empty(prompts)
    _kernels().mix(array(log_weights.double()), array(log_probabilities), mixed, entropy, information)
    return Predictive(*map(torch.from_numpy, (mixed, entropy, information)))


@cache
def _kernels() -> ModuleType:
    """The module, imported when it is first needed."""
    return import_module("bayes_dispatch.inference.two_pass.filter_loops")


def entropy_of(log_probabilities: Float[Tensor, "*of V"]) -> Float[Tensor, "*of"]:
    """In nats, as doubles; what has no probability adds nothing."""
    finite = log_probabilities.clamp(min=torch.finfo(log_probabilities.dtype).min)  # NaN stays
    return -(log_probabilities.exp() * finite).sum(-1, dtype=torch.double)
