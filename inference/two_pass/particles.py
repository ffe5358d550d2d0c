"""A batch of prompts under the particles of a blend: reading them, and going on token by token."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.filtering import FilterState, ParticleFilter, predictive
from bayes_dispatch.inference.two_pass.merging import divergences, representatives
from bayes_dispatch.inference.two_pass.readers import ParticleReader, straight
from bayes_dispatch.model.generation.sampling import Sampling

__all__ = ["Decoding", "Settled", "Token", "settle"]

MEASURED = 32  # tokens at the end of a prompt on which divergences of particles are measured
NOT_A_NUMBER = "expected finite log-probabilities from the model, got NaN"


@dataclass(frozen=True, eq=False)
class Token:
    """The next token of N prompts, and how sure it was.

    Attributes:
        ids: (N,). log_probabilities: (N,), under the predictive at temperature 1, in nats.
        entropy, mutual_information: (N,), of the predictive, and between it and the particle, in nats.
        weights: (N, K + 1), the filtered mean of the blend weights before the token.
    """

    ids: np.ndarray
    log_probabilities: np.ndarray
    entropy: np.ndarray
    mutual_information: np.ndarray
    weights: np.ndarray


class Decoding:
    """Filtered particles of N prompts, at most S of each.

    What follows the prompts is kept as (N, S, V): where one has many particles, those of few beside it have copies.

    Args:
        reader: of the prompts under these particles. particles: of the prompts.
        continues: (V,), which tokens may be chosen.
        ids: (N, T) tokens of the prompts, right-padded. lengths: (N,), how many are real.
        evidence: (N, T), which of them filter the particles; all but the first by default.

    Attributes:
        path: (T, N, K + 1), the filtered mean of the blend weights after each token of the prompts.
        reader: as given. counts: of each prompt's particles.
    """

    def __init__(
        self,
        reader: ParticleReader,
        particles: Particles,
        continues: Bool[Tensor, " V"],
        ids: Int[Tensor, "N T"],
        lengths: Int[Tensor, " N"],
        evidence: Bool[Tensor, "N T"] | None = None,
    ) -> None:
        self.reader = reader
        self._filter, self._target = ParticleFilter(particles), particles.target
        self._ids, self._lengths, self._evidence = ids, lengths, evidence
        self._stops = ~continues[None]  # (1 or N, V)
        self.counts = [particles.mass.shape[1]] * len(ids)  # of particles; after these there are only copies
        self._following: Float[Tensor, "N S V"]
        self._mean: np.ndarray | None = None  # of the present weights, where it has been asked for
        self.path = np.empty((ids.shape[1], len(ids), particles.weights.shape[2]))

    @property
    def weights(self) -> Float[np.ndarray, "N components"]:
        """The filtered mean of the blend weights."""
        if self._mean is None:
            self._mean = self._filter.mean()
        return self._mean

    @property
    def width(self) -> int:
        """Particles of the prompt that has most."""
        return max(self.counts)

    @property
    def nbytes(self) -> int:
        """Of what the reader keeps, and of what may follow."""
        return self.reader.nbytes + self._following.nbytes

    @property
    def _alone(self) -> bool:
        """Whether there is nothing to filter."""
        return self.width == 1

    @property
    def predicts(self) -> Bool[Tensor, " N"]:
        """Of which prompts the model says what may follow, and not NaN."""
        possible = self._following.isfinite().any(1) & ~self._stops
        return possible.any(1) & ~self._following.isnan().any((1, 2))

    @property
    def filtered(self) -> FilterState:
        """The filter's state: to come back to, when what is read from here on shall not have been evidence."""
        return self._filter.state

    @filtered.setter
    def filtered(self, state: FilterState) -> None:
        self._filter.state = state
        self._mean = None

    def read_prompts(
        self, measured: bool = False, piece: int | None = None
    ) -> Generator[None, None, Float[np.ndarray, "N S S"] | None]:
        """Read the prompts, and filter the particles by each of their tokens; then take aim at the particles' target.

        Args:
            measured: whether to compare the particles. piece: see ``ParticleReader``.

        Returns:
            Where ``measured`` and there are particles to compare: for ``merge``, by how many nats a token their
            predictives diverged at the end of the prompts.

        Raises:
            TensorError: the model says NaN of a token, or of what may follow.
        """
        measured = measured and not self._alone
        said = yield from self.reader.read_prompts(not self._alone, MEASURED if measured else 1, piece)
        self.path[:] = self.weights
        kl = self._last(said.after, measured)
        if said.own is None:  # nothing to filter
            return None
        place = torch.arange(self._ids.shape[1])
        counts = (place < self._lengths[:, None]) & (place > 0)  # nothing is said of the first one
        if bool(said.own.isnan().any(1)[counts].any()):
            raise TensorError(NOT_A_NUMBER)
        if self._evidence is not None:
            counts &= self._evidence
        self.path[:] = self._filter.means(self._update(said.own, counts)).swapaxes(0, 1)
        self._filter.state = self._filter.state.aimed(self._target)
        return kl

    def _last(self, after: Iterator[Float[Tensor, "N S t V"]], measured: bool) -> Float[np.ndarray, "N S S"] | None:
        """Keep what follows the prompts; where ``measured``, by how many nats a token that diverged at their end."""
        count = min(MEASURED, self._ids.shape[1]) if measured else 1
        place, total = -count, np.zeros((len(self._ids), 1, 1))  # from the end of each prompt
        for part in after:
            if measured:
                places = torch.arange(place, place := place + part.shape[2])
                total = total + divergences(part, places >= -self._lengths[:, None])
        self._following = part[:, :, -1]
        if np.isnan(total).any():  # no comparison of numbers would hold of it
            raise TensorError(NOT_A_NUMBER)
        return total / np.minimum(self._lengths.numpy(), count)[:, None, None] if measured else None

    def read_on(self, ids: Int[Tensor, "N t"], evidence: Bool[Tensor, "N t"]) -> None:
        """Read more of prompts that the reader has been given longer, all of them to one length.

        Args:
            ids: what is new. evidence: which of them filter the particles.
        """
        said = straight(self.reader.read_prompts(own=not self._alone))
        self._last(said.after, measured=False)
        if said.own is not None:
            self._update(said.own, evidence)

    def merge(self, kl: Float[np.ndarray, "N S S"], tolerance: float) -> list[list[int]]:
        """Run particles as one; the mixture changes by at most ``tolerance`` nats a token (``merging``).

        Args:
            kl: what ``read_prompts`` measured.

        Returns:
            The particles that are left of each prompt, by their old indices.
        """
        v = self._filter.log_weights.exp().numpy()
        chosen = [representatives(own, each, tolerance) for own, each in zip(v, kl, strict=True)]
        left = self._filter.merge(np.stack(chosen))
        self._mean, self.counts = None, list(map(len, left))
        self.reader.keep(range(len(left)), left)
        width = max(self.counts)
        index = torch.tensor([[*kept, *[kept[0]] * (width - len(kept))] for kept in left])
        self._following = self._following[torch.arange(len(left))[:, None], index]
        return left

    def choose(self, samplings: Sequence[Sampling], generators: Sequence[np.random.Generator]) -> Token:
        """The next token of each prompt, whose sampling and generator have its place.

        Raises:
            TensorError: the model predicts NaN, or nothing that may follow.
        """
        mixed = predictive(self._filter.log_weights, self._following)
        if bool(mixed.log_probabilities.isnan().any()):
            raise TensorError(NOT_A_NUMBER)
        logits = mixed.log_probabilities.masked_fill(self._stops, -torch.inf)
        if not bool(logits.amax(1).isfinite().all()):
            raise TensorError("expected a finite log-probability of the next token from the model, got infinity")
        ids = torch.empty(len(logits), dtype=torch.long)
        for sampling in set(samplings):
            places = [n for n, each in enumerate(samplings) if each == sampling]
            ids[places] = sampling.choose(logits[places], [generators[n] for n in places])
        chosen = mixed.log_probabilities.gather(1, ids[:, None])[:, 0]
        values = ids, chosen, mixed.entropy, mixed.mutual_information
        tokens, log_p, entropy, information = (each.cpu().numpy() for each in values)
        return Token(tokens, log_p, entropy, information, self.weights)

    def append(self, ids: Int[np.ndarray, " N"], evidence: bool = True, last: bool = False) -> None:
        """Go on with these tokens.

        Args:
            ids: (N,). evidence: whether they filter the particles. In the joint predictive of several tokens the
                model's own count, too: later ones continue what the likely particles began.
            last: nothing will be asked about what follows them.
        """
        if evidence and not self._alone:
            self._update(_of(self._following[:, :, None], torch.from_numpy(ids)[:, None]))
        if not last:
            self._following = self.reader.read(torch.from_numpy(ids))

    def _update(
        self, log_likelihood: Float[Tensor, "N S T"], counts: Bool[Tensor, "N T"] | None = None
    ) -> Float[Tensor, "N T S"]:
        self._mean = None
        return self._filter.update(log_likelihood, counts)

    def keep(self, prompts: Sequence[int]) -> None:
        """Drop all other prompts; nothing is merged after that."""
        self.counts = [self.counts[n] for n in prompts]
        width = max(self.counts)
        self.reader.keep(prompts, [range(count) for count in self.counts])
        self._filter.select(prompts, width)
        self._mean = None
        self._following = self._following[torch.tensor(prompts), :width]
        self._stops = self._stops if len(self._stops) == 1 else self._stops[torch.tensor(prompts)]

    def join(self, other: "Decoding") -> None:
        """Take over the prompts of another, after one's own; the other is spent. Nothing is merged after that.

        Raises:
            TensorError: they do not fit together. StaleCacheError: one of them was interrupted. Then both are spent.
        """
        own, more = self._following, other._following
        self.reader.join(other.reader)  # of one kind: both are of one engine
        self._filter.join(other._filter)
        width = max(own.shape[1], more.shape[1])
        copies = [each[:, :1].expand(-1, width - each.shape[1], -1) for each in (own, more)]
        self._following = torch.cat([torch.cat([own, copies[0]], 1), torch.cat([more, copies[1]], 1)])
        self._stops = torch.cat([each._stops.expand(len(each.counts), -1) for each in (self, other)])
        self.counts, self._mean = self.counts + other.counts, None


