"""Whether the serving prior keeps its word: coverage of its 90% intervals after streams of events, and time per event.

    python benchmarks/online.py            # half a minute
    python benchmarks/online.py --markdown

Shares are drawn from the initial Dirichlet of eight experts and base, labels from the floored shares.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bayes_dispatch.dispatcher.prior.moment_filter import (
    dirichlet_moments,
    label_probability,
    share_intervals,
    total_precision,
    update_moments,
)
from bayes_dispatch.dispatcher.prior.online import (
    RELIABILITY,
    evidence_likelihood,
    feedback_likelihood,
    label_likelihood,
    observe,
    prior_state,
)

INITIAL = np.array([3.0] * 8 + [1.5])
NAMES = (*(f"expert {k}" for k in range(8)), "base")
SEPARATION = 1.5  # of the prompts of different labels, in standard deviations

Moments = tuple[np.ndarray, np.ndarray]
Update = Callable[[np.ndarray, np.ndarray, np.ndarray], Moments]


class Events(Protocol):
    """What a kind of event says about labels."""

    def __call__(self, rng: np.random.Generator, labels: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Likelihoods ``(S, K+1)`` of one event in each stream, given its label ``(S,)`` and E[pi] ``(S, K+1)``."""


@dataclass(frozen=True)
class Labels:
    """The label itself."""

    def __call__(self, rng: np.random.Generator, labels: np.ndarray, mean: np.ndarray) -> np.ndarray:
        return label_likelihood(labels, mean.shape[1])


@dataclass(frozen=True)
class Rewards:
    """A reward for a component that was drawn from the mean, or uniformly with probability ``exploration``.

    Where ``greedy``, the component of the largest mean serves in place of a draw. A graded reward is Beta(2, 1) where a
    Bernoulli one would be 1 and Beta(1, 2) where it would be 0, so that it is the probability of 1.
    """

    graded: bool = False
    greedy: bool = False
    exploration: float = 0.2

    def __call__(self, rng: np.random.Generator, labels: np.ndarray, mean: np.ndarray) -> np.ndarray:
        served = mean.argmax(1) if self.greedy else draw(rng, mean)
        explored = rng.integers(0, mean.shape[1], len(mean))
        served = np.where(rng.random(len(mean)) < self.exploration, explored, served)
        return feedback_likelihood(served, reward(rng, served == labels, self.graded), mean.shape[1])


@dataclass(frozen=True)
class PromptRewards:
    """A reward for a component that was drawn from the prompt's own posterior, which enters where ``evidence``."""

    evidence: bool = True

    def __call__(self, rng: np.random.Generator, labels: np.ndarray, mean: np.ndarray) -> np.ndarray:
        prompts = SEPARATION * np.eye(mean.shape[1])[labels] + rng.normal(size=mean.shape)
        posterior = label_probability(mean) * np.exp(SEPARATION * (prompts - prompts.max(1, keepdims=True)))
        posterior /= posterior.sum(1, keepdims=True)
        served = draw(rng, posterior)
        likelihood = feedback_likelihood(served, reward(rng, served == labels, False), mean.shape[1])
        return likelihood * evidence_likelihood(posterior, mean) if self.evidence else likelihood


def draw(rng: np.random.Generator, probabilities: np.ndarray) -> np.ndarray:
    """``(S,)`` one component of each row."""
    below = rng.random((len(probabilities), 1)) > probabilities.cumsum(1)[:, :-1]
    return below.sum(1)


def reward(rng: np.random.Generator, hit: np.ndarray, graded: bool) -> np.ndarray:
    """``(S,)`` rewards, given whether the served component was the label."""
    success = rng.random(len(hit)) < np.where(hit, RELIABILITY, 1 - RELIABILITY)
    return rng.beta(np.where(success, 2.0, 1.0), np.where(success, 1.0, 2.0)) if graded else success.astype(np.float64)


def expected_counts(mean: np.ndarray, covariance: np.ndarray, likelihood: np.ndarray) -> Moments:
    """What not to do: a Dirichlet's count is spread over the labels by their probabilities."""
    joint = mean * likelihood
    return dirichlet_moments(mean * total_precision(mean, covariance) + joint / joint.sum(-1, keepdims=True))


def coverage(
    events: Events, update: Update = update_moments, streams: int = 200, length: int = 500, seed: int = 0
) -> np.ndarray:
    """``(K+1,)`` share of streams whose 90% interval of each component's share holds the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet(INITIAL, streams)
    mean, covariance = dirichlet_moments(np.tile(INITIAL, (streams, 1)))
    for _ in range(length):
        labels = draw(rng, label_probability(truth))
        mean, covariance = update(mean, covariance, events(rng, labels, mean))
    lower, upper = share_intervals(mean, covariance, 0.9)
    return ((lower <= truth) & (truth <= upper)).mean(0)


def microseconds(events: int = 500) -> float:
    """Time of one event in :func:`observe`, the best of five runs."""
    rng = np.random.default_rng(0)
    likelihoods = feedback_likelihood(rng.integers(0, 9, events), rng.random(events), 9)
    state, times = prior_state(INITIAL, NAMES), []
    for _ in range(5):
        start = time.perf_counter()
        observe(state, likelihoods)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times) / events


ROWS: tuple[tuple[str, Events, Update], ...] = (
    ("labels", Labels(), update_moments),
    ("rewards of 0 or 1", Rewards(), update_moments),
    ("graded rewards", Rewards(graded=True), update_moments),
    ("rewards and evidence, served by the prompt", PromptRewards(), update_moments),
    ("the same without the evidence", PromptRewards(evidence=False), update_moments),
    ("rewards, served greedily", Rewards(greedy=True, exploration=0.1), update_moments),
    ("rewards, expected counts added", Rewards(), expected_counts),
)


def main(
    streams: Annotated[int, typer.Option(help="streams of a seed")] = 200,
    length: Annotated[int, typer.Option(help="events of a stream")] = 500,
    seeds: Annotated[int, typer.Option(help="seeds, from 0")] = 3,
    markdown: Annotated[bool, typer.Option(help="print the table as Markdown")] = False,
) -> None:
    """Measure and print."""
    rows = []
    for name, events, update in ROWS:
        found = np.stack([coverage(events, update, streams, length, seed) for seed in range(seeds)])  # (seed, K+1)
        each = " ".join(f"{share:.3f}" for share in found.mean(1))
        experts = found.mean(0)[:-1]
        rows.append((name, each, f"{experts.min():.2f} to {experts.max():.2f}", f"{found[:, -1].mean():.2f}"))
    header = ("events", "all components, by seed", "experts, all seeds", "base")
    cost = f"{microseconds():.0f} µs an event, 9 components"
    if markdown:
        print("\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * 4, *rows)))
        return print(f"\n{cost}")
    table = Table(*header, title=f"Coverage of 90% intervals, {streams} streams of {length} events")
    for row in rows:
        table.add_row(*row)
    Console().print(table, cost, sep="\n")


if __name__ == "__main__":
    typer.run(main)
