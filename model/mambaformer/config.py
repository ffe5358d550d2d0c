"""Sizes of a MambaFormer: frozen, validated once, saved as JSON.

The backbone knows no vocabulary; each head's configuration composes it.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast

from bayes_dispatch.arguments import truth
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.mambaformer.backbone_config import (
    BlockKind,
    MambaFormerConfig,
    StateSpaceKind,
    expect_member,
    expect_names,
    keep_real,
    keep_whole,
)

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

PoolingKind = Literal["last", "mean", "max"]

LATER = ("logits_scaling", "longest")  # settings that files have where they are not their defaults alone

C = TypeVar("C", bound="Composed")


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
        data = expect_names(cls, data)
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
        keep_whole(self, "vocab_size", 2)
        object.__setattr__(self, "tie_embeddings", truth("tie_embeddings", self.tie_embeddings))
        keep_real(self, "logits_scaling", 0, above=True)
        keep_whole(self, "longest", 1)


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
        keep_whole(self, "vocab_size", 2)
        expect_member("pooling", self.pooling, PoolingKind)
        _expect_alone(self.backbone)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(FeatureExtractorConfig):
    """A backbone with an embedding, and a linear map from each row's pooled states to ``num_labels`` logits."""

    num_labels: int
    pooling: PoolingKind = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_whole(self, "num_labels", 1)


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
        keep_whole(self, "vocab_size", 2)
        keep_whole(self, "start_token_id", 0)
        object.__setattr__(self, "tie_embeddings", truth("tie_embeddings", self.tie_embeddings))
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
