"""SVF experts: a named set of singular-value scales for the matrices of one base model (arXiv 2501.06252)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.model.adaptation import Adaptation, Tensors

__all__ = [
    "BASE",
    "DTYPES",
    "NAMES_OF_BLENDS",
    "ExpertVector",
    "check_expert_name",
    "check_file_name",
    "check_metadata",
]

BASE = "base"  # the component without adaptation, last in every mixture
LONGEST = 100  # letters of a name: a file's, with what we add, has at most 255 bytes on most disks
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
NAMES_OF_BLENDS = {  # of ``inference.two_pass.blends``: where a blend is asked for, an expert's name will do
    *("best_expert", "posterior_mean", "posterior_predictive", "refined_mean", "thompson_sample", "top_k"),
    *("max", "predictive", "thompson", "weighted_average"),
}
RESERVED = ("name", "base", "digest")  # what a file of the expert says beside its metadata


@dataclass(frozen=True, eq=False)
class ExpertVector:
    """Scales ``z`` of one expert.

    Attributes:
        name: letters, digits, ``_`` and ``-``; not ``base``. A new bank takes up to 100 of them.
        scales: for each adapted matrix its scales, (rank,): copies, on the way in and out.
        base: fingerprint of the model that the expert was trained on.
        metadata: where it comes from, in text: ``domain``, ``objective``, ``steps``, what was measured; ``date``,
            ``bayes_dispatch`` and ``torch`` as ``provenance`` gives them; and whatever else.

    Raises:
        ConfigError: a name that cannot be a file's; metadata that is no text, or named as what a file has of its own.
        TensorError: scales that are not finite vectors.
    """

    name: str
    scales: Mapping[str, Tensor]
    base: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_metadata(self.name, self.metadata)
        if not self.scales:
            raise TensorError(f"expected scales of at least one matrix of expert {self.name}, got none")
        for name, scales in self.scales.items():
            expected = f"expected finite scales of shape (rank,) for {name} of expert {self.name}"
            if scales.ndim != 1 or not len(scales) or scales.dtype not in DTYPES:
                raise TensorError(f"{expected}, got shape {tuple(scales.shape)} of {scales.dtype}")
            if not bool(scales.isfinite().all()):
                raise TensorError(f"{expected}, got NaN or infinite ones")
        object.__setattr__(self, "scales", Tensors({name: scales.detach() for name, scales in self.scales.items()}))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def __reduce__(self) -> tuple[type["ExpertVector"], tuple[str, Mapping[str, Tensor], str, dict[str, str]]]:
        return ExpertVector, (self.name, self.scales, self.base, dict(self.metadata))

    @property
    def matrices(self) -> dict[str, int]:
        """The adapted matrices, in order, with the number of scales of each."""
        return {name: len(scales) for name, scales in self.scales.items()}

    def adaptation(self) -> Adaptation:
        """This expert alone, as scales shared by all rows."""
        return Adaptation(self.scales)


def check_metadata(name: str, metadata: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` unless an expert can have this name and these metadata."""
    check_file_name(name)
    for key, value in metadata.items():
        if not _is_text(key) or not _is_text(value) or key in RESERVED:
            raise ConfigError(
                f"expected metadata of expert {name} in text, under names other than {', '.join(RESERVED)}, "
                f"got {key!r}: {value!r:.80}"
            )


def _is_text(value: object) -> bool:
    """Whether it is text that a file holds: half of a surrogate pair is none."""
    return isinstance(value, str) and re.search("[\ud800-\udfff]", value) is None


def check_expert_name(name: str) -> None:
    """Raise ``ConfigError`` unless a new expert can have this name. A bank on disk may have one that is a blend's,
    or longer."""
    check_file_name(name)
    if name in NAMES_OF_BLENDS:
        raise ConfigError(f"expected an expert name that is no blend's, got {name!r}")
    if len(name) > LONGEST:
        raise ConfigError(f"expected an expert name of at most {LONGEST} letters, got {len(name)}: {name:.20}…")


def check_file_name(name: str) -> None:
    """Raise ``ConfigError`` unless ``name`` can be that of an expert's file."""
    letters = name.replace("_", "").replace("-", "") if isinstance(name, str) else ""
    if name == BASE or not letters.isalnum() or not letters.isascii():
        raise ConfigError(f"expected an expert name of letters, digits, '_' and '-' other than 'base', got {name!r}")
