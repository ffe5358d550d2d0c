"""Blends side by side on the same documents: how probable each makes the bytes that count, and at what cost.

Blends share particles (a posterior mean, say, is also one of the particles of the predictive): each distinct weight is
run once for a document, and every blend filters and mixes its own part of what was read.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.blends import Blend, Particles
from bayes_dispatch.inference.filtering import ParticleFilter, predictive
from bayes_dispatch.inference.readers import UncachedReader
from bayes_dispatch.inference.scores import Comparison, Score, ScoredBytes, SystemComparison
from bayes_dispatch.inference.system import Dispatched, Strategy, System
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["compare_blends", "compare_systems", "score_particles", "score_together"]

ROWS_AT_ONCE = 64


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
        ConfigError: no blend, two blends of one name, no document, or one without scored bytes.
        PromptError: a document without prompt.
    """
    names = [blend.name for blend in blends]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"expected blends of different names, got {names or 'none'}")
    _check(documents)
    posterior = (strategy or Dispatched()).posterior(bundle, [document.prompt for document in documents], seed)
    particles = {blend.name: blend.particles(posterior) for blend in blends}
    found = score_together(bundle.model, bundle.experts, documents, particles, progress)
    return Comparison(tuple(score for name in names for score in found[name]))


def compare_systems(
    systems: Mapping[str, System],
    documents: Sequence[Document],
    blends: Sequence[Blend],
    seed: int = 0,
    progress: bool = False,
) -> SystemComparison:
    """The same documents under the same blends of several systems (A/B).

    Two dispatchers, or two banks, for one model are two bundles: ``dataclasses.replace(bundle, dispatcher=other,
    gate=None)``; a gate belongs to the dispatcher that it was calibrated for.

    Args:
        systems: name → model, tokenizer, experts and dispatcher; their experts may differ.
        documents, blends, seed, progress: as in ``compare_blends``, for each of them.

    Raises:
        ConfigError: fewer than two systems, and as in ``compare_blends``. PromptError: as there.
    """
    if len(systems) < 2:
        raise ConfigError(f"expected at least 2 systems, got {len(systems)}")
    return SystemComparison(
        {name: compare_blends(system, documents, blends, seed, progress) for name, system in systems.items()}
    )


def score_particles(
    model: Backbone,
    experts: ExpertBank,
    documents: Sequence[Document],
    particles: Particles,
    name: str,
    progress: bool = False,
) -> list[Score]:
    """Score documents under given particles, whatever they come from; ``name`` stands for the blend."""
    return score_together(model, experts, documents, {name: particles}, progress)[name]


