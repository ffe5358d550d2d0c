"""A small world of known weights, and one dispatcher fitted on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from bayes_dispatch.dispatcher.evidence.evidence import Evidence

EXPERTS = ("sort", "reverse", "add")


class Sample(NamedTuple):
    """Evidence with its true weights; labels are −1 and mixtures NaN where the other is known."""

    evidence: Evidence
    weights: np.ndarray
    labels: np.ndarray
    mixtures: np.ndarray


def coarsely(dispatcher: Dispatcher, rounds: int = 0, **parts: Any) -> Dispatcher:
    """The same with coarse posteriors, quick to compute, and with other parts of its fit.

    Guarantees that hold whatever the posterior is have to hold of these.
    """
    made, state = copy.copy(dispatcher), replace(dispatcher.state, **parts)
    vars(state)["quadrature"] = replace(state.quadrature, rounds=rounds)
    made._served.known = state
    return made


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """Prompts of three experts that are far apart; every fourth is a mixture, and a few lack a view or their length."""
    from bayes_dispatch.dispatcher.evidence.evidence import Evidence

    world = np.random.default_rng(7)
    means, classes = world.normal(size=(4, 6)) * 2, world.dirichlet(np.full(5, 0.3), 4)
    means[3], classes[3] = 0, 1 / 5

    def make(count: int, seed: int, mixed: int = 4) -> Sample:
        rng = np.random.default_rng(seed)
        rows = np.arange(count)
        blend = rows % mixed == mixed - 1
        weights = np.where(blend[:, None], rng.dirichlet(np.full(4, 0.8), count), np.eye(4)[rows % 3])
        lengths = rng.integers(16, 129, count)
        hidden = weights @ means + 0.5 * rng.normal(size=(count, 6))
        counts = np.stack([rng.multinomial(n, p) for n, p in zip(lengths, weights @ classes, strict=True)])
        missing = {"hidden": rows % 11 == 5, "counts": rows % 13 == 6, "lengths": rows % 17 == 8}
        return Sample(
            Evidence({"hidden": hidden, "counts": counts}, lengths, missing),
            weights,
            np.where(blend, -1, rows % 3),
            np.where(blend[:, None], weights, np.nan),
        )

    return make


@pytest.fixture(scope="session")
def sample(make_sample: Callable[..., Sample]) -> Sample:
    """What the fitted dispatcher has seen."""
    return make_sample(160, 0)


@pytest.fixture(scope="session")
def fresh(make_sample: Callable[..., Sample]) -> Sample:
    """What it has not."""
    return make_sample(60, 1)


@pytest.fixture(scope="session")
def settings() -> Callable[..., dict[str, Any]]:
    """Settings of a fit that takes a fraction of a second; by default one that learns nothing much."""
    from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
    from bayes_dispatch.dispatcher.fitting.svi import SVISettings

    def make(svi: int = 4) -> dict[str, Any]:
        few = SVISettings(steps=svi, rounds=1, conditional_steps=0)
        return {"svi": few, "features": FeatureSettings(dimensions=3, folds=2)}

    return make


@pytest.fixture(scope="session")
def fitted(sample: Sample, settings: Callable[..., dict[str, Any]]) -> Dispatcher:
    """A dispatcher of three experts fitted on labels and mixtures; not to be changed."""
    from bayes_dispatch.dispatcher.estimator import Dispatcher

    dispatcher = Dispatcher(EXPERTS, **settings(svi=60))
    return dispatcher.fit(sample.evidence, sample.labels, sample.mixtures)
