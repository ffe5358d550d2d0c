"""LoRA experts: low-rank updates of the matrices of one base model (Hu and others 2021, arXiv 2106.09685)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.experts.vectors import DTYPES, check_metadata
from bayes_dispatch.model.adaptation import Adaptation, Delta

__all__ = ["LoraExpert"]

Factors = tuple[Tensor, Tensor]


class _Copies(Mapping[str, Factors]):
    """Factors by matrix that nobody can change: copies go in and come out."""

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        with torch.inference_mode(False):
            self.own = {name: (down.detach().clone(), up.detach().clone()) for name, (down, up) in factors.items()}

    def __getitem__(self, matrix: str) -> Factors:
        down, up = self.own[matrix]
        return down.clone(), up.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


@dataclass(frozen=True, eq=False)
class LoraExpert:
    """Updates ``W + up @ down`` of one expert; the adapter's own scaling is in ``up``.

    Attributes:
        name: letters, digits, ``_`` and ``-``; not ``base``.
        factors: for each adapted matrix (out, in) its ``down`` (r, in) and ``up`` (out, r): copies,
            on the way in and out.
        base: fingerprint of the model that the expert was trained on.
        metadata: as of ``ExpertVector``.

    Raises:
        ConfigError: a name that cannot be a file's, or metadata that is no text.
        TensorError: factors that are not finite, or do not fit together.
    """

    name: str
    factors: Mapping[str, Factors]
    base: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_metadata(self.name, self.metadata)
        if not self.factors:
            raise TensorError(f"expected factors of at least one matrix of expert {self.name}, got none")
        for matrix, (down, up) in self.factors.items():
            expected = f"expected finite factors (r, in) and (out, r) for {matrix} of expert {self.name}"
            shapes = tuple(down.shape), tuple(up.shape)
            fits = down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] > 0
            if not fits or down.dtype not in DTYPES or up.dtype not in DTYPES:
                raise TensorError(f"{expected}, got shapes {shapes[0]} and {shapes[1]} of {down.dtype}")
            if not bool(down.isfinite().all() and up.isfinite().all()):
                raise TensorError(f"{expected}, got NaN or infinite ones")
        object.__setattr__(self, "factors", _Copies(self.factors))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def __reduce__(self) -> tuple[type["LoraExpert"], tuple[str, dict[str, Factors], str, dict[str, str]]]:
        return LoraExpert, (self.name, dict(self.factors), self.base, dict(self.metadata))

    @property
    def matrices(self) -> dict[str, int]:
        """The adapted matrices, in order, with the rank of each update."""
        return {matrix: len(down) for matrix, (down, _) in self.factors.items()}

    def adaptation(self) -> Adaptation:
        """This expert alone, shared by all rows."""
        deltas = {matrix: Delta(up, down, up.new_ones(len(down))) for matrix, (down, up) in self.factors.items()}
        return Adaptation({}, deltas)
