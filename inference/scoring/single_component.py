"""A blend of one expert, or of base, by its name: what a posterior is compared with."""

from dataclasses import dataclass

import numpy as np

from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import UnknownNameError
from bayes_dispatch.inference.two_pass.blends import Particles

__all__ = ["SingleComponent"]


@dataclass(frozen=True)
class SingleComponent:
    """One particle, the same for every prompt: all weight on one component.

    Attributes:
        name: of an expert, or ``"base"``; also the blend's name.
    """

    name: str

    def particles(self, posterior: DispatchPosterior) -> Particles:
        """The vertex, for each prompt.

        Raises:
            UnknownNameError: the posterior has no such component.
        """
        if self.name not in posterior.experts:
            raise UnknownNameError(f"expected a component of {', '.join(posterior.experts)}, got {self.name!r}")
        vertex = np.array([float(component == self.name) for component in posterior.experts])
        return Particles(np.tile(vertex, (len(posterior), 1, 1)), np.ones((len(posterior), 1)))
