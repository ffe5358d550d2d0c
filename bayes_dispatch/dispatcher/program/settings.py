"""Which generative program a dispatcher fits: its views, the families of its experts, and what is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayes_dispatch.arguments import real, several, shown, simplex
from bayes_dispatch.dispatcher.arrays import on_simplex
from bayes_dispatch.dispatcher.program.generative import PRIOR, SIZES, DispatchModel
from bayes_dispatch.dispatcher.program.views import KINDS, NAMED_KINDS, View
from bayes_dispatch.errors import ConfigError, EvidenceError

__all__ = ["Admixture"]

# Names of the program itself, of what its draws are kept with, and of their dimensions; views have sites beside these.
RESERVED = {"w", "pi", "kappa", "labels", "expert", "experts", "prompts", "base", "chain", "draw", "prompt"}
RESERVED |= {"weights", "lengths"}
ROUNDING = 1e-9  # of a sum
# What is kept by name, in dictionaries of its own, is plain: files give back the same.
OF_NAMES: dict[str, Callable[[str, Any], object]] = {
    "views": lambda _, kind: str(kind),
    "families": lambda name, members: tuple(map(str, several(f"the family {name!r}", members))),
    "prior": lambda name, value: real(f"the concentration of {name!r}", value, 0, above=True),
}


@dataclass(frozen=True)
class Admixture:
    """Every prompt mixes experts (:class:`bayes_dispatch.dispatcher.program.generative.DispatchModel`).

    Args:
        views: view → kind (``"vectors"``, ``"counts"``, ``"probabilities"`` or ``"surprise"``) of the evidence that is
            read. By default the views ``hidden``, ``counts`` and ``surprise`` that the evidence of ``fit`` has.
        families: family → names of its experts. An expert in none is a family of its own.
        prior: expert (or ``"base"``) → concentration of ``pi``, for those where it is not 3 (for base 1.5).
        sizes: probabilities that one, two or three components share a prompt.
        temper: noise temper τ; by default prompts of known weights choose it.

    Raises:
        ConfigError: an unknown kind, a name that cannot name a view, no view, a family that is no sequence, a
            concentration or temper that is not positive, or sizes off the simplex.

    Example:
        >>> Admixture(views={"hidden": "vectors", "keywords": "counts"}, prior={"sort": 30.0}).prior
        {'sort': 30.0}
    """

    views: Mapping[str, str] | None = None
    families: Mapping[str, Sequence[str]] | None = None
    prior: Mapping[str, float] | None = None
    sizes: tuple[float, ...] = SIZES
    temper: float | None = None

    def __post_init__(self) -> None:
        sizes = simplex("sizes", several("sizes", self.sizes, 3))
        if abs(sizes.sum() - 1) > ROUNDING:  # sizes that were read from a file stay as they are, to the last bit
            sizes = on_simplex(sizes)
        object.__setattr__(self, "sizes", tuple(map(float, sizes)))
        if self.temper is not None:
            object.__setattr__(self, "temper", real("temper", self.temper, 0, above=True))
        for field, of in OF_NAMES.items():
            if (given := getattr(self, field)) is not None:
                if not isinstance(given, Mapping):
                    raise ConfigError(f"expected {field} by name, got {shown(given)}")
                object.__setattr__(self, field, {str(name): of(name, value) for name, value in given.items()})
        for name, kind in (self.views or {}).items():
            if kind not in KINDS:
                raise ConfigError(f"expected a kind of view among {', '.join(KINDS)}, got {kind!r} for {name!r}")
            if not name.isidentifier() or name in RESERVED:
                raise ConfigError(
                    f"expected an identifier that the program does not use as name of a view, got {name!r}"
                )
            if NAMED_KINDS.get(name, kind) != kind:
                raise ConfigError(f"expected view {name!r} of kind {NAMED_KINDS[name]!r}, got {kind!r}")
        self._check_sites()
        if self.views is not None and not self.views:
            raise ConfigError("expected at least one view, got none")

    def _check_sites(self) -> None:
        """Refuse views whose sites, or the dimensions of whose draws, have one name."""
        owners: dict[str, str] = {}
        for view in (KINDS[kind](2, name) for name, kind in (self.views or {}).items()):
            for name in (view.name, f"{view.name}_feature", *map(view.site, (*view.experts(), *view.shared()))):
                if (other := owners.setdefault(name, view.name)) != view.name:
                    raise ConfigError(f"expected views that share no name, got {name!r} of {other!r} and {view.name!r}")

    def check_experts(self, experts: Sequence[str]) -> None:
        """Refuse names that are no experts.

        Raises:
            ConfigError: a prior or a family of another name, or an expert in two families.
        """
        members = [name for family in (self.families or {}).values() for name in family]
        if unknown := (set(self.prior or {}) - {*experts, "base"}) | (set(members) - set(experts)):
            raise ConfigError(f"expected names of experts {list(experts)} in prior and families, got {sorted(unknown)}")
        if len(set(members)) < len(members):
            raise ConfigError(f"expected each expert in one family at most, got {members}")

    def kinds(self, available: Sequence[str]) -> dict[str, str]:
        """View → kind of what is read of evidence with these views.

        Raises:
            EvidenceError: a view that the program names is not there, or none that it knows.
        """
        if self.views is None:
            found = {name: kind for name, kind in NAMED_KINDS.items() if name in available}
            if not found:
                names = ", ".join(f'"{name}"' for name in NAMED_KINDS)
                named = f"Admixture(views={{{sorted(available)[0]!r}: 'vectors'}})"
                wanted = f"one of the views {names}, or a program that names the kinds of others, such as {named}"
                raise EvidenceError(f"expected {wanted}, got {sorted(available)}")
            return found
        if absent := set(self.views) - set(available):
            raise EvidenceError(f"expected the views {sorted(self.views)}, got none of the name {sorted(absent)[0]!r}")
        return dict(self.views)

    def model(self, experts: Sequence[str], views: tuple[View, ...]) -> DispatchModel:
        """The Pyro program for these experts and views."""
        return DispatchModel(len(experts), views, None, self._prior(experts), self._families(experts), self.sizes)

    def _prior(self, experts: Sequence[str]) -> tuple[float, ...] | None:
        if self.prior is None:
            return None
        return (*(self.prior.get(name, PRIOR[0]) for name in experts), self.prior.get("base", PRIOR[1]))

    def _families(self, experts: Sequence[str]) -> tuple[int, ...] | None:
        if self.families is None:
            return None
        family = {name: group for group, names in self.families.items() for name in names}
        keys = [("family", family[name]) if name in family else ("expert", name) for name in experts]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return tuple(numbers[key] for key in keys)
