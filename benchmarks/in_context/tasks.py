"""The in-context tasks of Park et al. (2024, arXiv 2402.04248): prompts, how answers are judged, and classical answers.

A prompt is a sequence of vectors. It shows a function, new for each prompt, by examples, and asks for its values.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AssociativeRecall", "Baseline", "LinearRegression", "Prompts", "SparseParity", "Task"]


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts: ``inputs`` (B, T, W), and ``targets`` (B, Q, O) that are due at the ``places`` (Q,) of T."""

    inputs: Tensor
    places: Tensor
    targets: Tensor

    def to(self, device: str) -> "Prompts":
        return Prompts(self.inputs.to(device), self.places.to(device), self.targets.to(device))


Baseline = Callable[[Prompts], Tensor]  # answers (B, Q, O)


@dataclass(frozen=True)
class Task(ABC):
    """A distribution of prompts, and how answers (B, Q, O) to them are judged; its fields are its sizes."""

    name: ClassVar[str]
    score_name: ClassVar[str]  # of a number that is 1 where all answers are right

    @property
    @abstractmethod
    def width(self) -> int:
        """Of the input vectors, W."""

    @property
    def outputs(self) -> int:
        """Numbers of an answer, O."""
        return 1

    @property
    @abstractmethod
    def baselines(self) -> dict[str, Baseline]:
        """Answers without training, from chance to the best there are."""

    @abstractmethod
    def sample(self, batch: int, generator: torch.Generator, progress: float = 1.0) -> Prompts:
        """New prompts; ``progress`` is the part of the training that has passed, where there is a curriculum."""

    def loss(self, answers: Tensor, prompts: Prompts) -> Tensor:
        """What training makes small: the mean square error of all answers."""
        return F.mse_loss(answers, prompts.targets)

    @abstractmethod
    def score(self, answers: Tensor, prompts: Prompts) -> float:
        """A number that reads more easily than the loss."""


@dataclass(frozen=True)
class SparseParity(Task):
    """Signs x; y is the product of ``k`` of the ``bits``, which ones is to be inferred: x₁, y₁, x₂, y₂, …, xₙ."""

    bits: int
    k: int
    points: int

    name: ClassVar[str] = "parity"
    score_name: ClassVar[str] = "accuracy, last quarter"

    @property
    def width(self) -> int:
        return self.bits

    @property
    def baselines(self) -> dict[str, Baseline]:
        return {"chance": _zeros, "exact posterior": self.posterior}

    def sample(self, batch: int, generator: torch.Generator, progress: float = 1.0) -> Prompts:
        """The curriculum lets only the first bits vary; the others are 0."""
        active = _active(self.k, self.bits, progress)
        x = torch.randint(0, 2, (batch, self.points, self.bits), generator=generator).float() * 2 - 1
        chosen = torch.rand(batch, active, generator=generator).argsort(1)[:, None, : self.k]
        y = x.gather(2, chosen.expand(-1, self.points, -1)).prod(-1)
        x[..., active:] = 0
        return _examples(x, y)

    def loss(self, answers: Tensor, prompts: Prompts) -> Tensor:
        """Cross-entropy of all answers, which are logits of y = 1."""
        return F.binary_cross_entropy_with_logits(answers, (prompts.targets + 1) / 2)

    def score(self, answers: Tensor, prompts: Prompts) -> float:
        return float(_last_quarter((answers > 0) == (prompts.targets > 0)).float().mean())

    def posterior(self, prompts: Prompts) -> Tensor:
        """Bayes' rule over all choices of bits, from the examples before each query."""
        x, y = prompts.inputs[:, ::2], prompts.inputs[:, 1::2, :1]
        votes = torch.stack([x[..., list(chosen)].prod(-1) for chosen in combinations(range(self.bits), self.k)], -1)
        agrees = (votes[:, :-1] == y).long().cumprod(1)
        alive = torch.cat([torch.ones_like(agrees[:, :1]), agrees], 1)  # (B, n, choices)
        return ((alive * (votes > 0)).sum(-1, keepdim=True) / alive.sum(-1, keepdim=True)).logit(eps=1e-6)


