"""What keys of the transformers library mean, as settings of ours.

A part is one key, or a few that belong together. It tells the settings that they mean, and the keys that mean given
settings, so that what is read and what is written is said once.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.config import BlockKind
from bayes_dispatch.model.mambaformer.conversion.keys import AUTO, NEEDED, NUMBER, Keys

__all__ = [
    "Alias",
    "Biases",
    "Fixed",
    "Ignored",
    "Key",
    "Limits",
    "Part",
    "Positions",
    "Rotary",
    "Settings",
    "StateHeads",
    "Unused",
    "translated",
]

Settings = dict[str, Any]


class Part:
    """Keys that belong together. This one has none; it names no setting and is not written."""

    def names(self) -> Mapping[str, str]:
        """Settings that are said here, and the key that says each: for errors."""
        return {}

    def read(self, keys: Keys, found: Settings) -> Settings:
        """What the keys say, as settings of ours; ``found``: what earlier parts said."""
        return {}

    def write(self, said: Settings) -> dict[str, Any]:
        """The keys that say this, where they can; what they cannot is found as they are read again."""
        return {}


def translated(error: ConfigError, parts: tuple[Part, ...]) -> ConfigError:
    """An error that names our settings, as one that names theirs."""
    names = {setting: name for part in parts for setting, name in part.names().items()}
    return ConfigError(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(error)))


@dataclass(frozen=True)
class Key(Part):
    """One key and one setting, whose values are the same.

    Attributes:
        default: where the key is absent or null. null: where it is null, if that is not the same.
    """

    name: str
    setting: str
    default: Any = NEEDED
    kind: Any = int
    null: Any = NEEDED

    def names(self) -> Mapping[str, str]:
        return {self.setting: self.name}

    def read(self, keys: Keys, found: Settings) -> Settings:
        return {self.setting: keys.get(self.name, self.default, self.kind, self.null)}

    def write(self, said: Settings) -> dict[str, Any]:
        return {self.name: said[self.setting]}


@dataclass(frozen=True)
class Fixed(Part):
    """A key of which only some values are covered; the first of them is written."""

    name: str
    default: Any
    allowed: tuple[Any, ...]

    def read(self, keys: Keys, found: Settings) -> Settings:
        keys.expect(self.name, self.default, *self.allowed)
        return {}

    def write(self, said: Settings) -> dict[str, Any]:
        return {self.name: self.allowed[0]}


@dataclass(frozen=True)
class Alias(Part):
    """A key that says again what others said, or what is always so."""

    name: str
    value: Callable[[Settings], Any]

    def read(self, keys: Keys, found: Settings) -> Settings:
        own = self.value(found)
        keys.expect(self.name, own, own)
        return {}


@dataclass(frozen=True)
class Ignored(Part):
    """A key that has an effect in other kinds of models alone."""

    name: str

    def read(self, keys: Keys, found: Settings) -> Settings:
        keys.get(self.name, None, object)
        return {}


class Unused(Part):
    """Settings of blocks that this kind has not."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def read(self, keys: Keys, found: Settings) -> Settings:
        return self.settings


class Biases(Part):
    """Keys of truth values, and the kinds of blocks whose projections have a bias then."""

    def __init__(self, **kinds: BlockKind) -> None:
        self.kinds = kinds

    def read(self, keys: Keys, found: Settings) -> Settings:
        return {"biased": tuple(kind for name, kind in self.kinds.items() if keys.get(name, False, bool))}

    def write(self, said: Settings) -> dict[str, Any]:
        return {name: kind in said["biased"] for name, kind in self.kinds.items()}


