"""Sizes of a MambaFormer: frozen, validated once, saved as JSON.

The backbone knows no vocabulary; each head's configuration composes it (DESIGN: decoupled configurations).
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from bayes_dispatch.errors import ConfigError

__all__ = ["LanguageModelConfig", "MambaFormerConfig"]


@dataclass(frozen=True, kw_only=True)
class MambaFormerConfig:
    """One Mamba block, then ``n_pairs`` of (attention, Mamba) blocks; no positional encoding (arXiv 2402.04248).

    Attributes:
        d_model: width D of the residual stream.
        n_pairs: pairs of (attention, Mamba) after the first Mamba block; the model has 1 + 2 * n_pairs blocks.
        n_heads: query heads of an attention block; divides ``d_model``.
        n_kv_heads: key/value heads, shared by groups of query heads; ``None`` means ``n_heads``.
        d_state: width N of a Mamba state.
        d_conv: taps of the causal depthwise convolution.
        expand: inner width of a Mamba block over ``d_model``.
        head_dim: width P of a Mamba-2 head; divides ``expand * d_model``.
        mixer: the state-space mixer; ``"mamba2"`` (SSD, arXiv 2405.21060).
        chunk_size: tokens in a chunk of the SSD scan.
        attention_window: how many tokens back attention sees, itself included; ``None`` means all.
    """

    d_model: int = 128
    n_pairs: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = None
    d_state: int = 32
    d_conv: int = 4
    expand: int = 2
    head_dim: int = 32
    mixer: Literal["mamba2"] = "mamba2"
    chunk_size: int = 32
    attention_window: int | None = None

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_state", "expand", "head_dim", "chunk_size"):
            _expect_integer(name, getattr(self, name), at_least=1)
        _expect_integer("n_pairs", self.n_pairs, at_least=0)
        _expect_integer("d_conv", self.d_conv, at_least=2)
        for name in ("n_kv_heads", "attention_window"):
            if getattr(self, name) is not None:
                _expect_integer(name, getattr(self, name), at_least=1)
        if self.mixer != "mamba2":
            raise ConfigError(f"expected mixer 'mamba2', got {self.mixer!r}")
        if self.d_model % self.n_heads:
            raise ConfigError(f"expected n_heads to divide d_model {self.d_model}, got n_heads {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"expected n_kv_heads to divide n_heads {self.n_heads}, got {self.n_kv_heads}")
        if self.d_inner % self.head_dim:
            raise ConfigError(f"expected head_dim to divide the inner width {self.d_inner}, got {self.head_dim}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def n_blocks(self) -> int:
        return 1 + 2 * self.n_pairs

    @classmethod
    def tiny(cls) -> "MambaFormerConfig":
        """Three narrow blocks, for tests and examples."""
        return cls(d_model=32, n_pairs=1, n_heads=2, d_state=8, head_dim=16, chunk_size=8)


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A backbone with an embedding and a next-token head over ``vocab_size`` tokens."""

    backbone: MambaFormerConfig
    vocab_size: int
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        _expect_integer("vocab_size", self.vocab_size, at_least=2)
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"expected tie_embeddings to be true or false, got {self.tie_embeddings!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> "LanguageModelConfig":
        """Inverse of ``to_json``.

        Raises:
            ConfigError: a name is missing or unknown, or a value is out of range.
        """
        data = _expect_names(cls, data)
        backbone = MambaFormerConfig(**_expect_names(MambaFormerConfig, data["backbone"]))
        return cls(backbone=backbone, vocab_size=data["vocab_size"], tie_embeddings=data["tie_embeddings"])


def _expect_integer(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"expected {name} to be an integer of at least {at_least}, got {value!r}")


def _expect_names(cls: type, data: Any) -> dict[str, Any]:
    expected = {field.name for field in fields(cls)}
    got = set(data) if isinstance(data, dict) else {type(data).__name__}
    if got != expected:
        raise ConfigError(f"expected the names {sorted(expected)} in {cls.__name__}, got {sorted(got)}")
    return data
