"""Heads that read whole sequences: features of each token and each row, and labels of rows."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.config import ClassifierConfig, FeatureExtractorConfig, PoolingKind
from bayes_dispatch.model.mambaformer.pretrained import Pretrained
from bayes_dispatch.model.mambaformer.token_model import TokenModel

__all__ = [
    "ClassifierOutput",
    "Features",
    "MambaFormerForFeatureExtraction",
    "MambaFormerForSequenceClassification",
    "pool",
]


class Features(NamedTuple):
    """``hidden`` (B, T, D): the last states, normalised, zero at padding. ``pooled`` (B, D): one vector per row."""

    hidden: Float[Tensor, "B T D"]
    pooled: Float[Tensor, "B D"]


class ClassifierOutput(NamedTuple):
    """Logits (B, num_labels), mean cross-entropy where labels were given, and the ``Features`` that they come from."""

    logits: Float[Tensor, "B L"]
    loss: Float[Tensor, ""] | None
    hidden: Float[Tensor, "B T D"]
    pooled: Float[Tensor, "B D"]


class PoolingModel(TokenModel, Pretrained):
    """Reads whole rows and pools them: what the heads below share."""

    config: FeatureExtractorConfig

    def start_from(self, model: TokenModel) -> None:
        """Take the embedding, the blocks and the norm of another model, such as a pre-trained language model.

        And its tokenizer, which says what the embedding is of.

        Raises:
            ConfigError: its vocabulary is another, or something in its backbone that decides results.
        """
        if self.backbone.deciding() != model.backbone.deciding():
            raise ConfigError(f"expected a model of backbone {self.backbone}, got {model.backbone}")
        if self.vocab_size != model.vocab_size:
            raise ConfigError(f"expected a model of vocab_size {self.vocab_size}, got {model.vocab_size}")
        self.embedding.load_state_dict(model.embedding.state_dict())
        self.blocks.load_state_dict(model.blocks.state_dict())
        self.norm.load_state_dict(model.norm.state_dict())
        if isinstance(model, Pretrained):
            self.tokenizer = model.tokenizer

    def _features(self, input_ids: Tensor, attention_mask: Tensor | None, adaptation: Adaptation | None) -> Features:
        hidden, padding = self.read(input_ids, attention_mask, None, adaptation)
        real = padding.real(hidden.shape[1])
        pooled = pool(hidden, real, self.config.pooling)
        return Features(hidden if real is None else hidden.masked_fill(~real[..., None], 0), pooled)


class MambaFormerForFeatureExtraction(PoolingModel):
    """Features of each token and of each row.

    Example:
        >>> config = FeatureExtractorConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)
        >>> MambaFormerForFeatureExtraction(config)(torch.tensor([[256, 104, 105]])).pooled.shape
        torch.Size([1, 32])
    """

    config_class = FeatureExtractorConfig

    def __init__(self, config: FeatureExtractorConfig) -> None:
        super().__init__(config.backbone, config.vocab_size)
        self.config = config

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        adaptation: Adaptation | None = None,
    ) -> Features:
        """Read each row.

        Args:
            input_ids: tokens. attention_mask: 1 for tokens, 0 for padding, on the left or on the right of a row.
            adaptation: scales for some matrices; the stored weights where ``None``.

        Raises:
            TensorError: ids or mask of the wrong shape, dtype or range, a mask with holes, or a row of padding.
        """
        return self._features(input_ids, attention_mask, adaptation)


class MambaFormerForSequenceClassification(PoolingModel):
    """A label for each row, from its pooled features.

    Example:
        >>> config = ClassifierConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258, num_labels=3)
        >>> MambaFormerForSequenceClassification(config)(torch.tensor([[256, 104, 105]])).logits.shape
        torch.Size([1, 3])
    """

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config.backbone, config.vocab_size)
        self.config = config
        self.num_labels = config.num_labels
        self.head = nn.Linear(config.backbone.d_model, config.num_labels)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        adaptation: Adaptation | None = None,
        labels: Int[Tensor, " B"] | None = None,
    ) -> ClassifierOutput:
        """Read each row, and weigh its labels.

        Args:
            input_ids, attention_mask, adaptation: see ``MambaFormerForFeatureExtraction``.
            labels: the right label of each row, for the loss.

        Raises:
            TensorError: ids, mask or labels of the wrong shape, dtype or range, a mask with holes, or a row of padding.
        """
        features = self._features(input_ids, attention_mask, adaptation)
        logits = self.head(features.pooled)
        loss = None
        if labels is not None:
            _check_labels(labels, logits.shape[0], self.num_labels)
            loss = F.cross_entropy(logits, labels.long())
        return ClassifierOutput(logits, loss, *features)


def pool(hidden: Float[Tensor, "B T D"], real: Bool[Tensor, "B T"] | None, kind: PoolingKind) -> Float[Tensor, "B D"]:
    """One vector per row: the last of its real tokens, their mean, or their maximum by feature.

    Args:
        hidden: states. real: true at real tokens, of which each row has one; ``None`` where all are. kind: which.
    """
    if kind == "last":
        if real is None:
            return hidden[:, -1]
        place = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, place, 0).amax(1)
        return hidden[torch.arange(len(last), device=real.device), last]
    if kind == "mean":
        if real is None:
            return hidden.mean(1)
        return hidden.masked_fill(~real[..., None], 0).sum(1) / real.sum(1, keepdim=True)
    return (hidden if real is None else hidden.masked_fill(~real[..., None], -torch.inf)).amax(1)


def _check_labels(labels: Tensor, rows: int, num_labels: int) -> None:
    if labels.shape != (rows,):
        raise TensorError(f"expected labels of shape ({rows},), got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TensorError(f"expected integer labels, got {labels.dtype}")
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= num_labels:
        raise TensorError(f"expected labels in 0 … {num_labels - 1}, got {low} … {high}")
