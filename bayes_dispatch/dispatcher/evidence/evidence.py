"""Evidence: what the first pass saw of each prompt, as named views; the only input of the dispatcher.

Arrays enter here, are checked once, and are read-only afterwards: code further inside trusts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Shaped

from bayes_dispatch.arguments import shown
from bayes_dispatch.dispatcher.arrays import Frozen, as_numbers, as_rows, short_repr
from bayes_dispatch.errors import EvidenceError

__all__ = ["VIEWS", "Evidence", "as_evidence"]

VIEWS = ("hidden", "counts", "surprise")  # that a first pass gives, and files of evidence hold
LARGEST = 1e30  # of what is read: larger numbers are a mistake, and their squares overflow
LENGTHS = "lengths"  # the key of ``missing`` for prompts of unknown length


@dataclass(frozen=True, eq=False)
class Evidence(Frozen):
    """Named first-pass features of N prompts.

    Args:
        views: by name one array ``(N, ·)``. The dispatcher reads ``"hidden"`` ``(N, F)``, pooled hidden states, and
            ``"counts"`` ``(N, C)``, non-negative counts of tokens by class; other views travel along unread.
        lengths: ``(N,)`` tokens read of each prompt; ``None`` where unknown for all.
        missing: by name of a view (or ``"lengths"``) ``(N,)`` bool, True where the prompt lacks it. What a missing row
            holds is ignored, and stored as zeros.

    Raises:
        EvidenceError: NaN, infinite, absurdly large or negative entries that are not missing, or views of different N.

    Example:
        >>> evidence = Evidence({"hidden": np.eye(3)}, lengths=np.array([32, 64, 128]))
        >>> len(evidence), len(evidence.select([0, 2]))
        (3, 2)
    """

    views: Mapping[str, np.ndarray]
    lengths: np.ndarray | None = None
    missing: Mapping[str, np.ndarray] = field(default_factory=dict)

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for given in (self.views, self.missing):
            if not isinstance(given, Mapping):
                raise EvidenceError(f"expected arrays by the name of their view, got {shown(given)}")
        if not self.views:
            raise EvidenceError('expected at least one view, such as "hidden" (prompt, feature), got none')
        views = {name: _matrix(name, values) for name, values in self.views.items()}
        sizes = {name: len(values) for name, values in views.items()}
        prompts = next(iter(sizes.values()))
        lengths = self.lengths
        if lengths is not None:
            lengths = as_numbers(lengths, "'lengths'", error=EvidenceError)
            if lengths.ndim != 1:
                raise EvidenceError(f"expected lengths of shape (prompt,), got shape {lengths.shape}")
            sizes[LENGTHS] = len(lengths)
        missing = {
            name: as_numbers(mask, f"missing[{name!r}]", None, EvidenceError) for name, mask in self.missing.items()
        }
        for name, mask in missing.items():
            if name not in sizes:
                raise EvidenceError(f"expected missing masks for {sorted(sizes)}, got one for {name!r}")
            if mask.ndim != 1 or mask.dtype != bool:
                raise EvidenceError(f"expected missing[{name!r}] bool (prompt,), got {mask.dtype} {mask.shape}")
            sizes[f"missing[{name!r}]"] = len(mask)
        if set(sizes.values()) != {prompts}:
            raise EvidenceError(f"expected the same number of prompts in every view, got {sizes}")

        for name, values in views.items():
            _check(name, values, missing.get(name), non_negative=name == "counts")
        if lengths is not None:
            _check(LENGTHS, lengths, missing.get(LENGTHS), non_negative=True)
            known = lengths[~missing[LENGTHS]] if LENGTHS in missing else lengths
            if (known == 0).any():
                raise EvidenceError("expected lengths of at least 1 token, got 0")
        object.__setattr__(self, "views", views)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "missing", missing)
        super().__post_init__()

    @classmethod
    def from_array(cls, hidden: Shaped[np.ndarray, "prompt feature"]) -> Evidence:
        """Take an array ``(N, F)`` as the hidden view; lengths are unknown, there are no counts."""
        return cls({"hidden": hidden})

    @classmethod
    def concatenate(cls, parts: Sequence[Evidence]) -> Evidence:
        """Stack the prompts of several pieces of evidence; a view that a piece lacks is missing for its prompts.

        Raises:
            EvidenceError: no pieces, or a view of different widths.
        """
        if not parts:
            raise EvidenceError("expected at least one piece of evidence, got none")
        names = list(dict.fromkeys(name for part in parts for name in part.views))
        views, missing = {}, {}
        for name in names:
            widths = {part.views[name].shape[1] for part in parts if name in part.views}
            if len(widths) > 1:
                raise EvidenceError(f"expected view {name!r} of one width, got widths {sorted(widths)}")
            width = widths.pop()
            views[name] = np.concatenate([part.views.get(name, np.zeros((len(part), width))) for part in parts])
            missing[name] = np.concatenate([part.is_missing(name) for part in parts])
        lengths = None
        if any(part.lengths is not None for part in parts):
            lengths = np.concatenate([np.zeros(len(p)) if p.lengths is None else p.lengths for p in parts])
            missing[LENGTHS] = np.concatenate([part.is_missing(LENGTHS) for part in parts])
        return cls(views, lengths, {name: mask for name, mask in missing.items() if mask.any()})

    def __len__(self) -> int:
        return len(next(iter(self.views.values())))

    def select(self, indices: object) -> Evidence:
        """The prompts at ``indices`` (integers, a slice, or a bool mask), in that order.

        Raises:
            EvidenceError: an index outside the prompts.
        """
        rows = as_rows(indices, len(self), EvidenceError)
        return Evidence(
            {name: values[rows] for name, values in self.views.items()},
            None if self.lengths is None else self.lengths[rows],
            {name: mask[rows] for name, mask in self.missing.items()},
        )

    def is_missing(self, name: str) -> Shaped[np.ndarray, " prompt"]:
        """``(N,)`` bool, True where a prompt lacks view ``name`` (for ``"lengths"``, where its length is unknown)."""
        present = self.lengths is not None if name == LENGTHS else name in self.views
        return self.missing.get(name, np.full(len(self), not present))

    def known_lengths(self) -> Float[np.ndarray, " prompt"]:
        """``(N,)`` tokens read, 0 where unknown."""
        return np.zeros(len(self)) if self.lengths is None else self.lengths


def as_evidence(given: Evidence | Shaped[np.ndarray, "prompt feature"]) -> Evidence:
    """Evidence as it is; an array as :meth:`Evidence.from_array` takes it."""
    return given if isinstance(given, Evidence) else Evidence.from_array(given)


def _matrix(name: str, values: object) -> np.ndarray:
    array = as_numbers(values, repr(name), error=EvidenceError)
    if array.ndim != 2 or array.shape[1] == 0:
        raise EvidenceError(f"expected view {name!r} of shape (prompt, feature), got shape {array.shape}")
    return array


def _check(name: str, values: np.ndarray, missing: np.ndarray | None, *, non_negative: bool) -> None:
    """Refuse what is not finite (or negative) outside the missing rows, and zero the missing rows, in place."""
    if missing is not None:
        values[missing] = 0.0
    sound = np.abs(values) <= LARGEST  # NaN is not
    if not sound.all():
        where = tuple(int(i) for i in np.argwhere(~sound)[0])
        wanted = f"numbers within ±{LARGEST:g} in {name!r}"
        if not np.isfinite(values[where]):
            wanted = f"finite numbers in {name!r}, or missing={{{name!r}: mask}} of the prompts that lack it"
        raise EvidenceError(f"expected {wanted}, got {values[where]} at {where}")
    if non_negative and (values < 0).any():
        where = tuple(int(i) for i in np.argwhere(values < 0)[0])
        raise EvidenceError(f"expected non-negative numbers in {name!r}, got {values[where]} at {where}")
