"""The reference posterior: the program of ``dispatcher.program.generative`` once more, in NumPyro, and its NUTS.

``twin`` is the program, of which nothing is shared with the one in Pyro but the settings (K, the views and their
widths) and the evidence, so that a mistake in one shows against the other: :func:`log_density` is compared with
Pyro's, and the served posterior, which is summed out by quadrature, with :func:`reference_posterior` (``nuts``), whose
``draws`` say whether they can be trusted. Everything here runs in float64, whatever jax's global setting. Nothing else
in the package imports jax and NumPyro.
"""

from bayes_dispatch.errors import MissingDependencyError

try:
    import jax  # noqa: F401
    import numpyro  # noqa: F401
except ImportError as error:
    raise MissingDependencyError.of("reference", error) from error

from bayes_dispatch.checks.reference.draws import ReferencePosterior
from bayes_dispatch.checks.reference.nuts import conditional_posterior, joint_posterior, reference_posterior
from bayes_dispatch.checks.reference.twin import log_density

__all__ = ["ReferencePosterior", "conditional_posterior", "joint_posterior", "log_density", "reference_posterior"]
