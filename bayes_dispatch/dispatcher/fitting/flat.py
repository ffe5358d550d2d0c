"""What a dispatcher knows of experts that nobody has examples of: that every mixture may be."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import DirichletMixtures

__all__ = ["FlatProgram"]


@dataclass(frozen=True)
class FlatProgram:
    """A Dirichlet over the weights that reads no evidence.

    Attributes:
        experts: K names. concentration: of each of the K + 1 components, > 0.
    """

    experts: Sequence[str]
    concentration: float

    @property
    def fingerprint(self) -> str:
        """A digest of all there is to it."""
        return hashlib.sha256(repr(("flat", tuple(self.experts), self.concentration)).encode()).hexdigest()

    def answer(self, evidence: Evidence, pi: Float[np.ndarray, " component"]) -> DirichletMixtures:
        """The Dirichlet of as much concentration in all, its mean the prior's shares, for each prompt."""
        alpha = self.concentration * (len(self.experts) + 1) * pi
        return DirichletMixtures(np.ones((len(evidence), 1)), np.tile(alpha, (len(evidence), 1, 1)))
