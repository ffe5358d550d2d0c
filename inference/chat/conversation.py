"""A text that grows, read by the unadapted model: the states below the cut, and evidence of what the user said.

Only the user's tokens are pooled and counted. The model's own are read all the same, as what the user's come after: a
hidden state is what it would be had the whole conversation been read at once.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.inference.chat.state import Transcript
from bayes_dispatch.inference.two_pass.first_pass import RESIDUAL_FLOOR, Prefix, depths_of, evidence_of, looked_at
from bayes_dispatch.inference.two_pass.second_pass import READ_OFF_THE_MODEL
from bayes_dispatch.model.backbone import Read

if TYPE_CHECKING:
    from bayes_dispatch.inference.two_pass.system import System

__all__ = ["Conversation"]


class Conversation:
    """First pass and prefill of one text, which go on with every turn.

    Args:
        system: the model and what goes with it. cut: blocks that no expert adapts. begin: ids before the transcript.
        capacity: tokens that there is room for, these among them.

    Attributes:
        ids: tokens read so far.
    """

    def __init__(self, system: "System", cut: int, begin: tuple[int, ...], capacity: int) -> None:
        self.ids: list[int] = []
        self._cut, self._begin, self._capacity = cut, begin, capacity
        read = bool(cut) or not READ_OFF_THE_MODEL.isdisjoint(system.dispatcher.views)
        blocks = range(cut) if cut else None  # of the whole model it is for evidence alone
        self._session = system.model.open(1, capacity, blocks=blocks) if read else None
        self._depths = depths_of(cut or system.model.depth)
        self._x: Float[Tensor, "1 capacity D"] | None = None  # what the blocks above read
        self._pooled = self._count = 0  # tokens that were looked at for evidence, and those that are evidence
        self._first: Float[Tensor, " F"]  # of which nothing is said
        self._sum: Float[Tensor, " F"]
        self._square = self._nll = 0.0  # of the last hidden states, and of tokens

    @property
    def below(self) -> int:
        """How often a block has run on a token, below the cut."""
        return self._session.evaluated if self._session is not None and self._cut else 0

    @property
    def first_pass(self) -> int:
        """The same for evidence alone, where no block is below the cut."""
        return self._session.evaluated if self._session is not None and not self._cut else 0

    @property
    def nbytes(self) -> int:
        """Of all states and caches."""
        return sum(each.nbytes for each in (self._session, self._x) if each is not None)

    @property
    def prefix(self) -> Prefix:
        """The text so far below the cut."""
        x = None if self._x is None else self._x[:, : len(self.ids)]
        return Prefix(torch.tensor([self.ids]), torch.tensor([len(self.ids)]), x, None, self._cut)

    @property
    def whole(self) -> Prefix:
        """``prefix`` with the session below, for whoever reads on without this conversation."""
        return replace(self.prefix, below=self._session if self._cut else None)

    def user(self, transcript: Transcript) -> Bool[np.ndarray, " T"]:
        """Which of all tokens are of the user's words."""
        return np.concatenate([np.zeros(len(self._begin), dtype=bool), transcript.user])

    def read(self, transcript: Transcript, most: int | None = None) -> None:
        """Read below the cut what is new in ``transcript``, whose beginning has been read: at most so many tokens."""
        read = len(self.ids)
        new = [*self._begin, *transcript.ids.tolist()][read : None if most is None else read + most]
        if self._session is not None and self._cut:
            users = self.user(transcript)[read : read + len(new)]
            looked = not read or bool(users.any())  # one token of the model's own is a step, which tells no depths
            found = self._session.read(torch.tensor([new]), depths=self._depths if looked else ())
            if self._x is None:
                self._x = found.hidden.new_zeros(1, self._capacity, found.hidden.shape[2])
            self._x[:, read : read + len(new)] = found.hidden
            if looked:
                self._pool(found, users)
        self.ids.extend(new)

    def evidence(self, transcript: Transcript) -> Evidence:
        """Of the user's tokens: as ``first_pass`` gives it, had it pooled and counted these alone.

        Args:
            transcript: what was read; there is something of the user's in it.
        """
        data, words = transcript.said
        if self._session is None:
            return evidence_of([data], [words], {})
        self.pool(transcript)
        count, total, square = self._count, self._sum, self._square
        if not count:
            last = self._first[-self._width :]
            count, total, square = 1, self._first, float(last.square().sum())
        means = (total / count).cpu().numpy()
        views = {"hidden": means[None]}
        if not self._cut:
            mean = means[-self._width :]
            residual = max(square / count - float(mean @ mean), RESIDUAL_FLOOR * square / count)
            views["surprise"] = np.array([[self._nll / count, np.log(residual)]])
        return evidence_of([data], [words], views)

    def pool(self, transcript: Transcript) -> None:
        """Where no block is below the cut, read for evidence what is new: ``evidence`` does, unless that was done."""
        new = slice(self._pooled, len(self.ids))
        if self._session is not None and not self._cut and new.start < new.stop:
            found = self._session.read(torch.tensor([self.ids[new]]), own=True, depths=self._depths)
            self._pool(found, self.user(transcript)[new])

    def _pool(self, read: Read, users: Bool[np.ndarray, " t"]) -> None:
        """Add what is the user's of some tokens."""
        states, self._width = looked_at(read), read.hidden.shape[2]
        user = torch.from_numpy(users).to(read.hidden.device)
        if not self._pooled:
            self._first = torch.cat([each[0, 0] for each in states]).double()
            self._sum = torch.zeros_like(self._first)
            user[0] = False
        self._pooled += len(users)
        self._count += int(user.sum())
        self._sum = self._sum + torch.cat([each[0, user].sum(0, dtype=torch.double) for each in states])
        self._square += float(read.hidden[0, user].double().square().sum())
        if read.own is not None:
            self._nll -= float(read.own[0].double()[user].sum())
