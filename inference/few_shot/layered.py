"""Blends by layer: each layer of the experts has weights of its own, inferred from a handful of answered questions.

``FewShotProgram(likelihood, coupling=…)`` infers them; what a particle is told to weigh is the part that its layers
share. The prompts' own posterior is not asked.
"""

from dataclasses import dataclass, field

import numpy as np

from bayes_dispatch.arguments import real, whole
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.few_shot.program import FewShotFit
from bayes_dispatch.inference.two_pass.blends import NamedBySettings, Particles, check_switching

__all__ = ["LayeredMean", "LayeredPredictive"]


@dataclass(frozen=True, eq=False)
class LayeredMean(NamedBySettings):
    """One particle for every prompt: the mean weights of each layer.

    Attributes:
        fit: with weights by layer, of the same experts.

    Raises:
        ConfigError: a fit of one set of weights for all layers.
    """

    fit: FewShotFit = field(repr=False)

    def __post_init__(self) -> None:
        _check_layers(self.fit)

    def particles(self, posterior: DispatchPosterior) -> Particles:
        state = _state(self.fit, posterior).mean(0, keepdims=True)
        return _repeated(state, len(posterior.mean), (0.0,), 0.0)


@dataclass(frozen=True, eq=False)
class LayeredPredictive(NamedBySettings):
    """Draws of the weights by layer, equally probable at first, mixed and filtered as ``PosteriorPredictive`` does.

    Attributes:
        fit: with weights by layer, of the same experts. draws: particles, at most as many as the fit has.
        switching, merge: see ``Particles``.

    Raises:
        ConfigError: a fit of one set of weights for all layers, too few draws, or a setting out of range.
    """

    fit: FewShotFit = field(repr=False)
    draws: int = 16
    switching: tuple[float, ...] = (0.001, 0.01, 0.1)
    merge: float = 0.003

    def __post_init__(self) -> None:
        object.__setattr__(self, "draws", whole("draws", self.draws, 1))
        object.__setattr__(self, "switching", check_switching(self.switching))
        object.__setattr__(self, "merge", real("merge", self.merge, 0))
        _check_layers(self.fit)
        if self.draws > len(self.fit.state):
            raise ConfigError(f"expected a fit of at least {self.draws} draws, got {len(self.fit.state)}")

    def particles(self, posterior: DispatchPosterior) -> Particles:
        state = _state(self.fit, posterior)[: self.draws]
        return _repeated(state, len(posterior.mean), self.switching, self.merge)


def _check_layers(fit: FewShotFit) -> None:
    if fit.layers is None:
        raise ConfigError("expected a fit with weights by layer (FewShotProgram's coupling), got one set for all")


def _state(fit: FewShotFit, posterior: DispatchPosterior) -> np.ndarray:
    """(S, 1 + L, K + 1), of the experts that the posterior is over."""
    if fit.posterior.experts != posterior.experts:
        raise ConfigError(f"expected a fit over {posterior.experts}, got one over {fit.posterior.experts}")
    return fit.state


def _repeated(state: np.ndarray, prompts: int, switching: tuple[float, ...], merge: float) -> Particles:
    """The same particles, equally probable, for each prompt."""
    state = np.tile(state, (prompts, 1, 1, 1))  # (N, S, 1 + L, K + 1)
    mass = np.full(state.shape[:2], 1 / state.shape[1])
    return Particles(state[:, :, 0], mass, switching, merge, layers=state[:, :, 1:].copy())
