"""SVF experts: a named set of singular-value scales for the matrices of one base model (arXiv 2501.06252)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.model.adaptation import Adaptation

__all__ = ["BASE", "ExpertVector"]

BASE = "base"  # the component without adaptation, last in every mixture


@dataclass(frozen=True, eq=False)
class ExpertVector:
    """Scales ``z`` of one expert.

    Attributes:
        name: letters, digits, ``_`` and ``-``; not ``base``.
        scales: for each adapted matrix its scales, (rank,).
        base: fingerprint of the model that the expert was trained on.
        metadata: where it comes from: domain, steps, metrics; text values.

    Raises:
        ConfigError: a name that cannot be a file's. TensorError: scales that are not finite vectors.
    """

    name: str
    scales: Mapping[str, Tensor]
    base: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == BASE or not self.name.replace("_", "").replace("-", "").isalnum() or not self.name.isascii():
            raise ConfigError(
                f"expected an expert name of letters, digits, '_' and '-' other than 'base', got {self.name!r}"
            )
        if not self.scales:
            raise TensorError(f"expected scales of at least one matrix of expert {self.name}, got none")
        for name, scales in self.scales.items():
            if scales.ndim != 1 or not scales.is_floating_point() or not bool(scales.isfinite().all()):
                raise TensorError(
                    f"expected finite scales of shape (rank,) for {name} of expert {self.name}, "
                    f"got shape {tuple(scales.shape)} of {scales.dtype}"
                )
        object.__setattr__(self, "scales", MappingProxyType(dict(self.scales)))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def adaptation(self) -> Adaptation:
        """This expert alone, as scales shared by all rows."""
        return Adaptation(self.scales)
