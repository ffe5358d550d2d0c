"""Sizes and settings of a sequence of blocks: frozen, validated once."""

import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

from bayes_dispatch.arguments import real, whole
from bayes_dispatch.errors import ConfigError

__all__ = [
    "BlockKind",
    "MambaFormerConfig",
    "StateSpaceKind",
    "expect_member",
    "expect_names",
    "keep_real",
    "keep_whole",
]

StateSpaceKind = Literal["mamba1", "mamba2"]
PositionKind = Literal["none", "rotary"]
BlockKind = Literal["mamba1", "mamba2", "attention", "cross_attention", "feed_forward"]

LARGEST, MOST_BLOCKS = 2**31, 8192  # beyond these is no model, but a file that asks for memory


@dataclass(frozen=True, kw_only=True)
class MambaFormerConfig:
    """The blocks of a model and their sizes.

    By default one state-space block, then ``n_pairs`` of (attention, state space), without positional encoding: the
    MambaFormer (arXiv 2402.04248). ``blocks`` names any other sequence instead: a pure Mamba is ``("mamba2",) * 8``, a
    pure Transformer ``("attention", "feed_forward") * 4`` with rotary positions, and a hybrid whose mixers have a gated
    MLP each ``("mamba2", "feed_forward", "attention", "feed_forward")``.

    Attributes:
        d_model: width D of the residual stream.
        n_pairs: pairs of (attention, state space) after the first block, for 1 + 2 * n_pairs blocks.
        n_heads: query heads of an attention block; divides ``d_model``.
        n_kv_heads: key/value heads, shared by groups of query heads; ``None`` means ``n_heads``.
        d_state: width N of a state.
        d_conv: taps of the causal depthwise convolution.
        expand: inner width of a state-space block over ``d_model``.
        head_dim: width P of a Mamba-2 head; divides ``expand * d_model``.
        mixer: the state-space mixer: ``"mamba2"`` (SSD, arXiv 2405.21060) or ``"mamba1"`` (selective scan, 2312.00752).
        chunk_size: tokens in a chunk of a scan; it changes no result.
        attention_window: how many tokens back attention sees, itself included; ``None`` means all.
        blocks: kinds of all blocks in order; ``None`` means the MambaFormer of ``mixer`` and ``n_pairs``.
        n_groups: groups of Mamba-2 heads that share B and C; divides the number of heads.
        dt_rank: rank of Mamba-1's step-size projection; ``None`` means d_model / 16, rounded up.
        d_ff: inner width of a feed-forward block; ``None`` means 8/3 of ``d_model``, rounded up to a multiple of 8.
        positions: what tells self-attention where a token stands: ``"none"``, or ``"rotary"`` (arXiv 2104.09864).
        attention_head_dim: width of a head of attention; ``None`` means ``d_model / n_heads``.
        attention_multiplier: what products of queries and keys are multiplied by; ``None`` means one over the root of
            a head's width; above 0.
        rotary_base: longest wavelength of rotary positions, over 2π.
        rotary_width: leading numbers of a head that rotary positions turn; ``None`` means all.
        embedding_multiplier: what embeddings of tokens are multiplied by before the first block.
        residual_multiplier: what each block's output is multiplied by before it is added to its input.
        norm_eps: what normalisations add to a mean square.
        norm_groups: groups of a Mamba-2 block's channels that are normalised apart; divides the inner width.
        dt_limit: bounds of Mamba-2's step sizes; ``None`` for an upper one that there is not.
        biased: kinds of blocks whose in- and out-projections have a bias.
    """

    d_model: int = 128
    n_pairs: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = None
    d_state: int = 32
    d_conv: int = 4
    expand: int = 2
    head_dim: int = 32
    mixer: StateSpaceKind = "mamba2"
    chunk_size: int = 32
    attention_window: int | None = None
    blocks: tuple[BlockKind, ...] | None = None
    n_groups: int = 1
    dt_rank: int | None = None
    d_ff: int | None = None
    positions: PositionKind = "none"
    attention_head_dim: int | None = None
    attention_multiplier: float | None = None
    rotary_base: float = 10_000.0
    rotary_width: int | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    norm_eps: float = 1e-5
    norm_groups: int = 1
    dt_limit: tuple[float, float | None] = (0.0, None)
    biased: tuple[BlockKind, ...] = ()

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_state", "expand", "head_dim", "chunk_size", "n_groups", "norm_groups"):
            keep_whole(self, name, 1)
        keep_whole(self, "n_pairs", 0)
        keep_whole(self, "d_conv", 2)
        for name in ("n_kv_heads", "attention_window", "dt_rank", "d_ff", "attention_head_dim", "rotary_width"):
            if getattr(self, name) is not None:
                keep_whole(self, name, 1)
        expect_member("mixer", self.mixer, StateSpaceKind)
        expect_member("positions", self.positions, PositionKind)
        if self.blocks is not None:
            if not isinstance(self.blocks, tuple) or not self.blocks:
                raise ConfigError(f"expected blocks to be a tuple of at least one kind, got {self.blocks!r}")
            for kind in self.blocks:
                expect_member("each of blocks", kind, BlockKind)
        if (count := 1 + 2 * self.n_pairs if self.blocks is None else len(self.blocks)) > MOST_BLOCKS:
            raise ConfigError(f"expected at most {MOST_BLOCKS} blocks, got {count}")
        if self.attention_head_dim is None and self.d_model % self.n_heads:
            raise ConfigError(f"expected n_heads to divide d_model {self.d_model}, got n_heads {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"expected n_kv_heads to divide n_heads {self.n_heads}, got {self.n_kv_heads}")
        if self.d_inner % self.head_dim:
            raise ConfigError(f"expected head_dim to divide the inner width {self.d_inner}, got {self.head_dim}")
        if self.d_inner // self.head_dim % self.n_groups:
            heads = self.d_inner // self.head_dim
            raise ConfigError(f"expected n_groups to divide the {heads} Mamba-2 heads, got {self.n_groups}")
        if self.d_inner % self.norm_groups:
            raise ConfigError(f"expected norm_groups to divide the inner width {self.d_inner}, got {self.norm_groups}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.turned % 2 and self.rotary_width is None:
            raise ConfigError(f"expected heads of even width for rotary positions, got {self.turned}")
        if self.turned % 2 or self.turned > self.head_width:
            raise ConfigError(f"expected rotary_width to be even and at most {self.head_width}, got {self.turned}")
        keep_real(self, "embedding_multiplier")
        keep_real(self, "residual_multiplier")
        if self.attention_multiplier is not None:
            keep_real(self, "attention_multiplier", 0, above=True)
        keep_real(self, "rotary_base", 0, above=True)
        keep_real(self, "norm_eps", 0)
        if not (isinstance(self.dt_limit, tuple) and len(self.dt_limit) == 2):
            raise ConfigError(f"expected dt_limit to be two bounds, got {self.dt_limit!r}")
        low, high = real("the lower bound of dt_limit", self.dt_limit[0], 0), self.dt_limit[1]
        high = None if high is None else real("the upper bound of dt_limit", high, low)
        object.__setattr__(self, "dt_limit", (low, high))
        if not isinstance(self.biased, tuple):
            raise ConfigError(f"expected biased to be a tuple of kinds of blocks, got {self.biased!r}")
        for kind in self.biased:
            expect_member("each of biased", kind, BlockKind)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def head_width(self) -> int:
        """Of a head of attention."""
        return self.d_model // self.n_heads if self.attention_head_dim is None else self.attention_head_dim

    @property
    def turned(self) -> int:
        """Numbers of a head that rotary positions turn; 0 without these."""
        if self.positions == "none":
            return 0
        return self.head_width if self.rotary_width is None else self.rotary_width

    @property
    def attention_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return 1 / math.sqrt(self.head_width) if self.attention_multiplier is None else self.attention_multiplier

    @property
    def dt_bounds(self) -> tuple[float, float]:
        """``dt_limit`` as numbers."""
        low, high = self.dt_limit
        return low, math.inf if high is None else high

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def block_kinds(self) -> tuple[BlockKind, ...]:
        """The kind of each block, in order."""
        pair: tuple[BlockKind, ...] = ("attention", self.mixer)
        return (self.mixer, *pair * self.n_pairs) if self.blocks is None else self.blocks

    @property
    def n_blocks(self) -> int:
        return len(self.block_kinds)

    @property
    def step_rank(self) -> int:
        return -(-self.d_model // 16) if self.dt_rank is None else self.dt_rank

    @property
    def feed_forward_width(self) -> int:
        return -(-self.d_model // 3) * 8 if self.d_ff is None else self.d_ff

    @classmethod
    def tiny(cls) -> "MambaFormerConfig":
        """Three narrow blocks, for tests and examples."""
        return cls(d_model=32, n_pairs=1, n_heads=2, d_state=8, head_dim=16, chunk_size=8)

    def to_json(self) -> dict[str, Any]:
        """The sizes, and those further settings that are not their defaults."""
        known = list(asdict(self).items())
        sizes = [name for name, _ in known].index("positions") + 1
        return dict(known[:sizes] + [(name, v) for name, v in known[sizes:] if v != getattr(type(self), name)])

    def deciding(self) -> dict[str, Any]:
        """``to_json`` of what decides a result."""
        return {name: value for name, value in self.to_json().items() if name != "chunk_size"}

    @classmethod
    def from_json(cls, data: Any) -> "MambaFormerConfig":
        """Inverse of ``to_json``; what a file lacks has its default.

        Raises:
            ConfigError: a name is unknown, or a value is out of range.
        """
        given: dict[str, Any] = dict(expect_names(cls, data))
        for name in ("blocks", "dt_limit", "biased"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**given)


def keep_whole(config: object, name: str, at_least: int) -> None:
    """Check a field of a frozen dataclass, and keep it as the ``int`` that JSON can hold."""
    object.__setattr__(config, name, whole(name, getattr(config, name), at_least, LARGEST))


def keep_real(config: object, name: str, at_least: float | int = -math.inf, *, above: bool = False) -> None:
    """The same of a ``float``."""
    object.__setattr__(config, name, real(name, getattr(config, name), at_least, above=above))


def expect_member(name: str, value: object, kind: object) -> None:
    allowed = get_args(kind)
    if value not in allowed:
        raise ConfigError(f"expected {name} to be one of {', '.join(allowed)}, got {value!r}")


def expect_names(cls: type, data: Any) -> dict[str, Any]:
    """``data``, if it has all names of ``cls`` that lack a default, and none that ``cls`` lacks."""
    allowed = {field.name for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is MISSING}
    got = set(data) if isinstance(data, dict) else {type(data).__name__}
    if not needed <= got <= allowed:
        raise ConfigError(f"expected the names {sorted(allowed)} in {cls.__name__}, got {sorted(got)}")
    return data
