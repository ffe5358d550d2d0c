"""A text that grows, read by the unadapted model: the states below the cut, and evidence of what the user said.

Only the user's bytes are pooled and counted. The model's own are read all the same, as what the user's come after: a
hidden state is what it would be had the whole conversation been read at once.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.inference.chat.state import Transcript
from bayes_dispatch.inference.two_pass.first_pass import RESIDUAL_FLOOR, Prefix, evidence_of
from bayes_dispatch.model.parts import CutModel

if TYPE_CHECKING:
    from bayes_dispatch.inference.two_pass.system import System

__all__ = ["Conversation"]

CHUNK = 256  # tokens that are read at once, which bounds the memory of logits


class Conversation:
    """First pass and prefill of one text, which go on with every turn.

    Args:
        system: model and tokenizer. cut: its model. capacity: tokens that there is room for.

    Attributes:
        ids: tokens read so far, the beginning token first.
        below, first_pass: how often a block has run on a token, below the cut, and for evidence alone where no block
            is below it.
    """

    def __init__(self, system: "System", cut: CutModel, capacity: int) -> None:
        self.ids: list[int] = []
        self.below = self.first_pass = 0
        self._system, self._cut, self._capacity = system, cut, capacity
        self._cache = cut.cache_below(1, capacity)
        self._x: Tensor | None = None  # (1, capacity, …), what the blocks above read
        self._base = None if cut.block else system.model.init_cache(1, capacity)
        self._before: Float[Tensor, "1 V"] | None = None  # the base model's logits after the last token it has read
        self._pooled = self._count = 0  # tokens that were looked at for evidence, and those that are evidence
        self._sum: np.ndarray | float = 0.0  # (D,), of hidden states
        self._square = self._nll = 0.0

    @property
    def nbytes(self) -> int:
        """Of all states and caches."""
        caches = [cache for cache in (self._cache, self._base) if cache is not None]
        return sum(cache.nbytes for cache in caches) + (0 if self._x is None else self._x.nbytes)

    @property
    def prefix(self) -> Prefix:
        """The text so far below the cut."""
        assert self._x is not None
        return Prefix(torch.tensor([self.ids]), torch.tensor([len(self.ids)]), self._x[:, : len(self.ids)], None)

    def read(self, transcript: Transcript) -> None:
        """Read below the cut what is new in ``transcript``, whose beginning has been read."""
        new = [self._system.tokenizer.bos_token_id, *transcript.data][len(self.ids) :]
        for start in range(0, len(new), CHUNK):
            part = new[start : start + CHUNK]
            x, read = self._cut.below(torch.tensor([part]), None, self._cache), len(self.ids)
            if self._x is None:
                self._x = x.new_zeros(1, self._capacity, *x.shape[2:])
            self._x[:, read : read + len(part)] = x
            self.ids.extend(part)
            self.below += len(part) * self._cut.block

    def evidence(self, transcript: Transcript) -> Evidence:
        """Of the user's bytes: as ``first_pass`` gives it, had it pooled and counted these alone.

        Args:
            transcript: what was read; there is something of the user's in it.
        """
        user = torch.from_numpy(np.concatenate([[False], ~transcript.own]))
        while self._pooled < len(self.ids):
            part = slice(self._pooled, min(self._pooled + CHUNK, len(self.ids)))
            self._pool(part, user[part])
            self._pooled = part.stop
        mean = np.atleast_1d(self._sum / self._count)
        views = {"hidden": mean[None]}
        if self._base is not None:
            length = self._square / self._count
            residual = max(length - float(mean @ mean), RESIDUAL_FLOOR * length)
            views["surprise"] = np.array([[self._nll / self._count, np.log(residual)]])
        return evidence_of([transcript.user], views)

    def _pool(self, part: slice, user: Bool[Tensor, " t"]) -> None:
        """Add what is the user's of some tokens."""
        if self._base is None:
            assert self._x is not None
            hidden = self._x[0, part]
        else:
            ids = torch.tensor(self.ids[part])
            output = self._system.model(ids[None], cache=self._base)
            self.first_pass += len(ids) * self._cut.depth
            hidden, logits = output.hidden[0], output.logits[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            before = torch.cat([logits[:1] if self._before is None else self._before, logits[:-1]])  # each token
            own = before[user].log_softmax(-1).gather(1, ids[user, None])  # the beginning token is no user's
            self._nll -= float(own.double().sum())
            self._before = logits[-1:].clone()
        hidden = hidden[user].double()
        self._count += len(hidden)
        self._sum = self._sum + hidden.sum(0).cpu().numpy()
        self._square += float(hidden.square().sum())
