"""Blends side by side on the same documents: how probable each makes the bytes that count, and at what cost.

Blends share particles (a posterior mean, say, is also one of the particles of the predictive): each distinct weight is
run once for a document, and every blend filters and mixes its own part of what was read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from bayes_dispatch.arguments import seed as a_seed
from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.scoring.document_reader import DocumentReading, TokenDocument, following, read_documents
from bayes_dispatch.inference.scoring.scores import Comparison, Score, ScoredTokens, SystemComparison
from bayes_dispatch.inference.two_pass.blends import Blend, Particles, as_blend
from bayes_dispatch.inference.two_pass.filtering import ParticleFilter, entropy_of, predictive
from bayes_dispatch.inference.two_pass.system import Strategy, System, as_strategy
from bayes_dispatch.model.backbone import Backbone

__all__ = ["compare_blends", "compare_systems", "score_together"]

_Mixture = tuple[np.ndarray, Tensor]  # which rows of a reading the particles are, and their log masses
KEPT_AT_ONCE = 2**16  # rows times tokens, padded, of the documents that are scored together


@torch.no_grad()
def compare_blends(
    bundle: System,
    documents: Sequence[Document],
    blends: Sequence[Blend | str],
    seed: int = 0,
    progress: bool = False,
    strategy: Strategy | None = None,
) -> Comparison:
    """Score documents under several blends of the same posterior, whose evidence is each document's prompt.

    Documents with the same prompt, such as the answers to a question, have the same draws of it.

    Args:
        bundle: model, tokenizer, experts and dispatcher. documents: with at least one prompt byte and one scored byte.
        blends: all different, or their names (``as_blend``); that of an expert, or ``"base"``, is a blend, too.
        seed: of the posterior draws. progress: show a progress bar.
        strategy: gives the posterior; the bundle's dispatcher by default.

    Raises:
        ConfigError: no blend, two equal blends, no document, or one without scored bytes, or longer than the model can
            read.
        UnknownNameError: an unknown name. PromptError: a document without prompt. TensorError: the model says NaN.
    """
    if isinstance(blends, str):
        raise ConfigError(f"expected a list of blends, got the name {blends!r} alone")
    chosen = [as_blend(blend, bundle.experts.components) for blend in blends]
    names = [blend.name for blend in chosen]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"expected blends that all differ, got {', '.join(names) or 'none'}")
    _check(documents)
    prompts = [document.prompt for document in documents]
    posterior = as_strategy(strategy).posterior(bundle, prompts, a_seed(seed))
    particles = {blend.name: blend.particles(posterior) for blend in chosen}
    found = score_together(bundle.model, bundle.experts, documents, particles, progress)
    return Comparison(tuple(score for name in names for score in found[name]))


def compare_systems(
    systems: Mapping[str, Any],
    documents: Sequence[Document],
    blends: Sequence[Blend | str],
    seed: int = 0,
    progress: bool = False,
    score: Callable[..., Comparison] = compare_blends,
) -> SystemComparison:
    """The same documents under the same blends of several systems (A/B).

    Two dispatchers, or two banks, for one model are two bundles: ``dataclasses.replace(bundle, dispatcher=other,
    gate=None)``; a gate belongs to the dispatcher that it was calibrated for.

    Args:
        systems: name → model, tokenizer, experts and dispatcher; their experts may differ.
        documents, blends, seed, progress: as in ``compare_blends``, for each of them.
        score: scores one of them, given these: ``compare_blends`` here, or what does its work elsewhere for systems
            that are named otherwise.

    Raises:
        ConfigError: fewer than two systems, and as in ``compare_blends``. PromptError: as there.
    """
    if len(systems) < 2:
        raise ConfigError(f"expected at least 2 systems, got {len(systems)}")
    return SystemComparison(
        {name: score(system, documents, blends, seed, progress) for name, system in systems.items()}
    )


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
        ConfigError: no document, or one without scored bytes, or longer than the model can read.
        TensorError: the model says NaN.
    """
    _check(documents)
    texts = [TokenDocument.of(document, model.tokenizer) for document in documents]
    _check_tokens(texts, model.longest)
    weights, places = _distinct(_alike([each.run for each in particles.values()]))
    scores: dict[str, list[Score]] = {name: [] for name in particles}
    rows = {name: each.mass.shape[1] + each.refined for name, each in particles.items()}
    with tqdm(total=len(documents), desc="documents", disable=None if progress else True) as bar:
        for part in _groups(texts, [len(own) for own in weights]):
            group, whole = texts[part], documents[part]
            readings = read_documents(model, experts, group, weights[part])
            shared: dict[str, _Mixture] = {}
            runs = [(weights[part], readings, shared)]
            for (name, each), place in zip(particles.items(), places, strict=True):
                first = None if filtered_from is None else filtered_from.get(name)
                own, which = each.select(part), place[part]
                begin = (
                    None
                    if first is None
                    else [int((t.starts < b).sum()) for t, b in zip(group, first[part], strict=True)]
                )
                last = [text.tokens_before(each.prompt_bytes) for text, each in zip(group, whole, strict=True)]
                masses = _log_masses(readings, which, own, last, begin)
                if not each.refined:
                    shared[name] = which, masses
                    continue
                mean = list(_refined(masses, last, own))
                alone = which[:, :1] * 0, torch.zeros_like(masses[:, :, :1])
                runs.append((mean, read_documents(model, experts, group, mean), {name: alone}))
            for run, found, mixtures in runs:
                for n, text in enumerate(group):
                    after = following(model, experts, run[n], found[n].hidden)
                    one = {name: (which[n], masses[n]) for name, (which, masses) in mixtures.items()}
                    for name, scored in _scored(after, text, one).items():
                        if np.isnan(scored.log_probability).any():
                            of = f"of document {part.start + n} under {name}"
                            raise TensorError(f"expected finite log-probabilities {of}, got NaN")
                        scores[name].append(Score.of(part.start + n, name, scored, text.sizes, rows[name]))
            bar.update(len(group))
    return scores


