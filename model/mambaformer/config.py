"""Sizes of a MambaFormer: frozen, validated once, saved as JSON.

The backbone knows no vocabulary; each head's configuration composes it (DESIGN: decoupled configurations).
"""

import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast, get_args

from bayes_dispatch.arguments import real
from bayes_dispatch.errors import ConfigError

__all__ = [
    "BlockKind",
    "ClassifierConfig",
    "FeatureExtractorConfig",
    "LanguageModelConfig",
    "MambaFormerConfig",
    "PoolingKind",
    "Seq2SeqConfig",
    "StateSpaceKind",
]

StateSpaceKind = Literal["mamba1", "mamba2"]
PositionKind = Literal["none", "rotary"]
BlockKind = Literal["mamba1", "mamba2", "attention", "cross_attention", "feed_forward"]
PoolingKind = Literal["last", "mean", "max"]

LATER = ("logits_scaling", "longest")  # settings that files have where they are not their defaults alone

C = TypeVar("C", bound="Composed")


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
            a head's width.
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
            _expect_integer(name, getattr(self, name), at_least=1)
        _expect_integer("n_pairs", self.n_pairs, at_least=0)
        _expect_integer("d_conv", self.d_conv, at_least=2)
        for name in ("n_kv_heads", "attention_window", "dt_rank", "d_ff", "attention_head_dim", "rotary_width"):
            if getattr(self, name) is not None:
                _expect_integer(name, getattr(self, name), at_least=1)
        _expect_member("mixer", self.mixer, StateSpaceKind)
        _expect_member("positions", self.positions, PositionKind)
        if self.blocks is not None:
            if not isinstance(self.blocks, tuple) or not self.blocks:
                raise ConfigError(f"expected blocks to be a tuple of at least one kind, got {self.blocks!r}")
            for kind in self.blocks:
                _expect_member("each of blocks", kind, BlockKind)
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
        for name in ("embedding_multiplier", "residual_multiplier"):
            real(name, getattr(self, name))
        if self.attention_multiplier is not None:
            real("attention_multiplier", self.attention_multiplier)
        for name, above in (("rotary_base", True), ("norm_eps", False)):
            real(name, getattr(self, name), 0, above=above)
        if not (isinstance(self.dt_limit, tuple) and len(self.dt_limit) == 2):
            raise ConfigError(f"expected dt_limit to be two bounds, got {self.dt_limit!r}")
        low = real("the lower bound of dt_limit", self.dt_limit[0], 0)
        if self.dt_limit[1] is not None:
            real("the upper bound of dt_limit", self.dt_limit[1], low)
        if not isinstance(self.biased, tuple):
            raise ConfigError(f"expected biased to be a tuple of kinds of blocks, got {self.biased!r}")
        for kind in self.biased:
            _expect_member("each of biased", kind, BlockKind)

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

    @classmethod
    def from_json(cls, data: Any) -> "MambaFormerConfig":
        """Inverse of ``to_json``; what a file lacks has its default.

        Raises:
            ConfigError: a name is unknown, or a value is out of range.
        """
        given: dict[str, Any] = dict(_expect_names(cls, data))
        for name in ("blocks", "dt_limit", "biased"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**given)


class Composed:
    """A dataclass around one or more backbones, which JSON can hold."""

    def to_json(self) -> dict[str, Any]:
        given = {n: v.to_json() if isinstance(v, MambaFormerConfig) else v for n, v in vars(self).items()}
        return {n: v for n, v in given.items() if n not in LATER or v != getattr(type(self), n)}

    @classmethod
    def from_json(cls: type[C], data: Any) -> C:
        """Inverse of ``to_json``.

        Raises:
            ConfigError: a name is missing or unknown, or a value is out of range.
        """
        data = _expect_names(cls, data)
        backbones = [field.name for field in fields(cast(Any, cls)) if field.type is MambaFormerConfig]
        return cls(**data | {name: MambaFormerConfig.from_json(data[name]) for name in backbones})


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Composed):
    """A backbone with an embedding and a next-token head over ``vocab_size`` tokens.

    Attributes:
        tie_embeddings: whether the head is the embedding, too. logits_scaling: what logits are divided by.
        longest: tokens that the model was made for.
    """

    backbone: MambaFormerConfig
    vocab_size: int
    tie_embeddings: bool = True
    logits_scaling: float = 1.0
    longest: int = 32_768  # attention would read more, and take the memory for them

    def __post_init__(self) -> None:
        _expect_integer("vocab_size", self.vocab_size, at_least=2)
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"expected tie_embeddings to be true or false, got {self.tie_embeddings!r}")
        real("logits_scaling", self.logits_scaling, 0, above=True)
        _expect_integer("longest", self.longest, at_least=1)


