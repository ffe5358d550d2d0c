"""The encoder of a sequence-to-sequence model, and a record of what its output was made from."""

import hashlib
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from bayes_dispatch.errors import StaleCacheError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.block import build_mixer
from bayes_dispatch.model.mambaformer.blocks import BlockStack
from bayes_dispatch.model.mambaformer.config import BlockKind, MambaFormerConfig
from bayes_dispatch.model.mambaformer.mixers import BidirectionalAttention
from bayes_dispatch.model.mambaformer.mixers.bidirectional import BidirectionalMixer
from bayes_dispatch.model.mambaformer.padding import Padding

__all__ = ["BidirectionalStack", "Input", "check_source", "makers", "source_of"]

DIGEST = 16  # bytes


class BidirectionalStack(BlockStack):
    """Bidirectional blocks over hidden states: attention to all tokens, and state-space scans in both directions."""

    def __init__(self, backbone: MambaFormerConfig) -> None:
        super().__init__(backbone, _build_bidirectional)

    def forward(
        self, x: Float[Tensor, "B S D"], padding: Padding, adaptation: Adaptation
    ) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"] | None]:
        """The last hidden states, normalised, with zeros at padding, and where they are real (``None``: everywhere).

        Args:
            x: hidden states with padding where ``padding`` says. adaptation: checked scales, named ``blocks.i.…``.
        """
        hidden = padding.restore(self._run(padding.to_right(x), padding, None, adaptation))
        real = padding.real(x.shape[1])
        return (hidden, None) if real is None else (hidden.masked_fill(~real[..., None], 0), real)


class Input(NamedTuple):
    """Checked tokens for an encoder."""

    ids: Int[Tensor, "B S"]
    padding: Padding

    def contents(self) -> list[bytes]:
        """The real tokens of each row."""
        ids = self.padding.to_right(self.ids).long().cpu()
        lengths = [ids.shape[1]] * len(ids) if self.padding.tokens is None else self.padding.tokens.tolist()
        return [row[:length].numpy().tobytes() for row, length in zip(ids, lengths, strict=True)]


def makers(model: str, adaptation: Adaptation) -> UInt8[Tensor, "R 16"]:
    """Digests of a model and of its encoder's scales: one for all rows, or one per row of the scales."""
    scales = adaptation.digest()
    return _digests([f"{model} {own}".encode() for own in ([scales] if isinstance(scales, str) else scales)])


def source_of(makers: UInt8[Tensor, "R 16"], given: Input) -> UInt8[Tensor, "B 32"]:
    """For each row, digests of what makes the encoder's output, and of the real tokens that it is made from."""
    contents = _digests(given.contents())
    return torch.cat([makers.expand(len(contents), -1), contents], dim=1)


def check_source(held: UInt8[Tensor, "B 32"], expected: Tensor) -> None:
    """Raise ``StaleCacheError`` where an encoder's output was made from something else.

    Args:
        held: the output's own record. expected: the ``makers`` that it has to have, or a whole record.
    """
    differs = held[:, : expected.shape[1]] != expected
    if bool(differs.any()):
        row = int(differs.any(1).long().argmax())
        what = "encoder under the scales" if bool(differs[row, :DIGEST].any()) else "input"
        raise StaleCacheError(f"expected the {what} that made the encoder's output of row {row}, got another")


def _digests(contents: list[bytes]) -> Tensor:
    digests = b"".join(hashlib.blake2b(content, digest_size=DIGEST).digest() for content in contents)
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, DIGEST)


def _build_bidirectional(kind: BlockKind, config: MambaFormerConfig) -> nn.Module:
    if kind in ("mamba1", "mamba2"):
        return BidirectionalMixer(build_mixer(kind, config), build_mixer(kind, config))
    return BidirectionalAttention(config) if kind == "attention" else build_mixer(kind, config)