def _log_masses(
    readings: Sequence[DocumentReading],
    place: np.ndarray,
    particles: Particles,
    last: Sequence[int],
    filtered_from: Sequence[int] | None,
) -> Float[Tensor, "N after S"]:
    """The log masses that each token is predicted with, and those after the last.

    Args:
        place: (N, S), which row of its reading each particle is. last: (N,), tokens of the prompt.
        filtered_from: (N,), the first token that moves them.
    """
    lengths = torch.tensor([reading.own.shape[1] for reading in readings])
    longest, count = int(lengths.max()), place.shape[1]
    if count == 1:
        return torch.zeros(len(readings), longest + 1, 1, dtype=torch.double)
    own = torch.zeros(len(readings), count, longest, dtype=torch.double)
    for n, reading in enumerate(readings):
        own[n, :, : lengths[n]] = reading.own[torch.from_numpy(place[n])]
    first = torch.zeros(len(own)) if filtered_from is None else torch.tensor(list(filtered_from))
    t, masses = torch.arange(longest), ParticleFilter(particles)
    before, of_prompt = masses.log_weights[:, None], t < torch.tensor(list(last))[:, None]
    counts = (t >= first[:, None]) & (t < lengths[:, None])
    in_prompt = masses.update(own, counts & of_prompt)
    masses.state = masses.state.aimed(particles.target)
    return torch.cat([before, torch.where(of_prompt[..., None], in_prompt, masses.update(own, counts & ~of_prompt))], 1)


