"""Blends: how a posterior over expert weights becomes the scales under which the second pass runs.

A blend answers with *particles*: blend weights, each run as one row of the model, with a prior mass. One particle is a
plain adapted model. Several are mixed token by token, and the tokens read so far say which of them fit (``filtering``).

A blend is called by its class in snake case, with its settings in parentheses where it has some: ``best_expert``,
``top_k(2)``, ``posterior_predictive(16)``. ``as_blend`` reads such names.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from bayes_dispatch.arguments import real, simplex, whole
from bayes_dispatch.dispatcher.arrays import on_simplex
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import BayesDispatchError, ConfigError, UnknownNameError

__all__ = [
    "ALIASES",
    "BLENDS",
    "DEFAULT_BLEND",
    "BestExpert",
    "Blend",
    "FixedWeights",
    "NamedBySettings",
    "Particles",
    "PosteriorMean",
    "PosteriorPredictive",
    "RefinedMean",
    "ThompsonSample",
    "TopK",
    "as_blend",
    "check_switching",
    "full_name",
]

DRAWS, LEAST, MOST = 4, 16, 32  # draws and rows by default; beyond MOST, half of the rows are vertices


@dataclass(frozen=True, eq=False)
class Particles:
    """Blend weights with prior masses, for each prompt.

    Attributes:
        weights: (prompt, particle, K + 1), each on the simplex.
        mass: (prompt, particle), prior probabilities, summing to 1 over the particles: before any token of the prompt
            has been counted.
        target: (prompt, particle), where a document that changes its domain after the prompt goes, in probabilities;
            within the prompt it is ``mass``, and ``None`` stands for that everywhere.
        switching: possible values of the probability, at each token, that the document changes its domain; equally
            probable at first, and filtered along with the particles. 0 alone: it never changes.
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
    merge: float = 0.0
    refined: bool = False
    layers: np.ndarray | None = None
    target: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.refined and self.layers is not None:
            raise ConfigError("expected particles of the same weights in every layer to refine, got weights by layer")

    @classmethod
    def single(cls, weights: np.ndarray) -> "Particles":
        """One particle for each of the (prompt, K + 1) weights."""
        return cls(weights[:, None], np.ones((len(weights), 1)))

    @property
    def run(self) -> np.ndarray:
        """The weights that rows of the model are run with: (prompt, particle, K + 1), or ``layers``."""
        return self.weights if self.layers is None else self.layers

    def select(self, prompts: slice | np.ndarray) -> "Particles":
        """The particles of some prompts."""
        names = ("weights", "mass", "layers", "target")
        return replace(self, **{name: values[prompts] for name in names if (values := getattr(self, name)) is not None})


@runtime_checkable
class Blend(Protocol):
    """A way to turn a posterior into particles."""

    @property
    def name(self) -> str:
        """What tables call it; different blends have different names."""
        ...

    def particles(self, posterior: DispatchPosterior) -> Particles:
        """Particles for each prompt of ``posterior``."""
        ...


class NamedBySettings:
    """Names a dataclass of settings: its class, its first setting unless ``None``, and those that are changed."""

    @property
    def name(self) -> str:
        """Such as ``best_expert``, ``top_k(2)`` or ``posterior_predictive(16, merge=0.0)``."""
        shown: list[str] = []
        settings = [each for each in fields(self) if each.repr]  # type: ignore[arg-type]  # all of them are dataclasses
        for place, each in enumerate(settings):
            value = getattr(self, each.name)
            if place == 0 and value is not None:
                shown.append(repr(value))
            elif place > 0 and value != each.default:
                shown.append(f"{each.name}={value!r}")
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        return f"{name}({', '.join(shown)})" if shown else name


@dataclass(frozen=True)
class PosteriorMean(NamedBySettings):
    """One particle: the posterior mean of the weights."""

    def particles(self, posterior: DispatchPosterior) -> Particles:
        return Particles.single(posterior.mean)


@dataclass(frozen=True)
class TopK(NamedBySettings):
    """One particle: the ``k`` largest components of the posterior mean, renormalised."""

    k: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole("k", self.k, 1))

    def particles(self, posterior: DispatchPosterior) -> Particles:
        mean = posterior.mean
        if self.k > mean.shape[1]:
            raise ConfigError(f"expected k of at most {mean.shape[1]} components, got {self.k}")
        kept = np.argsort(-mean, axis=1, kind="stable")[:, : self.k]
        weights = np.zeros_like(mean)
        np.put_along_axis(weights, kept, np.take_along_axis(mean, kept, axis=1), axis=1)
        return Particles.single(weights / weights.sum(1, keepdims=True))


@dataclass(frozen=True)
class BestExpert(NamedBySettings):
    """One particle: all weight on the component of the largest posterior mean (hard routing)."""

    def particles(self, posterior: DispatchPosterior) -> Particles:
        return Particles.single(np.eye(posterior.mean.shape[1])[posterior.mean.argmax(1)])


