"""Choosing the next token from log-probabilities, with randomness that belongs to each row."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayes_dispatch.arguments import real, truth, whole

__all__ = ["Sampling", "penalise_repetition", "prompt_seeds", "row_generators", "row_seeds"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    The temperature comes first. Each filter then reads the whole tempered distribution, and a token must pass them all,
    so that their order does not matter; the tokens that are left are drawn by their relative probabilities.

    Attributes:
        do_sample: draw from the distribution; else take its mode (greedy).
        temperature: logits are divided by it before drawing.
        top_k: keep only the k most probable tokens.
        top_p: keep the fewest most probable tokens whose total probability reaches p (nucleus sampling, 1904.09751).
        min_p: keep the tokens at least min_p times as probable as the most probable one (2407.01082).
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        truth("do_sample", self.do_sample)
        real("temperature", self.temperature, 0, above=True)
        if self.top_k is not None:
            whole("top_k", self.top_k, 1)
        if self.top_p is not None:
            real("top_p", self.top_p, 0, 1, above=True)
        if self.min_p is not None:
            real("min_p", self.min_p, 0, 1)

    def choose(self, logits: Float[Tensor, "B V"], generators: Sequence[np.random.Generator]) -> Int[Tensor, " B"]:
        """The next token of each row; drawing uses one uniform number of the row's own generator.

        Args:
            logits: unnormalised log-probabilities. generators: one per row; unused when greedy.
        """
        if not self.do_sample:
            return logits.argmax(-1)
        # 0 / T is finite for every T > 0
        probabilities = ((logits.double() - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if self.top_k is not None or self.top_p is not None or self.min_p is not None:
            probabilities = self._filtered(probabilities)
        cumulative = probabilities.cumsum(-1)
        uniform = torch.tensor([[generator.random()] for generator in generators], dtype=torch.double)
        place = torch.searchsorted(cumulative, uniform.to(cumulative) * cumulative[:, -1:], right=True)[:, 0]
        last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)  # of those that may follow
        return torch.minimum(place, last)

    def _filtered(self, probabilities: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The same with zeros for the tokens that do not pass."""
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        kept = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_k is not None:
            kept[:, self.top_k :] = False
        if self.top_p is not None:
            kept &= ordered.cumsum(-1) - ordered < self.top_p
        if self.min_p is not None:
            kept &= ordered >= self.min_p * ordered[:, :1]
        return torch.zeros_like(ordered).scatter(-1, tokens, ordered * kept)


def penalise_repetition(
    logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"], penalty: float
) -> Float[Tensor, "B V"]:
    """Make tokens that were ``seen`` less probable: positive logits are divided by ``penalty``, others multiplied.

    Log-probabilities will do for logits.

    CTRL (arXiv 1909.05858, section 4.1) divides all of them, which would favour tokens of negative logits.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def row_seeds(seed: int | None, rows: Sequence[bytes]) -> list[int]:
    """One seed for each row of a batch, which does not depend on the other rows.

    It is a hash of ``seed``, the row's content and, where a batch holds the same content again, how often it came
    before: so a batch gives what one by one gives, and copies of a prompt still differ. ``None`` draws a fresh seed.

    Raises:
        ConfigError: a seed that is no whole number, or negative.
    """
    given = np.random.SeedSequence().generate_state(1, np.uint64)[0] if seed is None else seed
    seed = whole("seed", given, 0)
    seen: Counter[bytes] = Counter()
    seeds = []
    for row in rows:
        digest = hashlib.blake2b(f"{seed}:{seen[row]}:".encode() + row, digest_size=8).digest()
        seen[row] += 1
        seeds.append(int.from_bytes(digest))
    return seeds


def prompt_seeds(seed: int | None, prompts: Sequence[bytes]) -> list[int]:
    """``row_seeds`` of posteriors: copies of a prompt have the same, so that what is compared is of one posterior."""
    distinct = list(dict.fromkeys(prompts))
    own = dict(zip(distinct, row_seeds(seed, distinct), strict=True))
    return [own[prompt] for prompt in prompts]


def row_generators(seed: int | None, rows: Sequence[bytes]) -> list[np.random.Generator]:
    """One generator for each row, seeded by ``row_seeds``."""
    return [np.random.default_rng(row_seed) for row_seed in row_seeds(seed, rows)]
