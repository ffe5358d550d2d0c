"""Byte-level tokens: ids 0–255 are the bytes of UTF-8 text, then two special tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_dispatch.errors import PromptError, TensorError

__all__ = ["ByteTokenizer"]


class ByteTokenizer:
    """Text to bytes and back. ``bos`` begins every sequence, so that the first byte has a context; ``pad`` fills rows.

    Attributes:
        bos_token_id: 256. pad_token_id: 257. vocab_size: 258.
    """

    bos_token_id = 256
    pad_token_id = 257
    vocab_size = 258

    def encode(self, text: str | bytes) -> list[int]:
        """The beginning token and the bytes of ``text``.

        Raises:
            PromptError: ``text`` is not UTF-8.
        """
        return [self.bos_token_id, *utf8(text)]

    def encode_batch(self, texts: Sequence[str | bytes]) -> tuple[Tensor, Tensor]:
        """Right-padded ids (B, T) and their mask (B, T), 1 where there is a token.

        Raises:
            PromptError: no texts, or a text that is not UTF-8.
        """
        if not texts:
            raise PromptError("expected at least one text, got none")
        return self.pad([self.encode(text) for text in texts])

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Right-padded ids (B, T) and their mask (B, T) for rows of ids of any lengths."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return ids, mask

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of the byte tokens; special tokens are left out, bytes that are no UTF-8 become U+FFFD.

        Raises:
            TensorError: an id outside 0 … vocab_size − 1.
        """
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if any(not 0 <= value < self.vocab_size for value in values):
            raise TensorError(f"expected ids in 0 … {self.vocab_size - 1}, got {min(values)} … {max(values)}")
        return bytes(value for value in values if value < 256).decode("utf-8", errors="replace")


def utf8(text: str | bytes) -> bytes:
    """The bytes of ``text``.

    Raises:
        PromptError: ``text`` is bytes that are no UTF-8, or a string with lone surrogates.
    """
    try:
        if isinstance(text, bytes):
            text.decode("utf-8")
            return text
        return text.encode("utf-8")
    except UnicodeDecodeError as error:
        at = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise PromptError(f"expected UTF-8 text, got {at}") from None
    except UnicodeEncodeError as error:
        at = f"U+{ord(error.object[error.start]):04X} at position {error.start}"
        raise PromptError(f"expected UTF-8 text, got the lone surrogate {at}") from None
