"""What a generation cost, counted and not timed: evaluations of one block on one token of one row."""

from dataclasses import dataclass

__all__ = ["Cost"]


@dataclass(frozen=True)
class Cost:
    """Evaluations of a block on a token, padding left out.

    Plain generation with the base model evaluates each of its ``depth`` blocks once on each token: the unit of
    ``prompt_passes`` and ``rows``.

    Attributes:
        depth: blocks of the model. prompt_tokens: of all prompts, their beginning tokens included.
        new_tokens: generated ones that the model has read: all but the last of each text.
        first_pass: evaluations for the evidence that the second pass cannot use again.
        prefill: on the prompts, for the second pass. decode: on the new tokens.
    """

    depth: int
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_pass: int = 0
    prefill: int = 0
    decode: int = 0

    @property
    def total(self) -> int:
        """All evaluations."""
        return self.first_pass + self.prefill + self.decode

    @property
    def prompt_passes(self) -> float:
        """How often the whole model would have read the prompts for as many evaluations; NaN without any."""
        tokens = self.depth * self.prompt_tokens
        return (self.first_pass + self.prefill) / tokens if tokens else float("nan")

    @property
    def rows(self) -> float:
        """How many rows of the whole model a new token took, on average; NaN before any was read."""
        return self.decode / (self.depth * self.new_tokens) if self.new_tokens else float("nan")

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.depth,
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
            self.first_pass + other.first_pass,
            self.prefill + other.prefill,
            self.decode + other.decode,
        )
