"""Running the particles of a blend: every row of a batch is one particle of one prompt.

What is below the first adapted block is the same for all particles of a prompt, and runs once. Equal particles of equal
prompts are one row until the prompts have been read.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.first_pass import Prefix
from bayes_dispatch.model.backbone import Backbone, Session, last_of, padded

__all__ = ["CachedReader", "ParticleReader", "Said", "UncachedReader", "straight"]

Kept = Sequence[Sequence[int]]  # for each prompt that stays, the particles that do

AFTER_AT_ONCE = 2**22  # log-probabilities of several tokens: 16 MiB, and seven times that where they are compared


class Said(NamedTuple):
    """What S particles of N prompts say of T tokens.

    Attributes:
        own: log-probability of each token given all before it; NaN for the first of all. ``None`` where nobody asked.
        after: log-probabilities after the last tokens of each prompt, of a few of these at a time: of a real vocabulary
            there is no room for all. They are computed when they are asked for, which is before anything else is read.
    """

    own: Float[Tensor, "N S T"] | None
    after: Iterator[Float[Tensor, "N S t V"]]


@runtime_checkable
class ParticleReader(Protocol):
    """Reads the prompts of a batch under all particles, and then what follows them."""

    @property
    def evaluated(self) -> int:
        """How often a block has run on a token, padding left out."""
        ...

    @property
    def rows(self) -> int:
        """Rows of the model that are run: distinct particles of all prompts."""
        ...

    def read_prompts(self, own: bool, tail: int = 1, piece: int | None = None) -> Generator[None, None, Said]:
        """Read the prompts, or what is new in them, and return what is said of it.

        Args:
            own: give the log-probability of each token. tail: after how many of the last tokens to give all; where a
                prompt has fewer, the first of these have no meaning.
            piece: tokens after which to pause, those of every row counted, for prompts of one length; ``None`` for
                never.
        """
        ...

    def read(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N S V"]:
        """Log-probabilities after one more token of each prompt."""
        ...

    def keep(self, prompts: Sequence[int], particles: Kept) -> None:
        """Drop all other prompts, and for each one that stays all particles but those given.

        Prompts with fewer particles than another are filled up with copies of their first.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Of what is kept of what was read."""
        ...

    def join(self, other: "ParticleReader") -> None:
        """Take over the prompts of another reader of the same experts, after one's own; the other is spent.

        Both have read their prompts. Those with fewer particles than another are filled up with copies of their first.

        Raises:
            TensorError: they do not fit together. StaleCacheError: one of them was interrupted. Then both are spent.
        """
        ...


class CachedReader:
    """Reads on in sessions of the model.

    Args:
        model, experts: to blend. particles: of N prompts.
        prefix: the prompts below the cut; its session stays as it is.
        row: (N,) which row of ``prefix`` each prompt is; the same one for equal prompts.
        capacity: tokens that a prompt and what follows it may have, unless ``lengthen`` makes more room.
        joins: whether this reader is to ``join`` others.
    """

    def __init__(
        self,
        model: Backbone,
        experts: ExpertBank,
        particles: Particles,
        prefix: Prefix,
        row: Sequence[int],
        capacity: int,
        joins: bool = False,
    ) -> None:
        self._prefix = prefix
        self._row = list(row)
        # rows of the model: distinct particles of distinct prompts
        place: dict[tuple[int, bytes], int] = {}
        doubles = np.asarray(particles.run, dtype=np.float64)
        keys = [[(own, each.tobytes()) for each in blends] for own, blends in zip(row, doubles, strict=True)]
        self._index = torch.tensor([[place.setdefault(key, len(place)) for key in of_prompt] for of_prompt in keys])
        self._owner = torch.tensor([own for own, _ in place])  # row of the prefix, and later prompt, of each row
        blends = np.stack([np.frombuffer(each).reshape(doubles.shape[2:]) for _, each in place])
        self._below = prefix.below
        self._vocab_size = model.vocab_size
        cut = 0 if prefix.x is None else prefix.cut
        adaptation = experts.blend_rows(torch.tensor(blends).to(model.weights_dtype), alike=joins)
        self._above = model.open(len(blends), capacity, adaptation, range(cut, model.depth))
        self._evaluated_below = 0
        self._read = 0  # tokens of the prompts
        self._separate = False  # whether each prompt has rows of its own

    @property
    def evaluated(self) -> int:
        return self._above.evaluated + self._evaluated_below

    @property
    def rows(self) -> int:
        return len(self._owner)

    @property
    def nbytes(self) -> int:
        """Of the sessions; below the cut where the prompts are this reader's own."""
        return self._above.nbytes + (self._below.nbytes if self._below is not None and self._separate else 0)

    def lengthen(self, prefix: Prefix, capacity: int) -> None:
        """Go on with longer prompts, of which those so far are the beginnings: ``read_prompts`` reads what is new.

        Args:
            capacity: tokens that there is to be room for from now on.
        """
        self._prefix = prefix
        self._above.reserve(capacity)

    def read_prompts(self, own: bool, tail: int = 1, piece: int | None = None) -> Generator[None, None, Said]:
        width, said = self._prefix.ids.shape[1], list[Float[Tensor, "N S t"]]()
        each = width if piece is None else max(1, piece // self.rows)
        while (left := width - self._read) > max(each, tail):  # the last piece has all of the tail
            part = self._read_piece(self._read + min(each, left - tail), own, 1)
            said += [] if part.own is None else [part.own]
            yield
        last = self._read_piece(width, own, tail)
        return last._replace(own=torch.cat([*said, last.own], -1)) if said and last.own is not None else last

    def _read_piece(self, stop: int, own: bool, tail: int) -> Said:
        prefix, owner, new = self._prefix, self._owner, slice(self._read, stop)
        self._read = new.stop
        x = None if prefix.x is None else _of_rows(prefix.x[:, new], owner)
        tokens = None if new.start or stop < prefix.ids.shape[1] else prefix.tokens[owner]
        return self._said(prefix.ids[owner, new], tokens, x, own, tail)

    def read(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N S V"]:
        if not self._separate:
            prompts, particles = self._index.shape
            self.keep(range(prompts), [range(particles)] * prompts)
        ids, x = tokens[:, None], None
        if self._below is not None:
            before = self._below.evaluated
            x = self._below.read(ids).hidden[self._owner]
            self._evaluated_below += self._below.evaluated - before
        return next(self._said(ids[self._owner], None, x).after)[:, :, 0]

    def keep(self, prompts: Sequence[int], particles: Kept) -> None:
        """Give each prompt that stays rows of its own, as many as it has distinct particles, and drop all others."""
        if self._below is not None:
            below = [self._row[prompt] for prompt in prompts]
            if not self._separate:
                self._below = self._below.select(below)  # the prefix keeps its own
            elif below != self._row:
                self._below.keep(below)
        width = max(len(chosen) for chosen in particles)
        place: dict[tuple[int, int], int] = {}  # of prompt and former row
        index = torch.empty(len(prompts), width, dtype=torch.long)
        for n, (prompt, chosen) in enumerate(zip(prompts, particles, strict=True)):
            for s in range(width):
                row = int(self._index[prompt, chosen[s] if s < len(chosen) else chosen[0]])
                index[n, s] = place.setdefault((n, row), len(place))
        rows = [row for _, row in place]
        if rows != list(range(len(self._owner))):
            self._above.keep(rows)
        self._index, self._owner = index, torch.tensor([n for n, _ in place])
        self._row, self._separate = list(range(len(prompts))), True
        self._prefix = replace(self._prefix, x=None, below=None)  # they have been read: nobody needs that again

    def join(self, other: ParticleReader) -> None:
        """Both are made with ``joins``."""
        assert isinstance(other, CachedReader)
        for each in (self, other):
            if not each._separate:
                prompts, particles = each._index.shape
                each.keep(range(prompts), [range(particles)] * prompts)
        width = max(each._index.shape[1] for each in (self, other))
        index = [self._index, other._index + len(self._owner)]
        index = [torch.cat([own, own[:, :1].expand(-1, width - own.shape[1])], 1) for own in index]
        self._above.join(other._above)
        if self._below is not None:
            assert other._below is not None
            self._below.join(other._below)
        self._owner = torch.cat([self._owner, other._owner + len(self._row)])
        self._index = torch.cat(index)
        self._row = list(range(len(self._row) + len(other._row)))
        other._above, other._below = self._above, self._below  # so that its own are not kept

    def _said(
        self,
        ids: Int[Tensor, "R T"],
        tokens: Int[Tensor, " R"] | None,
        x: Float[Tensor, "R T D"] | None,
        own: bool = False,
        tail: int = 1,
    ) -> Said:
        at_once = AFTER_AT_ONCE // (self._index.numel() * self._vocab_size)
        return _said(self._above, self._spread, ids, tokens, x, own, tail, at_once)

    def _spread(self, of_rows: Float[Tensor, "R *after"]) -> Float[Tensor, "N S *after"]:
        """The particles of each prompt, from their rows."""
        prompts, width = self._index.shape
        if prompts * width == self.rows and bool((self._index.flatten() == torch.arange(self.rows)).all()):
            return of_rows.unflatten(0, (prompts, width))
        return of_rows[self._index]


class UncachedReader:
    """The slow reference: keeps the tokens, and reads all of them again each time under every particle.

    Args:
        model, experts: to blend. particles: of N prompts. ids: (N, T) tokens of the prompts, right-padded.
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

    @property
    def nbytes(self) -> int:
        return 0

    def read_prompts(self, own: bool, tail: int = 1, piece: int | None = None) -> Generator[None, None, Said]:
        yield from ()  # it never pauses
        return self._read_all(own, tail)

    def _read_all(self, own: bool, tail: int) -> Said:
        shape = tuple(self._weights.shape[:2])
        ids, tokens = (each.repeat_interleave(shape[1], 0) for each in padded(self._seen, 0))
        adaptation = self._blend(self._weights.flatten(0, 1).to(self._model.weights_dtype))
        session = self._model.open(len(ids), ids.shape[1], adaptation)
        at_once = AFTER_AT_ONCE // (len(ids) * self._model.vocab_size)
        said = _said(session, lambda of_rows: of_rows.unflatten(0, shape), ids, tokens, None, own, tail, at_once)
        self.evaluated += session.evaluated
        return said

    def read(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N S V"]:
        for row, token in zip(self._seen, tokens.tolist(), strict=True):
            row.append(token)
        return next(self._read_all(own=False, tail=1).after)[:, :, 0]

    def keep(self, prompts: Sequence[int], particles: Kept) -> None:
        width = max(len(chosen) for chosen in particles)
        filled = [[*chosen, *[chosen[0]] * (width - len(chosen))] for chosen in particles]
        self._seen = [self._seen[prompt] for prompt in prompts]
        self._weights = self._weights[torch.tensor(list(prompts))[:, None], torch.tensor(filled)]

    def join(self, other: ParticleReader) -> None:
        assert isinstance(other, UncachedReader)
        both = (self._weights, other._weights)
        width = max(own.shape[1] for own in both)
        filled = [torch.cat([own, own[:, :1].expand(-1, width - own.shape[1], *own.shape[2:])], 1) for own in both]
        self._weights, self._seen = torch.cat(filled), self._seen + other._seen


Found = TypeVar("Found")


def straight(work: Generator[None, None, Found]) -> Found:
    """What work returns, done without its pauses."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            found: Found = done.value
            return found


def _of_rows(x: Float[Tensor, "U T D"], owner: Int[Tensor, " R"]) -> Float[Tensor, "R T D"]:
    """The row of each owner: a view where there is but one, since of a long prompt that is much memory."""
    return x.expand(len(owner), -1, -1) if len(x) == 1 else x[owner]


def _said(
    session: Session,
    spread: Callable[[Tensor], Tensor],
    ids: Int[Tensor, "R T"],
    tokens: Int[Tensor, " R"] | None,
    x: Float[Tensor, "R T D"] | None,
    own: bool,
    tail: int,
    at_once: int,
) -> Said:
    """What rows say, on the CPU, where particles are filtered.

    Args:
        session: reads ``ids``, ``tokens``, ``x``. spread: rows as particles of prompts. own, tail: see ``Said``.
        at_once: tokens of which there is room for all log-probabilities; 1 at least.
    """
    tail = min(tail, ids.shape[1])
    read = session.read(ids, tokens, x, own=own, tail=tail if tail <= at_once else 1)
    assert read.after is not None
    said = None if read.own is None else spread(read.own.cpu())
    if read.after.shape[1] == tail:
        return Said(said, iter([spread(read.after.cpu())]))
    hidden = last_of(read.hidden, tokens, tail)
    return Said(said, (spread(session.after(part).cpu()) for part in hidden.split(max(1, at_once), 1)))