class Settled(NamedTuple):
    """Prompts that have been read, and what is to go on with them.

    Attributes:
        decoding: goes on. path: the filtered mean of the blend weights after each token of the prompts.
        weights: that after all of them. kept: the particles that are left of each prompt, where some were merged.
        evaluated: how often a block has run on a token.
    """

    decoding: Decoding
    path: Float[np.ndarray, "T N components"]
    weights: Float[np.ndarray, "N components"]
    kept: list[list[int]] | None
    evaluated: int


def settle(
    begin: Callable[[Particles], Decoding], particles: Particles, piece: int | None = None
) -> Generator[None, None, Settled]:
    """Read prompts under their particles; once more where these are only to find one blend; and merge equal ones.

    Args:
        begin: makes what reads them under given particles. piece: see ``ParticleReader``.
    """
    decoding, kept = begin(particles), None
    kl = yield from decoding.read_prompts(particles.merge > 0, piece)
    path, weights, evaluated = decoding.path, decoding.weights, decoding.reader.evaluated
    if particles.refined:
        decoding = begin(Particles.single(weights))
        yield from decoding.read_prompts(piece=piece)
        evaluated += decoding.reader.evaluated
    elif kl is not None:
        kept = decoding.merge(kl, particles.merge)
    return Settled(decoding, path, weights, kept, evaluated)


def _of(log_probabilities: Float[Tensor, "N S T V"], tokens: Int[Tensor, "N T"]) -> Float[Tensor, "N S T"]:
    index = tokens[:, None, :, None].expand(-1, log_probabilities.shape[1], -1, 1)
    return log_probabilities.gather(3, index)[..., 0]
