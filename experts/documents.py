"""Documents: text of which the first pass sees a beginning, and of which some byte ranges are scored."""

from dataclasses import dataclass

from bayes_dispatch.arguments import several, shown, whole
from bayes_dispatch.errors import ConfigError

__all__ = ["Document"]


@dataclass(frozen=True)
class Document:
    """A text with its prompt and its scored bytes.

    Attributes:
        text: the whole document.
        prompt_bytes: how many bytes of its UTF-8 form the first pass sees.
        scored: byte ranges (start, stop) that count; ``None`` means all after the prompt.

    Raises:
        ConfigError: a text that is none, a prompt that is longer, or a range that is none of whole numbers within it.
    """

    text: str
    prompt_bytes: int
    scored: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ConfigError(f"expected the text of a document, got {shown(self.text)}")
        length = len(self.data)
        object.__setattr__(self, "prompt_bytes", whole("prompt_bytes", self.prompt_bytes, 0, length))
        if self.scored is None:
            return
        scored = []
        for start, stop in (several("a scored range", each, 2) for each in several("scored", self.scored)):
            last = whole("the end of a scored range", stop, 0, length)
            scored.append((whole("the start of a scored range", start, 0, last), last))
        object.__setattr__(self, "scored", tuple(scored))

    @property
    def data(self) -> bytes:
        """The text's bytes."""
        return self.text.encode("utf-8", errors="surrogatepass")

    @property
    def prompt(self) -> str:
        """What the first pass sees; a character that the cut divides is left out."""
        return self.data[: self.prompt_bytes].decode("utf-8", errors="ignore")

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The scored byte ranges, also where they are the default."""
        return ((self.prompt_bytes, len(self.data)),) if self.scored is None else self.scored

    def byte_weights(self, unscored: float) -> list[float]:
        """A loss weight for each byte: 1 where it is scored, ``unscored`` elsewhere."""
        weights = [unscored] * len(self.data)
        for start, stop in self.ranges:
            weights[start:stop] = [1.0] * (stop - start)
        return weights

    def cut(self, length: int) -> "Document":
        """The whole characters of the first ``length`` bytes, with the ranges that remain."""
        text = self.data[:length].decode("utf-8", errors="ignore")
        length = min(length, len(text.encode()))  # a character that the cut divides is left out
        ranges = tuple((start, min(stop, length)) for start, stop in self.ranges if start < length)
        return Document(text, min(self.prompt_bytes, length), ranges)
