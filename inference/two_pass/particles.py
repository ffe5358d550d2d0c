"""A batch of prompts under the particles of a blend: reading them, and going on token by token."""

from collections.abc import Callable, Generator, Sequence
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


@dataclass(frozen=True, eq=False)
class Token:
    """The next token of N prompts, and how sure it was.

    Attributes:
        ids: (N,). log_probabilities: (N,), under the predictive at temperature 1, in nats.
        entropy, mutual_information: (N,), of the predictive, and between it and the particle, in nats.
        weights: (N, K + 1), the filtered mean of the blend weights before the token. rows: of the model, for all N.
    """

    ids: np.ndarray
    log_probabilities: np.ndarray
    entropy: np.ndarray
    mutual_information: np.ndarray
    weights: np.ndarray
    rows: int


class Decoding:
    """Filtered particles of N prompts.

    Args:
        reader: of the prompts under these particles. particles: of the prompts.
        continues: (V,), which tokens may be chosen.
        ids: (N, T) tokens of the prompts, right-padded. lengths: (N,), how many are real.
        evidence: (N, T), which of them filter the particles; all but the first by default.

    Attributes:
        path: (T, N, K + 1), the filtered mean of the blend weights after each token of the prompts.
        reader: as given.
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
        self._ids, self._lengths, self._evidence, self._continues = ids, lengths, evidence, continues
        self._alone = particles.mass.shape[1] == 1
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
            measured: whether to compare the particles. piece: tokens after which to pause; ``None`` for never.

        Returns:
            Where ``measured`` and there are particles to compare: for ``merge``, by how many nats a token their
            predictives diverged at the end of the prompts.
        """
        measured = measured and not self._alone
        said = yield from self.reader.read_prompts(not self._alone, MEASURED if measured else 1, piece)
        self.path[:] = self.weights
        self._following = said.after[:, :, -1]
        if said.own is None:  # nothing to filter
            return None
        place = torch.arange(self._ids.shape[1])
        counts = (place < self._lengths[:, None]) & (place > 0)  # nothing is said of the first one
        if self._evidence is not None:
            counts &= self._evidence
        self.path[:] = self._filter.means(self._update(said.own.nan_to_num(nan=0.0), counts)).swapaxes(0, 1)
        self._filter.state = self._filter.state.aimed(self._target)
        if not measured:
            return None
        tail = said.after.shape[2]
        counted = torch.arange(tail) >= tail - self._lengths[:, None]
        return divergences(said.after, counted) / np.minimum(self._lengths.numpy(), tail)[:, None, None]

    def read_on(self, ids: Int[Tensor, "N t"], evidence: Bool[Tensor, "N t"]) -> None:
        """Read more of prompts that the reader has been given longer, all of them to one length.

        Args:
            ids: what is new. evidence: which of them filter the particles.
        """
        said = straight(self.reader.read_prompts(own=not self._alone))
        self._following = said.after[:, :, -1]
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
        self._mean = None
        self.reader.keep(range(len(left)), left)
        width = max(map(len, left))
        index = torch.tensor([[*kept, *[kept[0]] * (width - len(kept))] for kept in left])
        self._following = self._following[torch.arange(len(left))[:, None], index]
        return left

    def choose(self, sampling: Sampling, generators: Sequence[np.random.Generator]) -> Token:
        """The next token of each prompt.

        Raises:
            TensorError: the model predicts NaN.
        """
        mixed = predictive(self._filter.log_weights, self._following)
        if bool(mixed.log_probabilities.isnan().any()):
            raise TensorError("expected finite log-probabilities from the model, got NaN")
        ids = sampling.choose(mixed.log_probabilities.masked_fill(~self._continues, -torch.inf), generators)
        chosen = mixed.log_probabilities.gather(1, ids[:, None])[:, 0]
        if not bool(chosen.isfinite().all()):
            raise TensorError("expected a finite log-probability of the next token from the model, got infinity")
        values = ids, chosen, mixed.entropy, mixed.mutual_information
        tokens, log_p, entropy, information = (each.cpu().numpy() for each in values)
        return Token(tokens, log_p, entropy, information, self.weights, self.reader.rows)

    def append(self, ids: Int[np.ndarray, " N"], evidence: bool = True, last: bool = False) -> None:
        """Go on with these tokens.

        Args:
            ids: (N,). evidence: whether they filter the particles. In the joint predictive of several tokens the
                model's own count, too: later ones continue what the likely particles began.
            last: nothing will be asked about what follows them.
        """
        if evidence:
            self.count(ids)
        if not last:
            self.follow(self.reader.read(torch.from_numpy(ids)))

    def count(self, ids: Int[np.ndarray, " N"]) -> None:
        """Filter the particles by tokens that follow."""
        if not self._alone:
            self._update(_of(self._following[:, :, None], torch.from_numpy(ids)[:, None]))

    def follow(self, following: Float[Tensor, "N S V"]) -> None:
        """Go on where particles say this of what follows, whoever has read what came before."""
        self._following = following

    def _update(
        self, log_likelihood: Float[Tensor, "N S T"], counts: Bool[Tensor, "N T"] | None = None
    ) -> Float[Tensor, "N T S"]:
        self._mean = None
        return self._filter.update(log_likelihood, counts)

    def keep(self, prompts: Sequence[int]) -> None:
        """Drop all other prompts; nothing is merged after that."""
        count = self._following.shape[1]
        self.reader.keep(prompts, [range(count)] * len(prompts))
        self._filter.select(prompts)
        self._mean = None
        self._following = self._following[torch.tensor(prompts)]


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
        begin: makes what reads them under given particles. piece: tokens after which to pause; ``None`` for never.
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
