"""Prompts of known weights: drawn from a known program, or documents read by the shipped model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayes_dispatch.app.bundle import SHIPPED
from bayes_dispatch.app.training.build import PROGRAM
from bayes_dispatch.dispatcher.evidence.evidence import LENGTHS, Evidence
from bayes_dispatch.dispatcher.exact.supports import SupportPrior
from bayes_dispatch.dispatcher.fitting.svi import isolated
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.dispatcher.program.views import CountsView, VectorsView
from bayes_dispatch.experts.domains import BASE_TEXTS, EXPERT_DOMAINS, FOREIGN_TEXTS
from bayes_dispatch.inference.scoring.evidence_sets import (
    KnownEvidence,
    base_evidence,
    foreign_evidence,
    mixed_evidence,
    pure_evidence,
)
from bayes_dispatch.inference.two_pass.first_pass import depths_of
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

__all__ = ["LENGTHS_JUDGED", "Problem", "Sizes", "World", "shipped", "simulated"]

LENGTHS_JUDGED = (32, 64, 128)
SPAN = (16, 256)  # shortest and longest mixture that is judged
FITTED = (16, 1024)  # of the prompts to fit on, as the bundle's
STRANGERS = 2  # experts whose prompts are foreign
DIMENSIONS, CLASSES = 12, 13


@dataclass(frozen=True)
class Sizes:
    """How many prompts.

    Attributes:
        pure: labelled prompts of each expert to fit on, and prompts that base explains. mixed: of known mixture.
        judged: held-out prompts of each expert at each length, and foreign ones. mixtures: held-out mixtures.
    """

    pure: int = 500
    mixed: int = 3000
    judged: int = 200
    mixtures: int = 2000


@dataclass(frozen=True, eq=False)
class Problem:
    """One data set of one seed.

    Attributes:
        experts: K names. train: to fit on. pure: held-out prompts of one expert by length.
        mixed: held-out mixtures. foreign: prompts that no expert serves, of the longest length.
        program: what the dispatcher fits.
    """

    experts: tuple[str, ...]
    train: KnownEvidence
    pure: Mapping[int, KnownEvidence]
    mixed: KnownEvidence
    foreign: KnownEvidence
    program: Admixture = field(default_factory=Admixture)


class World:
    """A program with known globals, drawn from its prior; the last ``STRANGERS`` experts have no label.

    Args:
        experts: K. seed: of the globals.
    """

    def __init__(self, experts: int, seed: int) -> None:
        self.experts = experts
        self.views = (VectorsView(DIMENSIONS), CountsView(CLASSES))
        model = DispatchModel(experts + STRANGERS, self.views)
        with isolated(seed):
            self.sites = model.sample_globals()

    def draw(self, weights: np.ndarray, lengths: np.ndarray, seed: int) -> Evidence:
        """Evidence of prompts with these weights ``(N, K+1)``, base last, and lengths ``(N,)``."""
        strangers = np.zeros((len(weights), STRANGERS))
        return self._draw(np.hstack([weights[:, :-1], strangers, weights[:, -1:]]), lengths, seed)

    def draw_foreign(self, count: int, length: int, seed: int) -> Evidence:
        """Evidence of prompts of the strangers."""
        weights = np.zeros((count, self.experts + STRANGERS + 1))
        weights[np.arange(count), self.experts + np.arange(count) % STRANGERS] = 1
        return self._draw(weights, np.full(count, length), seed)

    def _draw(self, weights: np.ndarray, lengths: np.ndarray, seed: int) -> Evidence:
        long = torch.as_tensor(lengths, dtype=torch.float32)
        given = (torch.as_tensor(weights, dtype=torch.float32) + 1e-6) / (1 + 1e-6 * weights.shape[1])
        present = {view.name: torch.zeros(len(long), dtype=torch.bool) for view in self.views}
        prompts = Prompts(long, {"counts": long}, present)
        with isolated(seed), torch.no_grad():
            views = {
                view.name: view.likelihood(self.sites, given, prompts, torch.ones(len(long))).sample().double().numpy()
                for view in self.views
            }
        return Evidence(views, lengths)


def simulated(seed: int, sizes: Sizes, experts: int = 8) -> Problem:
    """Prompts of a program that is drawn anew for each seed; mixtures come from its prior of weights."""
    world = World(experts, seed)
    rng = np.random.default_rng([seed, 5])
    pure_labels = np.repeat(np.arange(experts + 1), sizes.pure)  # the last is base
    mixtures = _mixtures(rng, sizes.mixed + sizes.mixtures, world)
    weights = np.concatenate([np.eye(experts + 1)[pure_labels], mixtures[: sizes.mixed]])
    labels = np.where(np.arange(len(weights)) < experts * sizes.pure, weights.argmax(1), -1)
    train = KnownEvidence(
        world.draw(weights, _lengths(rng, len(weights), FITTED), 10 * seed + 1),
        labels,
        np.where(labels[:, None] >= 0, np.nan, weights),
    )
    judged = np.repeat(np.arange(experts), sizes.judged)
    nothing = np.full((len(judged), experts + 1), np.nan)
    pure = {
        length: KnownEvidence(
            world.draw(np.eye(experts + 1)[judged], np.full(len(judged), length), 10 * seed + 2 + index),
            judged,
            nothing,
        )
        for index, length in enumerate(LENGTHS_JUDGED)
    }
    held_out = mixtures[sizes.mixed :]
    mixed = world.draw(held_out, _lengths(rng, len(held_out), SPAN), 10 * seed + 6)
    foreign = world.draw_foreign(2 * sizes.judged, LENGTHS_JUDGED[-1], 10 * seed + 7)
    return Problem(
        tuple(f"expert {k}" for k in range(experts)),
        train,
        pure,
        KnownEvidence(mixed, np.full(len(mixed), -1), held_out),
        KnownEvidence(foreign, np.full(len(foreign), -1), np.full((len(foreign), experts + 1), np.nan)),
    )


def shipped(seed: int, sizes: Sizes, work: Path, block: int = 0) -> Problem:
    """Documents of the shipped experts' domains, read by the shipped model; evidence is kept under ``work``, where
    names of files tell of which model it is, and of which of its blocks.

    The dispatcher is fitted as the bundle's is. ``block`` is the first adapted one."""
    work.mkdir(parents=True, exist_ok=True)
    model = MambaFormerForCausalLM.from_pretrained(SHIPPED / "model")
    count, other, fingerprint = len(EXPERT_DOMAINS), 1000 * seed, model.fingerprint()[:12]

    def make(name: str) -> KnownEvidence:
        if name == "train":
            return KnownEvidence.concatenate(
                [
                    pure_evidence(model, EXPERT_DOMAINS, sizes.pure, FITTED, "train", other, cut=block),
                    mixed_evidence(model, EXPERT_DOMAINS, sizes.mixed, FITTED, "train", other, cut=block),
                    base_evidence(model, BASE_TEXTS, count, sizes.pure, FITTED, "train", other, block),
                ]
            )
        if name == "mixed":
            return mixed_evidence(model, EXPERT_DOMAINS, sizes.mixtures, SPAN, "held_out", other + 1, cut=block)
        if name == "foreign":
            both = (LENGTHS_JUDGED[-1], LENGTHS_JUDGED[-1])
            return foreign_evidence(model, FOREIGN_TEXTS, count, sizes.judged, both, other + 1, block)
        both = (int(name), int(name))
        return pure_evidence(model, EXPERT_DOMAINS, sizes.judged, both, "held_out", other + 1 + int(name), cut=block)

    def get(name: str) -> KnownEvidence:
        parts = (sizes.pure, sizes.mixed, sizes.judged, sizes.mixtures, seed)
        below = f"-below-{block}" if block else ""
        seen = "".join(f"-after-{depth}" for depth in depths_of(block or model.depth))
        file = work / f"{name}-{'-'.join(map(str, parts))}{below}{seen}-{fingerprint}.npz"
        if not file.exists():
            _write(file, make(name))
        return _read(file)

    names: Sequence[str] = [domain.name for domain in EXPERT_DOMAINS]
    pure = {length: get(str(length)) for length in LENGTHS_JUDGED}
    return Problem(tuple(names), get("train"), pure, get("mixed"), get("foreign"), PROGRAM)


