"""Every error that a user of bayes-dispatch can cause.

Each class stands for one kind of mistake; each message is one line that says what was expected and what came.
This module imports nothing, so that every part of the project may raise them.
"""

__all__ = [
    "BayesDispatchError",
    "BundleError",
    "CacheFullError",
    "ConfigError",
    "EvidenceError",
    "ForeignExpertError",
    "LabelError",
    "MissingDependencyError",
    "NotFittedError",
    "PromptError",
    "PromptTooLongError",
    "RewardError",
    "StaleCacheError",
    "TensorError",
    "UnknownNameError",
]


class BayesDispatchError(Exception):
    """Base of all errors that users can cause; its text is one line: expected …, got …"""


class ConfigError(BayesDispatchError):
    """A setting is outside its range, or settings contradict each other."""


class TensorError(BayesDispatchError):
    """A tensor or array has another shape, dtype or range than the function takes."""


class PromptError(BayesDispatchError):
    """A prompt is empty, too long, or no UTF-8 text."""


class PromptTooLongError(PromptError):
    """A prompt of more tokens than the model can read, with those that are to follow."""


class RewardError(BayesDispatchError):
    """A reward function that cannot be imported, fails, or gives no finite number."""


class UnknownNameError(BayesDispatchError):
    """A name (of an expert, a blend, a domain) that the table of names does not hold."""


class EvidenceError(BayesDispatchError):
    """Evidence with NaN, infinite or negative entries, or whose views do not fit together."""


class LabelError(BayesDispatchError, ValueError):
    """Labels that a classifier cannot be fitted to; a ``ValueError`` too, as scikit-learn's protocol asks."""


class NotFittedError(BayesDispatchError):
    """A dispatcher was asked for what it has only after ``fit``, ``load`` or ``calibrate``."""


class BundleError(BayesDispatchError):
    """A file or directory that we wrote is missing, truncated, edited, or of another format."""


class ForeignExpertError(BayesDispatchError):
    """An expert made for another base model: the fingerprints of the weights differ."""


class StaleCacheError(BayesDispatchError):
    """A block's cached state was made under other scales of that block, or by another model."""


class CacheFullError(BayesDispatchError):
    """More tokens than the cache was made for."""


class MissingDependencyError(BayesDispatchError, ImportError):
    """An optional library that the called part needs is not installed; the message names the extra that has it."""

    @classmethod
    def of(cls, extra: str, error: ImportError) -> "MissingDependencyError":
        """What to say where ``error`` came since the extra is not installed."""
        told = f"expected the extra {extra} (pip install '.[{extra}]' in a copy of the repository)"
        return cls(f"{told}, got no {error.name}")