@dataclass(frozen=True, kw_only=True)
class FeatureExtractorConfig(Composed):
    """A backbone with an embedding over ``vocab_size`` tokens, whose last hidden states are pooled for each row.

    Attributes:
        pooling: over the row's real tokens: the ``"last"`` of them, their ``"mean"``, or their ``"max"`` by feature.
    """

    backbone: MambaFormerConfig
    vocab_size: int
    pooling: PoolingKind = "mean"

    def __post_init__(self) -> None:
        _expect_integer("vocab_size", self.vocab_size, at_least=2)
        _expect_member("pooling", self.pooling, PoolingKind)
        _expect_alone(self.backbone)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(FeatureExtractorConfig):
    """A backbone with an embedding, and a linear map from each row's pooled states to ``num_labels`` logits."""

    num_labels: int
    pooling: PoolingKind = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect_integer("num_labels", self.num_labels, at_least=1)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(Composed):
    """An encoder, a decoder that attends to it, and one embedding over ``vocab_size`` tokens for both.

    Attributes:
        encoder: blocks that see the whole input, both ways; attention without a window.
        decoder: blocks with at least one ``"cross_attention"`` among them, as wide as the encoder.
        tie_embeddings: whether the next-token head is the embedding, too.
        start_token_id: what every output begins with, unseen.
    """

    encoder: MambaFormerConfig
    decoder: MambaFormerConfig
    vocab_size: int
    tie_embeddings: bool = True
    start_token_id: int = 0

    def __post_init__(self) -> None:
        _expect_integer("vocab_size", self.vocab_size, at_least=2)
        _expect_integer("start_token_id", self.start_token_id, at_least=0)
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"expected tie_embeddings to be true or false, got {self.tie_embeddings!r}")
        if self.start_token_id >= self.vocab_size:
            raise ConfigError(f"expected start_token_id in 0 … {self.vocab_size - 1}, got {self.start_token_id}")
        _expect_alone(self.encoder)
        if self.encoder.attention_window is not None:
            raise ConfigError(f"expected an encoder without attention_window, got {self.encoder.attention_window}")
        if "cross_attention" not in self.decoder.block_kinds:
            raise ConfigError(f"expected cross_attention among the decoder's blocks, got {self.decoder.block_kinds}")
        if self.encoder.d_model != self.decoder.d_model:
            widths = f"{self.encoder.d_model} and {self.decoder.d_model}"
            raise ConfigError(f"expected an encoder and a decoder of one d_model, got {widths}")

    @classmethod
    def symmetric(
        cls, backbone: MambaFormerConfig, *, vocab_size: int, tie_embeddings: bool = True, start_token_id: int = 0
    ) -> "Seq2SeqConfig":
        """``backbone`` twice: both ways as the encoder, and with cross-attention as the decoder.

        The decoder of a MambaFormer is the state-space block, then ``n_pairs`` of (attention, cross-attention, state
        space). For other ``blocks``, cross-attention follows each attention block, or each state-space block where
        there is no attention.
        """
        kinds = backbone.block_kinds
        followed = {"attention"} if "attention" in kinds else {"mamba1", "mamba2"}
        blocks: list[BlockKind] = []
        for kind in kinds:
            blocks += [kind, "cross_attention"] if kind in followed else [kind]
        return cls(
            encoder=replace(backbone, attention_window=None),
            decoder=replace(backbone, blocks=tuple(blocks)),
            vocab_size=vocab_size,
            tie_embeddings=tie_embeddings,
            start_token_id=start_token_id,
        )


def _expect_alone(backbone: MambaFormerConfig) -> None:
    """Raise ``ConfigError`` if a block needs an encoder to attend to."""
    if "cross_attention" in backbone.block_kinds:
        raise ConfigError(f"expected cross_attention in the blocks of a decoder only, got {backbone.block_kinds}")


def _expect_integer(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"expected {name} to be an integer of at least {at_least}, got {value!r}")


def _expect_member(name: str, value: object, kind: object) -> None:
    allowed = get_args(kind)
    if value not in allowed:
        raise ConfigError(f"expected {name} to be one of {', '.join(allowed)}, got {value!r}")


def _expect_names(cls: type, data: Any) -> dict[str, Any]:
    """``data``, if it has all names of ``cls`` that lack a default, and none that ``cls`` lacks."""
    allowed = {field.name for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is MISSING}
    got = set(data) if isinstance(data, dict) else {type(data).__name__}
    if not needed <= got <= allowed:
        raise ConfigError(f"expected the names {sorted(allowed)} in {cls.__name__}, got {sorted(got)}")
    return data
