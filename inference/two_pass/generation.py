"""What two-pass generation gives: texts, how sure each token of them is, and what it cost."""

from dataclasses import dataclass

import numpy as np

from bayes_dispatch.dispatcher.arrays import short_repr
from bayes_dispatch.dispatcher.posterior import DispatchPosterior

__all__ = ["Cost", "Generation", "Streamed"]


@dataclass(frozen=True)
class Cost:
    """What was done, counted and not timed: evaluations of one block on one token of one row, padding left out.

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


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated for N prompts, and how sure it is.

    Where a text has ended before ``max_new_tokens``, tokens are the padding token and numbers NaN.

    Attributes:
        prompts, texts: prompts as bytes, and their continuations.
        token_ids: (N, max_new_tokens). log_probabilities: (N, max_new_tokens), of each token under the predictive at
            temperature 1, in nats.
        posterior: the dispatcher's, given the features of each prompt: what the prompt is made of, with intervals.
            blend: the blend's name.
        weights: (N, K + 1), mean blend weights when the prompt had been read. Of a blend of many particles: the mean
            of their posterior given the prompt's tokens, each counted once; of the weights that the next token comes
            from. The features only chose where half of the particles are. Of another blend: those that it runs.
        predictive_entropy, mutual_information: (N, max_new_tokens) in nats, of the next token, and between it and the
            particle: the epistemic part, under the same posterior, given the tokens generated so far as well.
        lengths: (N,), tokens that were generated. rows: (N,), of the model, that ran for them: particles, those that
            were merged counted once.
        paths: for each prompt (tokens − 1 + lengths, K + 1), the mean blend weights before each token of the prompt
            but the first, of which nothing is said, and each generated one.
        cost: in evaluations of blocks on tokens.
        foreign: (N,), whether the gate found the prompt foreign, at a false-alarm rate that was asked for: base alone
            continued it, or nothing was written.
        p_values: (N,) of the gate: how foreign the prompt is among held-out ones of the experts' domains; NaN where it
            was not asked.
    """

    prompts: tuple[bytes, ...]
    texts: tuple[str, ...]
    token_ids: np.ndarray
    log_probabilities: np.ndarray
    posterior: DispatchPosterior
    blend: str
    weights: np.ndarray
    predictive_entropy: np.ndarray
    mutual_information: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    paths: tuple[np.ndarray, ...]
    cost: Cost
    foreign: np.ndarray
    p_values: np.ndarray

    __repr__ = short_repr

    @property
    def aleatoric_entropy(self) -> np.ndarray:
        """(N, max_new_tokens) in nats: what would be left of the predictive entropy if the particle were known."""
        return self.predictive_entropy - self.mutual_information


@dataclass(frozen=True, eq=False)
class Streamed:
    """One more token of one prompt.

    Attributes:
        prompt: its index. text: characters that the token completes; empty within one of several bytes.
        token_id, log_probability, predictive_entropy, mutual_information, weights: as in ``Generation``, of this token.
        posterior: the dispatcher's, of this prompt. last: nothing comes after it.
        foreign, p_value: as in ``Generation``, of this prompt.
    """

    prompt: int
    text: str
    token_id: int
    log_probability: float
    predictive_entropy: float
    mutual_information: float
    weights: np.ndarray
    posterior: DispatchPosterior
    last: bool
    foreign: bool = False
    p_value: float = float("nan")