def _alike(weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(N, S_i, K + 1) weights as they are; where others are by layer, (N, S_i, L, K + 1), repeated for each layer."""
    layers = {each.shape[2] for each in weights if each.ndim == 4}
    if not layers:
        return list(weights)
    return [each if each.ndim == 4 else each[:, :, None].repeat(max(layers), 2) for each in weights]


def _scored(
    following: Iterable[Float[Tensor, "W p V"]], text: TokenDocument, mixtures: Mapping[str, _Mixture]
) -> dict[str, ScoredTokens]:
    """A document under each of some sets of particles.

    Args:
        following: of all rows at its scored tokens, some tokens after the other.
        mixtures: name → (S,) rows and (after, S) log masses.
    """
    places, true = torch.from_numpy(text.places), torch.tensor(text.ids[1:])[text.places]
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in mixtures}
    start = 0
    for after in following:
        part = slice(start, start + after.shape[1])
        entropy = entropy_of(after)
        for name, (rows, log_masses) in mixtures.items():
            mixed = predictive(log_masses[places[part]], after[rows].transpose(0, 1), entropy[rows].T)
            said = mixed.log_probabilities.gather(1, true[part, None])[:, 0]
            top = mixed.log_probabilities.max(1)
            confidence, right = top.values.exp().clamp(max=1), top.indices == true[part]
            found[name].append((said, confidence, right, mixed.entropy, mixed.mutual_information))
        start = part.stop
    scored: dict[str, ScoredTokens] = {}
    for name, own in found.items():
        log_p, sure, hits, entropies, parts = (torch.cat(each).numpy() for each in zip(*own, strict=True))
        scored[name] = ScoredTokens(log_p, sure, hits, entropies, parts, text.scored_bytes)
    return scored


def _refined(
    log_masses: Float[Tensor, "N after S"], last: Sequence[int], particles: Particles
) -> Float[np.ndarray, "N 1 components"]:
    """The mean of each document's particles, filtered by its prompt, which has ``last`` tokens."""
    masses = log_masses[torch.arange(len(last)), torch.tensor(list(last))].exp().numpy()
    return np.einsum("ns,nsk->nk", masses, particles.weights)[:, None]


def _groups(texts: Sequence[TokenDocument], rows: Sequence[int]) -> Iterator[slice]:
    """Documents that follow one another, of which no more is kept than may be; ``rows``: of each."""
    start = longest = most = 0
    for n, (text, own) in enumerate(zip(texts, rows, strict=True)):
        longest, most = max(longest, len(text.ids)), max(most, own)
        if n > start and (n - start + 1) * longest * most > KEPT_AT_ONCE:
            yield slice(start, n)
            start, longest, most = n, len(text.ids), own
    yield slice(start, len(texts))


def _distinct(weights: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Distinct rows of (N, S_i, …) weights, (W_n, …) for each n, and where each is, (N, S_i)."""
    together = np.concatenate(weights, axis=1)
    rows, where = zip(*(np.unique(each, axis=0, return_inverse=True) for each in together), strict=True)
    cuts = np.cumsum([each.shape[1] for each in weights])[:-1]
    return list(rows), np.split(np.stack([each.reshape(-1) for each in where]), cuts, axis=1)


def _check(documents: Sequence[object]) -> None:
    if isinstance(documents, str | bytes) or not documents:
        raise ConfigError(f"expected a list of at least one document, got {repr(documents)[:60]}")
    for index, document in enumerate(documents):
        if not isinstance(document, Document):
            expected = f"expected document {index} to be a Document(text, prompt_bytes), whose bytes after the prompt"
            raise ConfigError(f"{expected} are scored, got {document!r:.40}")
        if not any(stop > start for start, stop in document.ranges):
            raise ConfigError(f"expected document {index} to have scored bytes, got none")


def _check_tokens(texts: Sequence[TokenDocument], longest: int | None) -> None:
    for index, text in enumerate(texts):
        if longest is not None and len(text.ids) > longest:
            raise ConfigError(f"expected document {index} to have at most {longest} tokens, got {len(text.ids)}")
        if not len(text.places):
            raise ConfigError(f"expected document {index} to have a token that begins in a scored range, got none")