def _mixtures(rng: np.random.Generator, count: int, world: World) -> np.ndarray:
    """``(count, K+1)`` weights from the program's prior, shares ``pi`` drawn once."""
    model = DispatchModel(world.experts, world.views)
    pi = rng.dirichlet(model.prior_of_shares().double().numpy())
    return SupportPrior(model.sizes, model.label_shares(pi)).draw(count, rng)


def _lengths(rng: np.random.Generator, count: int, span: tuple[int, int]) -> np.ndarray:
    return np.exp(rng.uniform(np.log(span[0]), np.log(span[1] + 1), count)).astype(int)


def _write(file: Path, known: KnownEvidence) -> None:
    evidence = known.evidence
    arrays: dict[str, Any] = {f"view.{name}": values for name, values in evidence.views.items()}
    arrays |= {f"missing.{name}": mask for name, mask in evidence.missing.items()}
    arrays |= {"labels": known.labels, "mixtures": known.mixtures, LENGTHS: evidence.known_lengths()}
    part = file.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(file)


def _read(file: Path) -> KnownEvidence:
    with np.load(file, allow_pickle=False) as arrays:
        views = {name.removeprefix("view."): arrays[name] for name in arrays if name.startswith("view.")}
        missing = {name.removeprefix("missing."): arrays[name] for name in arrays if name.startswith("missing.")}
        return KnownEvidence(Evidence(views, arrays[LENGTHS], missing), arrays["labels"], arrays["mixtures"])