@dataclass(frozen=True)
class StateHeads(Part):
    """Heads of Mamba-2: the keys of inner width, heads, a head's width and groups."""

    expand: str
    heads: str
    width: str
    groups: str
    default_width: int | None
    default_groups: int

    def names(self) -> Mapping[str, str]:
        return {"expand": self.expand, "head_dim": self.width, "n_groups": self.groups, "norm_groups": self.groups}

    def read(self, keys: Keys, found: Settings) -> Settings:
        expand, heads = keys.get(self.expand, 2), keys.get(self.heads, 128)
        width = keys.get(self.width, self.default_width, AUTO)
        inner = expand * found["d_model"]
        if (inner // heads if width is None else width) * heads != inner:
            named, got = f"{self.expand} × hidden_size = {inner}", f"{self.heads} {heads} × {self.width} {width}"
            raise ConfigError(f"expected heads of a {keys.kind} config of {named} channels in all, got {got}")
        groups = keys.get(self.groups, self.default_groups)
        return {"expand": expand, "head_dim": inner // heads, "n_groups": groups, "norm_groups": groups}

    def write(self, said: Settings) -> dict[str, Any]:
        heads = said["expand"] * said["d_model"] // said["head_dim"]
        return {
            self.expand: said["expand"],
            self.heads: heads,
            self.width: said["head_dim"],
            self.groups: said["n_groups"],
        }


class Limits(Part):
    """Bounds of Mamba-2's step sizes."""

    def names(self) -> Mapping[str, str]:
        return {"dt_limit": "time_step_limit"}

    def read(self, keys: Keys, found: Settings) -> Settings:
        given = keys.get("time_step_limit", (0.0, math.inf), list | tuple)
        # that library writes infinity as an object of its own
        bounds = [math.inf if bound == {"__float__": "Infinity"} else bound for bound in given]
        if len(bounds) != 2:
            raise ConfigError(f"expected time_step_limit of a {keys.kind} config to be two numbers, got {given!r:.80}")
        low, high = (keys.checked("time_step_limit", bound, NUMBER) for bound in bounds)
        return {"dt_limit": (low, None if high == math.inf else high)}

    def write(self, said: Settings) -> dict[str, Any]:
        low, high = said["dt_limit"]
        return {"time_step_limit": [low, math.inf if high is None else high]} if said["dt_limit"] != (0, None) else {}


@dataclass(frozen=True)
class Rotary(Part):
    """Rotary positions, of which the default kind alone is known.

    Attributes:
        part: of each head that is turned, where ``rope_parameters`` do not tell. told: whether they may.
    """

    part: float = 1.0
    told: bool = False

    def names(self) -> Mapping[str, str]:
        return {"rotary_base": "rope_theta", "rotary_width": "partial_rotary_factor"}

    def read(self, keys: Keys, found: Settings) -> Settings:
        given = keys.get("rope_parameters", None, dict) or {}
        scaling = keys.get("rope_scaling", None, dict) or {}
        if given and scaling:
            raise ConfigError(f"expected rope_parameters or rope_scaling in a {keys.kind} config, got both")
        for where, values in (("rope_scaling", scaling), ("rope_parameters", given)):
            for name, value in values.items():
                plain = name in ("rope_type", "type") and value == "default"
                if not plain and not (where == "rope_parameters" and name in ("rope_theta", "partial_rotary_factor")):
                    raise ConfigError(
                        f"expected {where} of a {keys.kind} config of the default kind, got {name} = {value!r:.80}"
                    )
        theta = keys.checked("rope_theta", given.get("rope_theta", keys.get("rope_theta", 10_000.0, NUMBER)), NUMBER)
        named = "partial_rotary_factor"  # that library reads it of one kind alone, and there in rope_parameters
        outside, factor = keys.get(named, self.part, NUMBER), keys.checked(named, given.get(named, self.part), NUMBER)
        if outside != self.part or (factor != self.part and not self.told):
            got = factor if outside == self.part else outside
            raise ConfigError(f"expected {named} of a {keys.kind} config to be {self.part}, got {got}")
        width = found["attention_head_dim"] or found["d_model"] // found["n_heads"]
        turned = int(width * factor) if math.isfinite(factor) else 0
        if turned % 2 or not 0 < turned <= width:
            heads = f"{named} of a {keys.kind} config to turn an even number of each head's {width}"
            raise ConfigError(f"expected {heads}, got {factor} of them")
        return {"positions": "rotary", "rotary_base": theta, "rotary_width": turned}

    def write(self, said: Settings) -> dict[str, Any]:
        width = said["attention_head_dim"]
        turned = said["rotary_width"] or int(width * self.part)
        factor = turned / width
        factor = factor if int(width * factor) == turned else math.nextafter(factor, math.inf)
        told = {"partial_rotary_factor": factor} if self.told else {}
        return {"rope_parameters": {"rope_type": "default", "rope_theta": said["rotary_base"], **told}}


class Positions(Rotary):
    """Rotary positions or none."""

    def read(self, keys: Keys, found: Settings) -> Settings:
        if keys.expect("position_embedding_type", "nope", "nope", "rope") == "rope":
            return super().read(keys, found)
        for name in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"):
            keys.get(name, None, object)
        return {}

    def write(self, said: Settings) -> dict[str, Any]:
        kind = "rope" if said["positions"] == "rotary" else "nope"
        return super().write(said) | {"position_embedding_type": kind}
