"""Greedy and sampled decoding, where rows that have ended leave the batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.generation.continuation import Beginning
from bayes_dispatch.model.generation.sampling import penalise_repetition, row_generators
from bayes_dispatch.model.generation.settings import GenerationSettings

__all__ = [
    "Generated",
    "Step",
    "check_numbers",
    "decode",
    "decode_scored",
    "divergence",
    "log_probabilities",
    "seen_tokens",
    "steps",
]


@dataclass(frozen=True, eq=False)
class Generated:
    """New tokens, and how probable each was.

    Attributes:
        ids: (B, T_new), filled as ``generate`` says after a row's end.
        log_probabilities: (B, T_new) in nats, under the model's own distribution: at temperature 1, without penalties
            and before any token is left out; 0 after a row's end.
        lengths: new tokens of each row, (B,), its last one included.
    """

    ids: Int[Tensor, "B T_new"]
    log_probabilities: Float[Tensor, "B T_new"]
    lengths: Int[Tensor, " B"]


class Step(NamedTuple):
    """One token for each row (B,), with its log-probability as in ``Generated``, and whether the row has ended."""

    tokens: Int[Tensor, " B"]
    log_probabilities: Float[Tensor, " B"]
    finished: Bool[Tensor, " B"]


def decode(prompts: Beginning, settings: GenerationSettings, seed: int | None) -> Int[Tensor, "B T_new"]:
    """The new tokens of each row."""
    with torch.inference_mode():
        rows = Rows(prompts, settings, seed)
        columns = []
        for _ in range(settings.max_new_tokens):
            tokens, _ = rows.advance()
            columns.append(rows.spread(tokens, settings.fill))
            if not rows.running:
                break
        ids = torch.stack(columns, dim=1)
    return ids.clone()  # no inference tensor: a caller may train on it


def decode_scored(prompts: Beginning, settings: GenerationSettings, seed: int | None) -> Generated:
    """``decode`` with log-probabilities and lengths."""
    tokens, values, finished = (
        torch.stack(column, dim=1) for column in zip(*steps(prompts, settings, seed), strict=True)
    )
    return Generated(tokens, values, 1 + (~finished[:, :-1]).sum(1))


def steps(prompts: Beginning, settings: GenerationSettings, seed: int | None) -> Iterator[Step]:
    """What ``decode`` computes, one step at a time."""
    with torch.inference_mode():
        rows = Rows(prompts, settings, seed)
    for _ in range(settings.max_new_tokens):
        with torch.inference_mode():  # not around the loop: it would reach the caller at each yield
            tokens, logits = rows.advance()
            values = log_probabilities(logits).gather(-1, tokens[:, None])[:, 0]
            tokens, values = rows.spread(tokens, settings.fill), rows.spread(values, 0.0)
        yield Step(tokens.clone(), values.clone(), torch.tensor(rows.finished, device=tokens.device))
        if not rows.running:
            return


def log_probabilities(logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    """Of each token, in float32 or better."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def check_numbers(logits: Float[Tensor, "R V"]) -> None:
    """Raise ``TensorError`` where no token can be chosen, or ranked, since a weight or a scale was no finite number."""
    if not math.isfinite(logits.amax(-1).sum(dtype=torch.double)):  # two operations, as each token pays for them
        raise TensorError("expected logits that are numbers, got NaN: a weight or a scale is no finite number")


def divergence(own: Float[Tensor, "*of V"], other: Float[Tensor, "*of V"]) -> Float[Tensor, "*of"]:
    """``KL(own ‖ other)`` in nats, of log-probabilities; what has no probability adds nothing, and has no gradient."""
    ratio = (own - other).masked_fill(own == -torch.inf, 0.0)
    return (own.exp() * ratio).sum(-1)


