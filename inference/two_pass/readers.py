"""Running the particles of a blend: every row of a batch is one particle of one prompt.

What is below the first adapted block is the same for all particles of a prompt, and runs once. Equal particles of equal
prompts are one row until the prompts have been read.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.first_pass import Prefix
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.parts import CutModel

__all__ = ["CachedReader", "ParticleReader", "UncachedReader"]

Kept = Sequence[Sequence[int]]  # for each prompt that stays, the particles that do


@runtime_checkable
class ParticleReader(Protocol):
    """Reads the prompts of a batch under all particles, and then what follows them.

    Attributes:
        evaluated: how often a block has run on a token, padding left out.
    """

    evaluated: int

    @property
    def rows(self) -> int:
        """Rows of the model that are run: distinct particles of all prompts."""
        ...

    def read_prompts(self, start: int, stop: int) -> Float[Tensor, "N S t V"]:
        """Log-probabilities after the tokens ``start`` to ``stop`` − 1 of the prompts; parts come one after the other.

        Tokens are counted from the beginning token. Where a prompt has ended there is no meaning in them.
        """
        ...

    def read_ends(self) -> Float[Tensor, "N S V"]:
        """Log-probabilities after the whole prompts alone, instead of ``read_prompts``."""
        ...

    def read(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N S V"]:
        """Log-probabilities after one more token of each prompt."""
        ...

    def keep(self, prompts: Sequence[int], particles: Kept) -> None:
        """Drop all other prompts, and for each one that stays all particles but those given.

        Prompts with fewer particles than another are filled up with copies of their first.
        """
        ...


class CachedReader:
    """Reads on from cached states.

    Args:
        cut: the model. experts: to blend. particles: of N prompts. prefix: the prompts below the cut; their states are
            not touched. row: (N,) which row of ``prefix`` each prompt is; the same one for equal prompts.
        capacity: tokens that a prompt and what follows it may have, unless ``lengthen`` makes more room.
    """

    def __init__(
        self,
        cut: CutModel,
        experts: ExpertBank,
        particles: Particles,
        prefix: Prefix,
        row: Sequence[int],
        capacity: int,
    ) -> None:
        self.evaluated = 0
        self._cut = cut
        self._prefix = prefix
        self._row = list(row)
        # rows of the model: distinct particles of distinct prompts
        place: dict[tuple[int, bytes], int] = {}
        doubles = np.asarray(particles.run, dtype=np.float64)
        keys = [[(own, each.tobytes()) for each in blends] for own, blends in zip(row, doubles, strict=True)]
        self._index = torch.tensor([[place.setdefault(key, len(place)) for key in of_prompt] for of_prompt in keys])
        self._owner = torch.tensor([own for own, _ in place])  # row of the prefix, and later prompt, of each row
        blends = np.stack([np.frombuffer(each).reshape(doubles.shape[2:]) for _, each in place])
        weights = torch.tensor(blends).to(cut.model.dtype)
        self._adaptation = experts.blend_rows(weights)
        self._below = prefix.cache
        self._above = cut.cache_above(len(weights), capacity)
        self._separate = False  # whether each prompt has rows of its own

    @property
    def rows(self) -> int:
        return len(self._owner)

    @property
    def nbytes(self) -> int:
        """Of the caches above the cut."""
        return self._above.nbytes

    def lengthen(self, prefix: Prefix, capacity: int) -> None:
        """Go on with longer prompts, of which those so far are the beginnings: ``read_prompts`` reads what is new.

        Args:
            capacity: tokens that there is to be room for from now on.
        """
        self._prefix = prefix
        self._above.reserve(capacity)

    def read_prompts(self, start: int, stop: int) -> Float[Tensor, "N S t V"]:
        x = self._prefix.x[self._owner, start:stop]
        tokens = (self._prefix.tokens - start).clamp(0, x.shape[1])[self._owner]
        return self._spread(self._run(x, tokens))

    def read_ends(self) -> Float[Tensor, "N S V"]:
        tokens = self._prefix.tokens[self._owner]
        return self._spread(self._run(self._prefix.x[self._owner], tokens, tokens - 1))[:, :, 0]

    def read(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N S V"]:
        if not self._separate:
            prompts, particles = self._index.shape
            self.keep(range(prompts), [range(particles)] * prompts)
        x = self._cut.below(tokens[:, None], None, self._below)
        self.evaluated += len(tokens) * self._cut.block
        return self._spread(self._run(x[self._owner], torch.ones(len(self._owner), dtype=torch.long)))[:, :, 0]

    def keep(self, prompts: Sequence[int], particles: Kept) -> None:
        """Give each prompt that stays rows of its own, as many as it has distinct particles, and drop all others."""
        if self._below is not None:
            below = [self._row[prompt] for prompt in prompts]
            if not self._separate:
                self._below = self._below.select(below)  # the prefix keeps its own
            elif below != self._row:
                self._below.reorder(below)
        width = max(len(chosen) for chosen in particles)
        place: dict[tuple[int, int], int] = {}  # of prompt and former row
        index = torch.empty(len(prompts), width, dtype=torch.long)
        for n, (prompt, chosen) in enumerate(zip(prompts, particles, strict=True)):
            for s in range(width):
                row = int(self._index[prompt, chosen[s] if s < len(chosen) else chosen[0]])
                index[n, s] = place.setdefault((n, row), len(place))
        rows = [row for _, row in place]
        if rows != list(range(len(self._owner))):
            self._above.reorder(rows)
            self._adaptation = self._adaptation.select(rows)
        self._index, self._owner = index, torch.tensor([n for n, _ in place])
        self._row, self._separate = list(range(len(prompts))), True

    def _run(self, x: Tensor, tokens: Int[Tensor, " R"], last: Tensor | None = None) -> Float[Tensor, "R t V"]:
        """Log-probabilities of all rows."""
        width = x.shape[1]
        ragged = bool((tokens < width).any())
        mask = (torch.arange(width) < tokens[:, None]).long() if ragged else None
        self.evaluated += int(tokens.sum()) * (self._cut.depth - self._cut.block)
        return self._cut.above(x, mask, self._above, self._adaptation, last).log_softmax(-1)

    def _spread(self, rows: Float[Tensor, "R t V"]) -> Float[Tensor, "N S t V"]:
        """The particles of each prompt, from their rows."""
        prompts, width = self._index.shape
        if prompts * width == len(rows) and bool((self._index.flatten() == torch.arange(len(rows))).all()):
            return rows.unflatten(0, (prompts, width))
        return rows[self._index]


class UncachedReader:
    """The slow reference: keeps the tokens, and reads all of them again each time under every particle.

    Args:
        model: the whole. experts: to blend. particles: of N prompts. ids: (N, T) tokens of the prompts, right-padded.
        tokens: (N,), how many are real.
    """

    def __init__(
        self,
        model: Backbone,
        experts: ExpertBank,
        particles: Particles,
        ids: Int[Tensor, "N T"],
        tokens: Int[Tensor, " N"],
    ) -> None:
        self.evaluated = 0
        self._model = model
        self._blend = experts.blend_rows
        self._weights = torch.tensor(particles.run)  # a copy: a posterior's own draws are read-only
        self._seen = [row[:count] for row, count in zip(ids.tolist(), tokens.tolist(), strict=True)]

    @property
    def rows(self) -> int:
        return self._weights.shape[0] * self._weights.shape[1]

    def read_prompts(self, start: int, stop: int) -> Float[Tensor, "N S t V"]:
        return self._all()[:, :, start:stop]

    def read_ends(self) -> Float[Tensor, "N S V"]:
        last = torch.tensor([len(row) - 1 for row in self._seen])
        return self._all()[torch.arange(len(last)), :, last]

    def read(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N S V"]:
        for row, token in zip(self._seen, tokens.tolist(), strict=True):
            row.append(token)
        return self.read_ends()

    def keep(self, prompts: Sequence[int], particles: Kept) -> None:
        width = max(len(chosen) for chosen in particles)
        filled = [[*chosen, *[chosen[0]] * (width - len(chosen))] for chosen in particles]
        self._seen = [self._seen[prompt] for prompt in prompts]
        self._weights = self._weights[torch.tensor(list(prompts))[:, None], torch.tensor(filled)]

    def _all(self) -> Float[Tensor, "N S T V"]:
        shape = self._weights.shape[:2]
        width = max(len(row) for row in self._seen)
        padded = torch.zeros(len(self._seen), width, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for i, row in enumerate(self._seen):
            padded[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        adaptation = self._blend(self._weights.flatten(0, 1).to(self._model.dtype))
        ids, real = (each.repeat_interleave(shape[1], 0) for each in (padded, mask))
        self.evaluated += int(real.sum()) * CutModel(self._model, 0).depth
        logits = self._model(ids, attention_mask=real, adaptation=adaptation).logits
        return logits.log_softmax(-1).unflatten(0, tuple(shape))
