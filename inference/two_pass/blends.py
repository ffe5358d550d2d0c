"""Blends: how a posterior over expert weights becomes the scales under which the second pass runs.

A blend answers with *particles*: blend weights, each run as one row of the model, with a prior mass. One particle is a
plain adapted model. Several are mixed token by token, and the tokens read so far say which of them fit (``filtering``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from bayes_dispatch.arguments import simplex
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, UnknownNameError

__all__ = [
    "BLENDS",
    "BestExpert",
    "Blend",
    "FixedWeights",
    "Particles",
    "PosteriorMean",
    "PosteriorPredictive",
    "RefinedMean",
    "ThompsonSample",
    "TopK",
    "blend_by_name",
]


@dataclass(frozen=True, eq=False)
class Particles:
    """Blend weights with prior masses, for each prompt.

    Attributes:
        weights: (prompt, particle, K + 1), each on the simplex.
        mass: (prompt, particle), prior probabilities, summing to 1 over the particles.
        switching: possible values of the probability, at each token, that the document changes its domain; equally
            probable at first, and filtered along with the particles. 0 alone: it never changes.
        flat: share of equal masses of the vertices (of all particles, where none is one) in the prior that a changed
            document draws its domain from. It does not depend on how many particles there are besides.
        merge: once the prompt is read, particles are run as one as long as the mixture is expected to change by no
            more than this many nats a token (``merging``); 0 for none.
        refined: once the prompt is read, the particles are replaced by one: their filtered mean.
        layers: (prompt, particle, L, K + 1), the weights that each of the L layers of the experts is run with
            (``ExpertBank.layers``), where these differ; then ``weights`` are what is told of a particle. ``None`` where
            all layers have ``weights``.

    Raises:
        ConfigError: weights by layer that are to be refined.
    """

    weights: np.ndarray
    mass: np.ndarray
    switching: tuple[float, ...] = (0.0,)
    flat: float = 0.0
    merge: float = 0.0
    refined: bool = False
    layers: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.refined and self.layers is not None:
            raise ConfigError("expected particles of the same weights in every layer to refine, got weights by layer")

    @property
    def run(self) -> np.ndarray:
        """The weights that rows of the model are run with: (prompt, particle, K + 1), or ``layers``."""
        return self.weights if self.layers is None else self.layers

    def select(self, prompts: slice | np.ndarray) -> "Particles":
        """The particles of some prompts."""
        layers = None if self.layers is None else self.layers[prompts]
        return replace(self, weights=self.weights[prompts], mass=self.mass[prompts], layers=layers)


@runtime_checkable
class Blend(Protocol):
    """A way to turn a posterior into particles."""

    @property
    def name(self) -> str: ...

    def particles(self, posterior: DispatchPosterior) -> Particles:
        """Particles for each prompt of ``posterior``."""
        ...


@dataclass(frozen=True)
class PosteriorMean:
    """One particle: the posterior mean of the weights."""

    name = "weighted_average"

    def particles(self, posterior: DispatchPosterior) -> Particles:
        return _single(posterior.mean)


@dataclass(frozen=True)
class TopK:
    """One particle: the ``k`` largest components of the posterior mean, renormalised."""

    k: int = 2
    name = "top_k"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"expected k of at least 1, got {self.k}")

    def particles(self, posterior: DispatchPosterior) -> Particles:
        mean = posterior.mean
        if self.k > mean.shape[1]:
            raise ConfigError(f"expected k of at most {mean.shape[1]} components, got {self.k}")
        kept = np.argsort(-mean, axis=1, kind="stable")[:, : self.k]
        weights = np.zeros_like(mean)
        np.put_along_axis(weights, kept, np.take_along_axis(mean, kept, axis=1), axis=1)
        return _single(weights / weights.sum(1, keepdims=True))


@dataclass(frozen=True)
class BestExpert:
    """One particle: all weight on the component of the largest posterior mean (hard routing)."""

    name = "max"

    def particles(self, posterior: DispatchPosterior) -> Particles:
        return _single(np.eye(posterior.mean.shape[1])[posterior.mean.argmax(1)])


@dataclass(frozen=True)
class ThompsonSample:
    """One particle: the first draw of the posterior."""

    name = "thompson"

    def particles(self, posterior: DispatchPosterior) -> Particles:
        return _single(posterior.weights[0])


@dataclass(frozen=True)
class FixedWeights:
    """One particle, the same for every prompt; a vertex is a single expert, or base."""

    weights: tuple[float, ...]
    name: str = "fixed"

    def __post_init__(self) -> None:
        simplex("weights", self.weights)

    @classmethod
    def vertex(cls, components: Sequence[str], component: str) -> "FixedWeights":
        """All weight on one component.

        Raises:
            UnknownNameError: ``component`` is none of ``components``.
        """
        if component not in components:
            raise UnknownNameError(f"expected a component of {', '.join(components)}, got {component!r}")
        return cls(tuple(float(name == component) for name in components), component)

    def particles(self, posterior: DispatchPosterior) -> Particles:
        prompts, components = posterior.mean.shape
        if len(self.weights) != components:
            raise ConfigError(f"expected {components} weights, got {len(self.weights)}")
        return _single(np.tile(self.weights, (prompts, 1)))


@dataclass(frozen=True)
class PosteriorPredictive:
    """Many particles whose predictive distributions are mixed, filtered by every token (DESIGN §8).

    With more than K + 1 rows to spend, the vertices (each expert, base) take K + 1 of them, the posterior mean one, and
    posterior draws the rest; with fewer, all are posterior draws. A vertex enters in proportion to its posterior mean
    weight, the others enter equally.

    Attributes:
        draws: particles in all.
        switching: see ``Particles``. flat: see ``Particles``.
        vertex_mass: prior mass of the vertices together. merge: see ``Particles``.
    """

    draws: int = 16
    switching: tuple[float, ...] = (0.001, 0.01, 0.1)
    flat: float = 0.06
    vertex_mass: float = 0.5
    merge: float = 0.003
    name = "predictive"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"expected at least 1 particle, got {self.draws}")
        if not self.switching or not all(0 <= rate < 1 for rate in self.switching):
            raise ConfigError(f"expected switching rates in [0, 1), got {self.switching}")
        for field in ("flat", "vertex_mass"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"expected {field} in [0, 1), got {getattr(self, field)}")
        if not 0 <= self.merge < float("inf"):
            raise ConfigError(f"expected a merge of at least 0 nats, got {self.merge}")

    def particles(self, posterior: DispatchPosterior) -> Particles:
        available, prompts, components = posterior.weights.shape
        fixed = components + 1 if self.draws > components else 0  # vertices and mean
        if self.draws - fixed > available:
            raise ConfigError(f"expected a posterior of at least {self.draws - fixed} draws, got {available}")
        drawn = posterior.weights[: self.draws - fixed].swapaxes(0, 1)  # (prompt, draw, K + 1)
        if not fixed:
            mass = np.full((prompts, self.draws), 1 / self.draws)
            return Particles(drawn, mass, self.switching, self.flat, self.merge)
        vertices = np.tile(np.eye(components), (prompts, 1, 1))
        inside = np.full((prompts, self.draws - components), (1 - self.vertex_mass) / (self.draws - components))
        return Particles(
            np.concatenate([vertices, posterior.mean[:, None], drawn], axis=1),
            np.concatenate([self.vertex_mass * posterior.mean, inside], axis=1),
            self.switching,
            self.flat,
            self.merge,
        )


@dataclass(frozen=True)
class RefinedMean:
    """One particle: the mean of the particles of ``PosteriorPredictive``, filtered by the prompt.

    It costs the predictive's rows to read the prompt, and one row to read it again and to generate. It helps while a
    document stays itself, not when it changes.

    Attributes:
        draws, switching, flat, vertex_mass: see ``PosteriorPredictive``.
    """

    draws: int = 16
    switching: tuple[float, ...] = (0.001, 0.01, 0.1)
    flat: float = 0.06
    vertex_mass: float = 0.5
    name = "refined_mean"

    def __post_init__(self) -> None:
        self._predictive()

    def particles(self, posterior: DispatchPosterior) -> Particles:
        return replace(self._predictive().particles(posterior), refined=True)

    def _predictive(self) -> PosteriorPredictive:
        return PosteriorPredictive(self.draws, self.switching, self.flat, self.vertex_mass, merge=0.0)


def _single(weights: np.ndarray) -> Particles:
    return Particles(weights[:, None], np.ones((len(weights), 1)))


BLENDS: dict[str, type] = {
    blend.name: blend for blend in (PosteriorMean, TopK, BestExpert, ThompsonSample, PosteriorPredictive, RefinedMean)
}


def blend_by_name(name: str, *, top_k: int = 2, draws: int = 16) -> Blend:
    """The blend of a name that the command line uses.

    Raises:
        UnknownNameError: the name is none of ``BLENDS``.
    """
    if name not in BLENDS:
        raise UnknownNameError(f"expected a blending mode of {', '.join(BLENDS)}, got {name!r}")
    match BLENDS[name]:
        case type() as blend if blend is TopK:
            return TopK(top_k)
        case type() as blend if blend in (PosteriorPredictive, RefinedMean):
            return blend(draws)
        case blend:
            return blend()