@dataclass(frozen=True)
class ThompsonSample(NamedBySettings):
    """One particle: the first draw of the posterior."""

    def particles(self, posterior: DispatchPosterior) -> Particles:
        return Particles.single(posterior.weights[0])


@dataclass(frozen=True)
class FixedWeights:
    """One particle, the same for every prompt; a vertex is a single expert, or base.

    Attributes:
        weights: (K + 1), on the simplex. name: of the blend; a vertex has that of its component.

    Raises:
        ConfigError: weights off the simplex.
    """

    weights: tuple[float, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if (found := simplex("weights", self.weights)).ndim != 1:
            raise ConfigError(f"expected weights (K + 1,), got shape {found.shape}")
        weights = tuple(found.tolist())
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "name", self.name or f"fixed_weights{weights}")

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
        return Particles.single(np.tile(self.weights, (prompts, 1)))


def check_switching(rates: Sequence[float]) -> tuple[float, ...]:
    """Switching rates: see ``Particles``.

    Raises:
        ConfigError: none, or one outside [0, 1).
    """
    if not isinstance(rates, Sequence) or not rates:
        raise ConfigError(f"expected switching rates from 0 to 1, got {rates!r:.60}")
    return tuple(real("a switching rate", rate, 0, 1, below=True) for rate in rates)


@dataclass(frozen=True)
class PosteriorPredictive(NamedBySettings):
    """Many particles whose predictive distributions are mixed, filtered by every token.

    With more than K + 1 rows to spend, the vertices (each expert, base) take K + 1 of them, the posterior mean one, and
    posterior draws the rest. With fewer, half of the rows are vertices: base, and the experts of the largest posterior
    mean weight, which share what all vertices would have (here the features choose); with fewer than four, all are
    posterior draws. An expert without a row is hardly found where a document goes on with it against all hints.

    The default has a row for every component, the mean and four draws: at least 16 rows, which do for ten experts, and
    at most 32, which do for 30. Rows are what reading costs: 24 for 18 experts take about half as much again as 16.

    No token counts twice. Which particle a document is at is told by its tokens alone: before the first, a vertex has
    its prior weight, and draws have the ratio of the prior to the posterior that they are from (importance sampling,
    ratios truncated as in Ionides 2008), of which the mean gets the average. These share a fixed mass, so that the
    features, which chose where draws and mean are, place that much of it. Where the document goes if it changes
    after the prompt is told by the features of the prompt: to a vertex in proportion to its posterior mean weight, to
    the others equally. A posterior that owes nothing to the prompt (``DispatchPosterior.prior``) tells both.

    A posterior of a single draw, such as known weights or a point estimate, leaves nothing open: that draw is the only
    particle.

    Attributes:
        draws: particles in all; ``None`` for the default number, or fewer where the posterior has fewer draws.
        switching, merge: see ``Particles``.
        flat: share of the mass that the vertices have in equal parts, whatever prior and posterior.
        vertex_mass: of the rest, that of the vertices together.

    Raises:
        ConfigError: a setting out of range.
    """

    draws: int | None = None
    switching: tuple[float, ...] = (0.001, 0.01, 0.1)
    flat: float = 0.06
    vertex_mass: float = 0.5
    merge: float = 0.003

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {} if self.draws is None else {"draws": whole("draws", self.draws, 1)}
        checked["switching"] = check_switching(self.switching)
        for name in ("flat", "vertex_mass"):
            checked[name] = real(name, getattr(self, name), 0, 1, below=True)
        checked["merge"] = real("merge", self.merge, 0)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def particles(self, posterior: DispatchPosterior) -> Particles:
        available, prompts, components = posterior.weights.shape
        if available == 1:
            return Particles.single(posterior.weights[0])
        rows = min(max(components + 1 + DRAWS, LEAST), MOST) if self.draws is None else self.draws
        vertices = components if rows > components else rows // 2
        fixed = vertices + 1 if rows > components or rows >= 4 else 0  # and the mean
        count = rows - fixed if self.draws is not None else min(rows - fixed, available)
        if count > available:
            raise ConfigError(f"expected a posterior of at least {count} draws, got {available}")
        drawn = posterior.weights[:count].swapaxes(0, 1)  # (prompt, draw, K + 1)
        equal = np.full((prompts, count), 1 / max(count, 1))
        ratios = equal if posterior.log_ratios is None or not count else _truncated(posterior.log_ratios[:count].T)
        if not fixed:
            return Particles(drawn, ratios, self.switching, self.merge, target=equal)
        mean, prior = posterior.mean, posterior.mean if posterior.prior is None else posterior.prior
        kept = np.sort(np.argsort(-mean[:, :-1], axis=1, kind="stable")[:, : vertices - 1], axis=1)
        kept = np.column_stack([kept, np.full(prompts, components - 1)])  # (prompt, vertex), base last
        return Particles(
            np.concatenate([np.eye(components)[kept], mean[:, None], drawn], axis=1),
            self._mass(on_simplex(np.take_along_axis(prior, kept, 1)), ratios),
            self.switching,
            self.merge,
            target=self._mass(on_simplex(np.take_along_axis(mean, kept, 1)), equal),
        )

    def _mass(
        self, vertices: Float[np.ndarray, "prompt vertex"], drawn: Float[np.ndarray, "prompt draw"]
    ) -> Float[np.ndarray, "prompt particle"]:
        """Of vertices, mean and draws; the mean has that of an average draw."""
        (prompts, count), others = vertices.shape, drawn.shape[1] + 1
        inside = np.concatenate([np.ones((prompts, 1)), drawn * (others - 1)], axis=1) / others
        mass = (1 - self.flat) * np.concatenate([self.vertex_mass * vertices, (1 - self.vertex_mass) * inside], axis=1)
        mass[:, :count] += self.flat / count
        return mass


