"""A document under every method: rows of weights read together, a search of weights, and rivals that route tokens."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import bayes_dispatch as bd
from bayes_dispatch.app.training.build import BuildSettings, known_by, training_evidence
from bayes_dispatch.app.training.documents import DocumentsPlan, examples_of
from bayes_dispatch.dispatcher.evidence.files import read_evidence, write_evidence
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import Domain
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.inference.scoring.compare import score_together
from bayes_dispatch.inference.scoring.document_reader import TokenDocument
from bayes_dispatch.inference.scoring.evidence_sets import KnownEvidence
from bayes_dispatch.inference.scoring.scores import ScoredTokens
from bayes_dispatch.inference.two_pass.blends import Particles, as_blend
from bayes_dispatch.inference.two_pass.first_pass import depths_of, read_prefix
from bayes_dispatch.inference.two_pass.system import POSTERIOR_DRAWS, cut_of, dispatch
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.generation.sampling import row_seeds
from bayes_dispatch.storage import digest
from dispatching.classifiers import Classifier, fit_classifier, logistic_regression
from real.routers import Router, arrow, spectr
from real.sets import Case

__all__ = [
    "GROUPS",
    "ROUTERS",
    "Contest",
    "Nats",
    "contest",
    "evidence_of_build",
    "takes_routers",
]

OURS, FLAT = "posterior_predictive", "flat dispatcher"
BLENDS = ("best_expert", "posterior_mean", "top_k(2)", "refined_mean(16)", OURS)
ROUTERS = {"Arrow": arrow, "SpectR": spectr}
PAIR, HARD, UNIFORM, SEARCH = "best fixed pair", "hard routing", "uniform merge", "LoraHub search"
GROUPS = ("experts", PAIR, HARD, UNIFORM, SEARCH, *ROUTERS, *BLENDS, FLAT)  # "experts": base, each one, the right one
SHARES = (0.25, 0.5, 0.75)  # of the first of a fixed pair
BUDGET, CANDIDATES, PENALTY, BOUND = 40, 6, 0.05, 1.5  # of the search


class Nats(NamedTuple):
    """−log p of the scored tokens of a document, and the share of its scored ranges that greedy decoding gets right."""

    total: float
    exact: float


@dataclass(frozen=True, eq=False)
class Contest:
    """A bundle and its rivals.

    Attributes:
        hard: chooses one expert; ``None`` where that is not asked for. routers: none where experts are no LoRAs.
    """

    bundle: bd.Bundle
    hard: Classifier | None
    routers: dict[str, Router]

    @torch.no_grad()
    def scores(self, cases: Sequence[Case], groups: Sequence[str], seed: int) -> list[dict[str, Nats]]:
        """Method → its score, for each document; of all ``groups`` that there are, or of components."""
        documents, model = [case.document for case in cases], self.bundle.model
        texts = [TokenDocument.of(document, model.tokenizer) for document in documents]
        particles = self.particles(cases, groups, seed)
        read = score_together(model, self.bundle.experts, documents, particles) if particles else {}
        found: list[dict[str, Nats]] = []
        for n, (case, text) in enumerate(zip(cases, texts, strict=True)):
            own = {name: scores[n] for name, scores in read.items()}
            nats = {name: Nats(score.nll * text.scored_bytes, score.exact_match) for name, score in own.items()}
            pairs = [nats.pop(name) for name in [*nats] if name.startswith(PAIR)]
            if pairs:
                nats[PAIR] = min(pairs)
            if "experts" in groups and set(case.owners) <= own.keys():
                nats["right expert"] = _by_range([own[name].scored for name in case.owners], case, text)
            if SEARCH in groups:
                nats[SEARCH] = judged(self.under(text, self.searched(case, seed)[None]), text)
            for name in self.routers.keys() & set(groups):
                logits = self.routers[name](torch.tensor([text.ids]))[0, text.places]
                wide = torch.promote_types(logits.dtype, torch.float32)
                nats[name] = judged(logits.log_softmax(-1, dtype=wide), text)
            found.append(nats)
        return found

    def particles(self, cases: Sequence[Case], groups: Sequence[str], seed: int) -> dict[str, Particles]:
        """What is read together, by method."""
        bundle, count = self.bundle, len(cases)
        names, corners = bundle.experts.components, np.eye(len(bundle.experts.components))
        prompts = [case.document.prompt for case in cases]

        def fixed(weights: np.ndarray) -> Particles:
            return Particles.single(np.broadcast_to(weights, (count, len(names))).copy())

        chosen = names if "experts" in groups else [name for name in names if name in groups]
        found = {name: fixed(corners[names.index(name)]) for name in chosen}
        mixed = [corners[names.index(name)] for name in cases[0].domains if name in names and PAIR in groups]
        for one, other in combinations(mixed, 2):
            for share in SHARES:
                found[f"{PAIR} {len(found)}"] = fixed(share * one + (1 - share) * other)
        if UNIFORM in groups:
            found[UNIFORM] = fixed(corners[:-1].mean(0))
        if not {HARD, FLAT, *BLENDS} & set(groups):
            return found
        posterior, evidence = dispatch(bundle, prompts, seed)
        if HARD in groups:
            assert self.hard is not None
            found[HARD] = Particles.single(corners[self.hard(evidence).best.argmax(1)])
        found |= {name: as_blend(name).particles(posterior) for name in BLENDS if name in groups}
        if FLAT in groups:
            seeds = [row_seeds(seed, [prompt.encode()])[0] for prompt in prompts]
            flat = bd.Dispatcher.flat(bundle.experts.names).posterior(evidence, draws=POSTERIOR_DRAWS, seed=seeds)
            found[FLAT] = as_blend(OURS).particles(flat)
        return found

    def searched(self, case: Case, seed: int) -> np.ndarray:
        """(K,) weights that make the answers within the prompt most probable: LoraHub (arXiv 2307.13269), nearly.

        Its budget of 40 trials, its bounds and its penalty of .05 mean |w|; but whole updates are merged (``cat``), and
        in the place of nevergrad, trials are base, each expert, their mean, and then rounds of normal steps from the
        best, which halve where a round finds nothing better.
        """
        text = TokenDocument.of(bd.Document(case.document.prompt, 0, case.shown), self.bundle.tokenizer)
        count, rng = len(self.bundle.experts), np.random.default_rng([seed, 11])

        def losses(trials: np.ndarray) -> np.ndarray:
            own = self.under(text, trials, following=False)
            return -own[:, text.places].double().mean(1).numpy() + PENALTY * np.abs(trials).mean(1)

        trials = np.vstack([np.zeros(count), np.eye(count), np.full(count, 1 / count)])
        loss, step = losses(trials), 0.25
        best, least = trials[loss.argmin()], loss.min()
        for _ in range((BUDGET - len(trials)) // CANDIDATES):
            drawn = np.clip(best + rng.normal(0, step, (CANDIDATES, count)), -BOUND, BOUND)
            loss = losses(drawn)
            if loss.min() < least:
                best, least = drawn[loss.argmin()], loss.min()
            else:
                step /= 2
        return best

    @torch.no_grad()
    def under(self, text: TokenDocument, weights: np.ndarray, following: bool = True) -> Tensor:
        """A document under any weights (W, K), on the simplex or not: log-probabilities of its tokens (W, T), or
        of all that may follow at the scored places of the first row (P, V)."""
        bundle, rows = self.bundle, len(weights)
        cut, width = cut_of(bundle), len(text.ids)
        prefix = read_prefix(bundle.model, cut, [text.ids], 0, width)
        session = bundle.model.open(rows, width, merged(bundle.experts, weights), range(cut, bundle.model.depth))
        x = None if prefix.x is None else prefix.x.expand(rows, -1, -1)
        read = session.read(prefix.ids.expand(rows, -1), None, x, own=not following)
        if read.own is not None:
            return read.own[:, 1:]
        return session.after(read.hidden[:1, torch.from_numpy(text.places)])[0]


def contest(
    bundle: bd.Bundle,
    directory: Path,
    domains: Sequence[Domain],
    groups: Sequence[str],
    work: Path,
    settings: BuildSettings | None = None,
) -> Contest:
    """A bundle and what its rivals among ``groups`` take; the rest is as in ``evidence_of_build``."""
    hard = None
    if HARD in groups:
        hard = fit_classifier(logistic_regression, evidence_of_build(bundle, directory, domains, work, settings), 0)
    lora = takes_routers(bundle.experts)
    made = {name: make(bundle.model, bundle.experts) for name, make in ROUTERS.items() if lora and name in groups}
    return Contest(bundle, hard, made)


def evidence_of_build(
    bundle: bd.Bundle, directory: Path, domains: Sequence[Domain], work: Path, settings: BuildSettings | None = None
) -> KnownEvidence:
    """What the bundle's dispatcher was fitted on: as its build left it, or else as its recipe makes it.

    Args:
        directory: of the bundle; ``bayes-dispatch build`` leaves its evidence beside it, and what ships has none there.
        domains: of its experts, in order. work: where evidence that is made is kept.
        settings: of the recipe; those of ``train-documents`` by default.

    Raises:
        ConfigError: it was built there of several inputs.
    """
    left = list(directory.with_name(directory.name + ".work").rglob("train.npz"))
    if len(left) > 1:
        raise ConfigError(f"expected evidence of one build, got {left[0]} and {left[1]}: delete one")
    if left:
        return KnownEvidence(*read_evidence(left[0]))
    model, build = bundle.model, settings or DocumentsPlan.of("svf", bundle.model).build
    examples = examples_of(domains, build)
    texts = {name: each if isinstance(each, list) else known_by(each) for name, each in examples.items()}
    cut = cut_of(bundle)
    decides = {"model": model.fingerprint(), "dtype": str(model.dtype), "cut": cut}
    decides |= {"depths": depths_of(cut or model.depth)}
    decides |= {"build": asdict(build), "texts": list(texts.items())}
    path = work / f"training-{digest(decides)[:32]}.npz"
    if not path.exists():
        write_evidence(path, *training_evidence(model, bundle.experts, examples, (), build, progress=True))
    return KnownEvidence(*read_evidence(path))


def takes_routers(experts: bd.ExpertBank) -> bool:
    """Whether all experts are LoRAs."""
    return all(isinstance(expert, LoraExpert) for expert in experts.values())


def merged(experts: bd.ExpertBank, weights: np.ndarray) -> Adaptation:
    """The updates of K experts times weights (W, K), on the simplex or not: one row for each of the W."""
    one = experts.blend(torch.eye(len(experts) + 1, dtype=torch.double)[:-1])
    given = torch.from_numpy(weights)
    scales = {name: 1 + given @ (z - 1) for name, z in one.scales.items()}
    return Adaptation(scales, {name: delta._replace(c=given @ delta.c) for name, delta in one.deltas.items()})


def judged(after: Tensor, text: TokenDocument) -> Nats:
    """Log-probabilities (P, V) of all that may follow at the scored places."""
    true = torch.tensor(text.ids[1:])[text.places]
    said = after.gather(1, true[:, None]).double()
    return _nats(said.numpy(), (after.argmax(1) == true).numpy(), text)


def _by_range(scored: Sequence[ScoredTokens], case: Case, text: TokenDocument) -> Nats:
    """Each scored range under its own of these."""
    stops = [stop for _, stop in case.document.ranges]
    own = np.searchsorted(stops, text.starts[text.places], side="right"), np.arange(len(text.places))
    said, right = (np.stack([getattr(each, field) for each in scored])[own] for field in ("log_probability", "right"))
    return _nats(said, right, text)


def _nats(said: np.ndarray, right: np.ndarray, text: TokenDocument) -> Nats:
    parts = np.split(right, np.cumsum(text.sizes)[:-1])
    return Nats(-float(said.sum()), float(np.mean([part.all() for part in parts])))
