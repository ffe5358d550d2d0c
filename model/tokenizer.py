"""Byte-level tokens: ids 0–255 are the bytes of UTF-8 text, then two special tokens."""

import codecs
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from bayes_dispatch.errors import PromptError, TensorError
from bayes_dispatch.model.backbone import Tokens

__all__ = ["ByteTokenizer"]


class ByteTokenizer:
    """Text to bytes and back. ``bos`` begins every sequence, so that the first byte has a context; ``pad`` fills rows.

    Attributes:
        bos_token_id: 256. pad_token_id: 257. vocab_size: 258.
    """

    bos_token_id = 256
    pad_token_id = 257
    vocab_size = 258
    ends: frozenset[int] = frozenset()
    continues: Bool[Tensor, " V"] = torch.arange(258) < 256

    def tokenize(self, text: str | bytes, begin: bool = True) -> Tokens:
        """The bytes of ``text``, each with its place, after the beginning token unless told otherwise.

        Raises:
            PromptError: ``text`` is not UTF-8.
        """
        data = utf8(text)
        spans = tuple((n, n + 1) for n in range(len(data)))
        return Tokens((self.bos_token_id, *data), ((0, 0), *spans)) if begin else Tokens(tuple(data), spans)

    def stream(self, context: Sequence[int]) -> "ByteStream":
        """The text that further bytes add; what came before does not matter, as texts break between characters."""
        return ByteStream()

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
        return self.pad([self.encode(text) for text in texts])

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Right-padded ids (B, T) and their mask (B, T) for rows of ids of any lengths.

        Raises:
            PromptError: no rows.
        """
        if not len(rows):
            raise PromptError("expected at least one text, got none")
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return ids, mask

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of the byte tokens; special tokens are left out, bytes that are no UTF-8 become U+FFFD.

        Numbers below 0, such as those that fill a row that has ended, are no tokens, and left out, too.

        Raises:
            TensorError: an id above vocab_size − 1.
        """
        values = [value for value in (ids.tolist() if isinstance(ids, Tensor) else ids) if value >= 0]
        if any(value >= self.vocab_size for value in values):
            raise TensorError(f"expected ids in 0 … {self.vocab_size - 1}, got {min(values)} … {max(values)}")
        return bytes(value for value in values if value < 256).decode("utf-8", errors="replace")


class ByteStream:
    """Bytes as text, once a character is whole; bytes that are none become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """What there is to say after one more byte."""
        return self._decoder.decode(bytes([token]))

    def end(self) -> str:
        """What still waited."""
        return self._decoder.decode(b"", final=True)


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