def _truncated(log_ratios: Float[np.ndarray, "prompt draw"]) -> Float[np.ndarray, "prompt draw"]:
    """Importance weights that sum to 1, none above √S times the mean of all S before."""
    ratios = np.exp(log_ratios - logsumexp(log_ratios, axis=1, keepdims=True))
    ratios = np.minimum(ratios, ratios.shape[1] ** -0.5)
    return ratios / ratios.sum(1, keepdims=True)


@dataclass(frozen=True)
class RefinedMean(NamedBySettings):
    """One particle: the mean of the particles of ``PosteriorPredictive``, filtered by the prompt.

    It costs the predictive's rows to read the prompt, and one row to read it again and to generate. It helps while a
    document stays itself, not when it changes.

    Attributes:
        draws, switching, flat, vertex_mass: see ``PosteriorPredictive``.
    """

    draws: int | None = None
    switching: tuple[float, ...] = (0.001, 0.01, 0.1)
    flat: float = 0.06
    vertex_mass: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self._predictive()).items():
            if name != "merge":
                object.__setattr__(self, name, value)

    def particles(self, posterior: DispatchPosterior) -> Particles:
        return replace(self._predictive().particles(posterior), refined=True)

    def _predictive(self) -> PosteriorPredictive:
        return PosteriorPredictive(self.draws, self.switching, self.flat, self.vertex_mass, merge=0.0)


DEFAULT_BLEND = PosteriorPredictive()  # of generation, chats and the shell: it was right most often, see docs/results

BLENDS: dict[str, type] = {
    "best_expert": BestExpert,
    "posterior_mean": PosteriorMean,
    "top_k": TopK,
    "thompson_sample": ThompsonSample,
    "posterior_predictive": PosteriorPredictive,
    "refined_mean": RefinedMean,
}
ALIASES = {  # what they were called before
    "max": "best_expert",
    "weighted_average": "posterior_mean",
    "thompson": "thompson_sample",
    "predictive": "posterior_predictive",
}


def as_blend(blend: Blend | str, components: Sequence[str] = ()) -> Blend:
    """A blend as it is, or the one of a name: ``"top_k"``, ``"top_k(3)"``, ``"posterior_predictive(16, merge=0.0)"``.

    Args:
        blend: settings that a name leaves out are the default ones. components: their names are blends, too: all
            weight on one of them, also where a bank from disk has one that is called as a blend is.

    Raises:
        UnknownNameError: there is no such blend. ConfigError: neither blend nor name, or settings that it has not.
    """
    if not isinstance(blend, str):
        if isinstance(blend, type) or not isinstance(blend, Blend):
            raise ConfigError(f"expected a blend such as PosteriorPredictive(16), or a name, got {blend!r:.60}")
        return blend
    if blend in components:
        return FixedWeights.vertex(components, blend)
    called, bracket, _ = blend.partition("(")
    kind = BLENDS.get(ALIASES.get(called, called))
    if kind is None:
        names = ", ".join([*BLENDS, *components])
        raise UnknownNameError(f"expected a blend of {names}, got {blend!r:.80}")
    try:
        call = ast.parse(blend if bracket else f"{blend}()", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise SyntaxError
        given = [ast.literal_eval(value) for value in call.args]
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        if len(named) < len(call.keywords):  # one of them twice
            raise SyntaxError
        found: Blend = kind(*given, **named)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):  # the last two: what is nested too deep
        raise ConfigError(f"expected a blend written as {kind().name}, got {blend!r:.80}") from None
    return found


def full_name(name: str, components: Sequence[str] = ()) -> str:
    """The name in full of the blend that ``name`` is one of; any other name as it is, such as that of a component."""
    try:
        return as_blend(name, components).name
    except BayesDispatchError:
        return name
