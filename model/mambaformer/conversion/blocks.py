"""Which blocks there are, as kinds of the transformers library tell it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.config import BlockKind
from bayes_dispatch.model.mambaformer.conversion.keys import Keys, listed
from bayes_dispatch.model.mambaformer.conversion.parts import Part, Settings

__all__ = ["Layers", "Places", "Repeated"]


@dataclass(frozen=True)
class Repeated(Part):
    """Layers that are all alike, of these blocks each."""

    blocks: tuple[BlockKind, ...]
    default: int

    def names(self) -> Mapping[str, str]:
        return {"blocks": "num_hidden_layers"}

    def read(self, keys: Keys, found: Settings) -> Settings:
        return {"blocks": self.blocks * keys.get("num_hidden_layers", self.default)}

    def write(self, said: Settings) -> dict[str, Any]:
        return {"num_hidden_layers": -(-len(said["blocks"]) // len(self.blocks))}


LAYERS: dict[str, BlockKind] = {
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
}


class Layers(Part):
    """Layers that are named one by one: a mixer and an MLP each."""

    def names(self) -> Mapping[str, str]:
        return {"blocks": "layer_types"}

    def read(self, keys: Keys, found: Settings) -> Settings:
        count = keys.get("num_hidden_layers", 32)
        named = keys.get("layer_types", keys.get("layers_block_type", ["mamba"] * count, list), list)
        if len(named) != count:
            raise ConfigError(f"expected layer_types of num_hidden_layers {count} layers, got {len(named)}")
        return {"blocks": _with_mlp(_kinds(keys, "layer_types", named))}

    def write(self, said: Settings) -> dict[str, Any]:
        mixers = _mixers(said["blocks"])
        named = ["attention" if kind == "attention" else "mamba" for kind in mixers]
        return {"num_hidden_layers": len(mixers), "layer_types": named}


class Places(Part):
    """Layers of a mixer and an MLP each, where the places of attention are named."""

    def names(self) -> Mapping[str, str]:
        return {"blocks": "attn_layer_indices"}

    def read(self, keys: Keys, found: Settings) -> Settings:
        count, at = keys.get("num_hidden_layers", 32), keys.get("attn_layer_indices", [], list)
        if outside := [place for place in at if place not in range(count)]:
            raise ConfigError(f"expected attn_layer_indices below num_hidden_layers {count}, got {outside[0]!r:.80}")
        kinds: list[BlockKind] = ["attention" if place in at else "mamba2" for place in range(count)]
        named = keys.get("layers_block_type", None, list)
        if named is not None and _kinds(keys, "layers_block_type", named) != kinds:
            raise ConfigError(
                f"expected layers_block_type of a {keys.kind} config like attn_layer_indices, got {named!r:.80}"
            )
        return {"blocks": _with_mlp(kinds)}

    def write(self, said: Settings) -> dict[str, Any]:
        mixers = _mixers(said["blocks"])
        at = [place for place, kind in enumerate(mixers) if kind == "attention"]
        return {"num_hidden_layers": len(mixers), "attn_layer_indices": at}


def _kinds(keys: Keys, name: str, layers: list[Any]) -> list[BlockKind]:
    for layer in layers:
        if not isinstance(layer, str) or layer not in LAYERS:
            raise ConfigError(f"expected {name} of a {keys.kind} config to be {listed(LAYERS)} each, got {layer!r:.80}")
    return [LAYERS[layer] for layer in layers]


def _with_mlp(kinds: list[BlockKind]) -> tuple[BlockKind, ...]:
    return tuple(block for kind in kinds for block in (kind, "feed_forward"))


def _mixers(blocks: tuple[BlockKind, ...]) -> list[BlockKind]:
    return [kind for kind in blocks if kind != "feed_forward"] or ["attention"]
