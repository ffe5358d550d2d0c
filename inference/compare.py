"""Blends side by side on the same documents: how probable each makes the bytes that count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.blends import Blend, Particles
from bayes_dispatch.inference.filtering import ParticleFilter, predictive
from bayes_dispatch.inference.generator import Dispatched, Strategy, System
from bayes_dispatch.inference.readers import UncachedReader
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "Score", "compare_blends", "score_particles"]

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Score:
    """One document under one blend, given its true bytes.

    Attributes:
        document: its index. blend: the blend's name.
        nll: mean of −log p over the scored bytes, in nats.
        exact_match: share of the scored ranges whose every byte is the most probable one: what greedy decoding from
            the true beginning would get right.
        entropy, mutual_information: means over the scored bytes, in nats.
    """

    document: int
    blend: str
    nll: float
    exact_match: float
    entropy: float
    mutual_information: float


@dataclass(frozen=True)
class Comparison:
    """A score for each document and blend."""

    scores: tuple[Score, ...]

    def to_frame(self) -> "pandas.DataFrame":
        """A row per document and blend."""
        import pandas

        return pandas.DataFrame([vars(score) for score in self.scores])


@torch.no_grad()
def compare_blends(
    bundle: System,
    documents: Sequence[Document],
    blends: Sequence[Blend],
    seed: int = 0,
    progress: bool = False,
    strategy: Strategy | None = None,
) -> Comparison:
    """Score documents under several blends of the same posterior, whose evidence is each document's prompt.

    Args:
        bundle: model, tokenizer, experts and dispatcher. documents: with at least one prompt byte and one scored byte.
        blends: of different names. seed: of the posterior draws. progress: show a progress bar.
        strategy: gives the posterior; the bundle's dispatcher by default.

    Raises:
        ConfigError: two blends of one name, or a document without scored bytes. PromptError: a document without prompt.
    """
    names = [blend.name for blend in blends]
    if len(set(names)) < len(names):
        raise ConfigError(f"expected blends of different names, got {names}")
    for index, document in enumerate(documents):
        if not any(stop > start for start, stop in document.ranges):
            raise ConfigError(f"expected document {index} to have scored bytes, got none")
    posterior = (strategy or Dispatched()).posterior(bundle, [document.prompt for document in documents], seed)
    scores: list[Score] = []
    for blend in blends:
        particles = blend.particles(posterior)
        scores.extend(score_particles(bundle.model, bundle.experts, documents, particles, blend.name, progress))
    return Comparison(tuple(scores))


@torch.no_grad()
def score_particles(
    model: Backbone,
    experts: ExpertBank,
    documents: Sequence[Document],
    particles: Particles,
    name: str,
    progress: bool = False,
) -> list[Score]:
    """Score documents under given particles, whatever they come from; ``name`` stands for the blend."""
    at_once = max(1, ROWS_AT_ONCE // particles.mass.shape[1])
    scores = []
    for start in tqdm(range(0, len(documents), at_once), name, disable=not progress):
        chosen = slice(start, start + at_once)
        part = particles.select(chosen)
        for offset, values in enumerate(_score(model, experts, documents[chosen], part)):
            scores.append(Score(start + offset, name, *values))
    return scores


def _score(
    model: Backbone, experts: ExpertBank, documents: Sequence[Document], particles: Particles
) -> list[tuple[float, ...]]:
    tokenizer = ByteTokenizer()
    ids, mask = tokenizer.pad([[tokenizer.bos_token_id, *document.data] for document in documents])
    lengths = mask.sum(1)
    after = UncachedReader(model, experts, particles, ids, lengths).read_prompts(0, ids.shape[1])  # (N, S, 1 + T, V)
    weights = ParticleFilter(particles)
    columns = []
    for t in range(1, ids.shape[1]):
        following = after[:, :, t - 1]
        mixed = predictive(weights.log_weights, following)
        token = ids[:, t, None]
        nll = -mixed.log_probabilities.gather(1, token)[:, 0]
        right = mixed.log_probabilities.argmax(1) == ids[:, t]
        columns.append(torch.stack([nll, right.double(), mixed.entropy, mixed.mutual_information]))
        own = following.gather(2, token[:, None].expand(-1, following.shape[1], 1))[..., 0]
        weights.update(own, t < lengths)
    table = torch.stack(columns, -1).numpy()  # (4, N, T)
    results: list[tuple[float, ...]] = []
    for n, document in enumerate(documents):
        ranges = [(start, stop) for start, stop in document.ranges if stop > start]
        scored = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        nll, _, entropy, information = table[:, n][:, scored].mean(1)
        exact = np.mean([table[1, n, start:stop].all() for start, stop in ranges])
        results.append((float(nll), float(exact), float(entropy), float(information)))
    return results
