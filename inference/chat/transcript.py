"""What was said in a conversation, as bytes, and by whom."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Transcript"]


@dataclass(frozen=True, eq=False)
class Transcript:
    """The bytes of a conversation in order, without anything between the turns.

    Attributes:
        data: T bytes. own: (T,), true for those that the model wrote, false for the user's.
    """

    data: bytes
    own: np.ndarray

    @classmethod
    def empty(cls) -> "Transcript":
        return cls(b"", np.zeros(0, dtype=bool))

    def __len__(self) -> int:
        return len(self.data)

    @property
    def user(self) -> bytes:
        """The user's bytes alone."""
        return np.frombuffer(self.data, dtype=np.uint8)[~self.own].tobytes()

    def followed_by(self, data: bytes, own: bool) -> "Transcript":
        """With more bytes of one of the two at its end."""
        return Transcript(self.data + data, np.concatenate([self.own, np.full(len(data), own)]))

    def last(self, most: int) -> "Transcript":
        """The last bytes, at most ``most``, from the beginning of a line where one begins in the first half of them.

        Else from the beginning of a character.
        """
        start = max(0, len(self) - most)
        if start > 0:
            newline = self.data.find(b"\n", start - 1, start + most // 2)
            if newline >= 0:
                start = newline + 1
            else:
                while start < len(self) and self.data[start] & 0xC0 == 0x80:  # amid a character of UTF-8
                    start += 1
        return Transcript(self.data[start:], self.own[start:])