@dataclass(frozen=True)
class LinearRegression(Task):
    """Gaussian x; y = w·x without noise, of variance 1; w is to be inferred: x₁, y₁, x₂, y₂, …, xₙ."""

    dimensions: int
    points: int

    name: ClassVar[str] = "regression"
    score_name: ClassVar[str] = "R², last quarter"

    @property
    def width(self) -> int:
        return self.dimensions

    @property
    def baselines(self) -> dict[str, Baseline]:
        return {"chance (zero)": _zeros, "least squares": self.least_squares}

    def sample(self, batch: int, generator: torch.Generator, progress: float = 1.0) -> Prompts:
        """The curriculum lets only the first dimensions vary; the others are 0."""
        active = _active(1, self.dimensions, progress)
        x = torch.randn(batch, self.points, self.dimensions, generator=generator)
        w = torch.randn(batch, self.dimensions, 1, generator=generator) / math.sqrt(active)
        x[..., active:] = 0
        return _examples(x, (x @ w)[..., 0])

    def score(self, answers: Tensor, prompts: Prompts) -> float:
        wrong, target = _last_quarter(answers - prompts.targets), _last_quarter(prompts.targets)
        return 1 - float(wrong.square().mean() / target.square().mean())

    def least_squares(self, prompts: Prompts) -> Tensor:
        """Of least norm, from the examples before each query: what Bayes' rule says of w ~ N(0, σ²I) without noise."""
        x, y = prompts.inputs[:, ::2].double(), prompts.inputs[:, 1::2, :1].double()
        answers = [torch.zeros_like(y[:, :1])]
        answers += [x[:, n : n + 1] @ torch.linalg.pinv(x[:, :n]) @ y[:, :n] for n in range(1, self.points)]
        return torch.cat(answers, 1).to(prompts.targets.dtype)


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Vector-valued multi-query recall, k₁, v₁, …, kₙ, vₙ, q₁, …: each query is a key, its answer that key's value.

    Keys and values are uniform on the sphere of radius √dimensions, so that a zero answer has a mean square error of 1.
    """

    pairs: int
    queries: int
    dimensions: int

    name: ClassVar[str] = "recall"
    score_name: ClassVar[str] = "nearest value is right"

    @property
    def width(self) -> int:
        return self.dimensions

    @property
    def outputs(self) -> int:
        return self.dimensions

    @property
    def baselines(self) -> dict[str, Baseline]:
        return {"chance (zero)": _zeros, "mean value": self.mean_value, "nearest key": self.nearest_key}

    def sample(self, batch: int, generator: torch.Generator, progress: float = 1.0) -> Prompts:
        """All pairs from the start: there is no curriculum."""
        drawn = torch.randn(batch, 2 * self.pairs, self.dimensions, generator=generator)
        context = F.normalize(drawn, dim=-1) * math.sqrt(self.dimensions)
        asked = torch.rand(batch, self.pairs, generator=generator).argsort(1)[:, : self.queries, None]
        asked = asked.expand(-1, -1, self.dimensions)
        queries, values = context[:, ::2].gather(1, asked), context[:, 1::2].gather(1, asked)
        places = torch.arange(self.queries) + 2 * self.pairs
        return Prompts(torch.cat([context, queries], 1), places, values)

    def score(self, answers: Tensor, prompts: Prompts) -> float:
        values = self.values(prompts).transpose(1, 2)
        return float(((answers @ values).argmax(-1) == (prompts.targets @ values).argmax(-1)).float().mean())

    def keys(self, prompts: Prompts) -> Tensor:
        return prompts.inputs[:, : 2 * self.pairs : 2]

    def values(self, prompts: Prompts) -> Tensor:
        return prompts.inputs[:, 1 : 2 * self.pairs : 2]

    def mean_value(self, prompts: Prompts) -> Tensor:
        return self.values(prompts).mean(1, keepdim=True).expand_as(prompts.targets)

    def nearest_key(self, prompts: Prompts) -> Tensor:
        queries = prompts.inputs[:, prompts.places]
        nearest = (queries @ self.keys(prompts).transpose(1, 2)).argmax(-1, keepdim=True)
        return self.values(prompts).gather(1, nearest.expand_as(prompts.targets))


def _examples(x: Tensor, y: Tensor) -> Prompts:
    """Prompts x₁, y₁, …, xₙ of x (B, n, W) and y (B, n); y stands in the first of W numbers, and is due at every x."""
    batch, points, width = x.shape
    pairs = torch.stack([x, F.pad(y[..., None], (0, width - 1))], 2)  # (B, n, 2, W)
    return Prompts(pairs.view(batch, 2 * points, width)[:, :-1], 2 * torch.arange(points), y[..., None])


def _active(least: int, most: int, progress: float) -> int:
    """The paper's curriculum, after Garg et al. (2022): more and more dimensions, all from half of the training on."""
    return min(most, least + int(2 * progress * (most - least)))


def _last_quarter(x: Tensor) -> Tensor:
    """Of the queries: those that have seen the most examples."""
    return x[:, -max(1, x.shape[1] // 4) :]


def _zeros(prompts: Prompts) -> Tensor:
    return torch.zeros_like(prompts.targets)