@torch.no_grad()
def score_together(
    model: Backbone,
    experts: ExpertBank,
    documents: Sequence[Document],
    particles: Mapping[str, Particles],
    progress: bool = False,
    filtered_from: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, list[Score]]:
    """Score documents under several sets of particles; weights that occur in more than one of them are run once.

    Args:
        model: the base model. experts: that the weights are of, and base.
        documents: N, with at least one scored byte each. particles: name → particles of the N documents.
        progress: show a progress bar over documents.
        filtered_from: name → (N,), the first byte of each document that moves the masses; 0 where a name is missing.
            A document's length keeps the prior masses throughout.

    Returns:
        Name → a score for each document.

    Raises:
        ConfigError: no document, or one without scored bytes.
    """
    _check(documents)
    weights, places = _distinct(_alike([each.run for each in particles.values()]))
    at_once = max(1, ROWS_AT_ONCE // weights.shape[1])
    scores: dict[str, list[Score]] = {name: [] for name in particles}
    with tqdm(total=len(documents), desc="documents", disable=not progress) as bar:
        for start in range(0, len(documents), at_once):
            part = slice(start, start + at_once)
            reading = _read(model, experts, documents[part], weights[part])
            for (name, each), place in zip(particles.items(), places, strict=True):
                first = None if filtered_from is None else filtered_from.get(name)
                own = each.select(part)
                if each.refined:
                    mean = _refined(reading, documents[part], own, place[part])
                    again = _read(model, experts, documents[part], mean.run)
                    found, rows = (
                        _filter(again, mean, np.zeros(mean.mass.shape, dtype=int), None),
                        1 + each.mass.shape[1],
                    )
                else:
                    found, rows = (
                        _filter(reading, own, place[part], None if first is None else first[part]),
                        each.mass.shape[1],
                    )
                for offset, (document, scored) in enumerate(zip(documents[part], found, strict=True)):
                    sizes = [stop - begin for begin, stop in document.ranges if stop > begin]
                    scores[name].append(Score.of(start + offset, name, scored, sizes, rows))
            bar.update(len(documents[part]))
    return scores


class _Reading(NamedTuple):
    """What W particles say of N documents of up to T bytes.

    Attributes:
        ids: (N, T) the bytes. lengths: (N,) how many are real. own: (N, W, T) log-probability of each.
        scored: for each document the places of its P scored bytes, (P,). following: for each document all
            log-probabilities there, (P, W, V).
    """

    ids: Tensor
    lengths: Tensor
    own: Tensor
    scored: list[Tensor]
    following: list[Tensor]


def _read(model: Backbone, experts: ExpertBank, documents: Sequence[Document], weights: np.ndarray) -> _Reading:
    tokenizer = ByteTokenizer()
    ids, mask = tokenizer.pad([[tokenizer.bos_token_id, *document.data] for document in documents])
    layers = None if weights.ndim == 3 else weights
    told = weights if layers is None else weights.mean(2)
    equal = Particles(told, np.full(weights.shape[:2], 1 / weights.shape[1]), layers=layers)
    after = UncachedReader(model, experts, equal, ids, mask.sum(1)).read_prompts(0, ids.shape[1])  # (N, W, 1 + T, V)
    ids = ids[:, 1:]
    own = after[:, :, :-1].gather(3, ids[:, None, :, None].expand(-1, weights.shape[1], -1, 1))[..., 0]
    scored = [torch.cat([torch.arange(start, stop) for start, stop in document.ranges]) for document in documents]
    following = [after[n, :, places].transpose(0, 1) for n, places in enumerate(scored)]
    return _Reading(ids, mask.sum(1) - 1, own, scored, following)


def _filter(
    reading: _Reading, particles: Particles, place: np.ndarray, filtered_from: Sequence[int] | None
) -> list[ScoredBytes]:
    """Each document under its own particles; ``place``: (N, S), which of the particles read each of them is."""
    index = torch.from_numpy(place)
    own = reading.own.gather(1, index[..., None].expand(-1, -1, reading.own.shape[2]))  # (N, S, T)
    log_masses = _log_masses(own, reading.lengths, particles, filtered_from)
    found = []
    for n, (places, following) in enumerate(zip(reading.scored, reading.following, strict=True)):
        mixed = predictive(log_masses[n, places], following[:, index[n]])
        top = mixed.log_probabilities.max(1)
        true = reading.ids[n, places]
        found.append(
            ScoredBytes(
                mixed.log_probabilities.gather(1, true[:, None])[:, 0].numpy(),
                top.values.exp().clamp(max=1).numpy(),
                (top.indices == true).numpy(),
                mixed.entropy.numpy(),
                mixed.mutual_information.numpy(),
            )
        )
    return found


def _refined(reading: _Reading, documents: Sequence[Document], particles: Particles, place: np.ndarray) -> Particles:
    """One particle for each document: the mean of its own, filtered by its prompt."""
    own = reading.own.gather(1, torch.from_numpy(place)[..., None].expand(-1, -1, reading.own.shape[2]))
    log_masses = _log_masses(own, reading.lengths, particles, None)
    last = torch.tensor([min(document.prompt_bytes, log_masses.shape[1] - 1) for document in documents])
    masses = log_masses[torch.arange(len(last)), last].exp().numpy()
    mean = np.einsum("ns,nsk->nk", masses, particles.weights)
    return Particles(mean[:, None], np.ones((len(mean), 1)))


def _log_masses(
    own: Tensor, lengths: Tensor, particles: Particles, filtered_from: Sequence[int] | None
) -> Float[Tensor, "N T S"]:
    """The log masses that each byte is predicted with; ``own``: (N, S, T)."""
    if own.shape[1] == 1:
        return own.new_zeros(own.transpose(1, 2).shape).double()
    first = torch.zeros(len(own)) if filtered_from is None else torch.tensor(list(filtered_from))
    masses = ParticleFilter(particles)
    before = []
    for t in range(own.shape[2]):
        before.append(masses.log_weights)
        masses.update(own[:, :, t], (t >= first) & (t < lengths))
    return torch.stack(before, 1)


def _alike(weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(N, S_i, K + 1) weights as they are; where others are by layer, (N, S_i, L, K + 1), repeated for each layer."""
    layers = {each.shape[2] for each in weights if each.ndim == 4}
    if not layers:
        return list(weights)
    return [each if each.ndim == 4 else each[:, :, None].repeat(max(layers), 2) for each in weights]


def _distinct(weights: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Distinct rows of (N, S_i, …) weights: (N, W, …), the shorter ones padded, and where each is, (N, S_i)."""
    together = np.concatenate(weights, axis=1)
    rows, where = zip(*(np.unique(each, axis=0, return_inverse=True) for each in together), strict=True)
    width = max(map(len, rows))
    padded = np.stack([each[np.arange(width) % len(each)] for each in rows])
    cuts = np.cumsum([each.shape[1] for each in weights])[:-1]
    return padded, np.split(np.stack([each.reshape(-1) for each in where]), cuts, axis=1)


def _check(documents: Sequence[Document]) -> None:
    if not documents:
        raise ConfigError("expected at least one document, got none")
    for index, document in enumerate(documents):
        if not any(stop > start for start, stop in document.ranges):
            raise ConfigError(f"expected document {index} to have scored bytes, got none")