def seen_tokens(prompts: Beginning, vocab_size: int) -> Bool[Tensor, "B V"]:
    """Which tokens of the vocabulary the rows of ``prompts.ids`` hold."""
    ids, tokens = prompts.ids, prompts.tokens
    seen = torch.zeros(ids.shape[0], vocab_size, dtype=torch.bool, device=ids.device)
    if tokens is not None:  # padding counts as the first token again
        real = torch.arange(ids.shape[1], device=ids.device) < tokens.to(ids.device)[:, None]
        ids = torch.where(real, ids, ids[:, :1])
    return seen.scatter_(1, ids, True)


class Rows:
    """The rows of a batch that have not ended; the continuation evaluates no others.

    Attributes:
        running: the rows that go on. finished: whether each row of the batch has ended.
    """

    def __init__(self, prompts: Beginning, settings: GenerationSettings, seed: int | None) -> None:
        batch = prompts.ids.shape[0]
        self.running = list(range(batch))
        self.finished = [False] * batch
        self._prompts = prompts
        self._settings = settings
        self._made = 0  # tokens of each row
        sampled = settings.do_sample
        self._generators: list[np.random.Generator] = row_generators(seed, prompts.content) if sampled else []
        self._seen: Tensor | None = None
        self._recent: list[list[int]] = [[] for _ in range(batch)]  # new tokens of the rows evaluated, for stops
        self._evaluated = self.running  # rows of the latest step
        self._tokens: Tensor | None = None  # theirs
        self._places: Tensor | None = None  # where they stand in the batch; None where all B are evaluated

    def advance(self) -> tuple[Int[Tensor, " R"], Float[Tensor, "R V"]]:
        """Choose a token for each running row; these tokens, and the model's logits."""
        if self.running is not self._evaluated:
            self._leave()
        continuation = self._prompts.continuation
        logits = continuation.start() if self._tokens is None else continuation.step(self._tokens)
        check_numbers(logits)
        tokens = self._choose(logits)
        self._tokens = tokens
        self._made += 1
        if self._settings.ends or self._settings.stops:
            self._end(tokens.tolist())
        return tokens, logits

    def spread(self, values: Tensor, fill: int | float) -> Tensor:
        """Values of the rows just evaluated (R,) at their places in the batch (B,)."""
        if self._places is None:
            return values
        return values.new_full((len(self.finished),), fill).index_copy_(0, self._places, values)

    def _choose(self, logits: Tensor) -> Tensor:
        settings = self._settings
        if settings.penalty != 1:
            if self._seen is None:
                self._seen = seen_tokens(self._prompts, logits.shape[1]).to(logits.device)
            logits = penalise_repetition(logits, self._seen, settings.penalty)
        if settings.ends and self._made < settings.min_new_tokens:
            logits = logits.index_fill(1, torch.tensor(settings.ends, device=logits.device), -torch.inf)
        tokens = settings.choose(logits, self._generators)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _end(self, tokens: list[int]) -> None:
        """Note which rows end with these tokens."""
        ends, stops = self._settings.ends, self._settings.stops
        ended = [r for r, token in enumerate(tokens) if token in ends]
        if stops:
            for r, (recent, token) in enumerate(zip(self._recent, tokens, strict=True)):
                recent.append(token)
                if self._made >= self._settings.min_new_tokens and any(
                    token == stop[-1] and tuple(recent[-len(stop) :]) == stop for stop in stops
                ):
                    ended.append(r)
        if ended:
            for r in ended:
                self.finished[self._evaluated[r]] = True
            self.running = [row for row in self._evaluated if not self.finished[row]]

    def _leave(self) -> None:
        """Drop the rows that ended at the latest step."""
        kept = [r for r, row in enumerate(self._evaluated) if not self.finished[row]]
        self._prompts.continuation.reorder(kept)
        self._evaluated = self.running
        self._recent = [self._recent[r] for r in kept]
        if self._generators:
            self._generators = [self._generators[r] for r in kept]
        if self._tokens is not None:
            index = torch.tensor(kept, device=self._tokens.device)
            self._tokens = self._tokens[index]
            self._seen = None if self._seen is None else self._seen[index]
            self._places = torch.tensor(self.running, device=self._tokens.device)
