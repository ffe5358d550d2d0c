"""What is read of prompts: evidence, and Arrow's routing; kept in files, so that a run that was stopped goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import bayes_dispatch as bd
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.inference.two_pass.first_pass import depths_of, first_pass
from bayes_dispatch.inference.two_pass.system import cut_of
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from real.routers import TOP, arrow_shares

__all__ = ["Reader"]

CHUNK = 64  # prompts of a file
TOKENS = 256  # that Arrow reads at once: each has the output of every adapter, and of 1,024 it takes 1.6 times as long

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Reader:
    """Reads prompts for a bundle.

    Attributes:
        work: directory of the files, which tell by their names what decided them.
    """

    bundle: bd.Bundle
    work: Path

    def evidence(self, texts: Sequence[str]) -> Evidence:
        """What the dispatcher reads."""
        model, cut = self.bundle.model, cut_of(self.bundle)

        def read(own: Sequence[str]) -> Arrays:
            found = first_pass(model, self.bundle.tokenizer, own, cut=cut).evidence
            return {"lengths": found.known_lengths(), **found.views}

        views = self._kept("evidence", [str(cut), *map(str, depths_of(cut or model.depth))], texts, read)
        lengths = views.pop("lengths")
        return Evidence(views, lengths)

    def shares(self, texts: Sequence[str]) -> np.ndarray:
        """(N, K) that Arrow gives the adapters; the prompts have the same number of tokens."""

        @torch.no_grad()
        def read(own: Sequence[str]) -> Arrays:
            ids = torch.tensor([self.bundle.tokenizer.tokenize(text).ids for text in own])
            return {
                "shares": torch.cat([self._arrow(part) for part in ids.split(max(TOKENS // ids.shape[1], 1))]).numpy()
            }

        return self._kept("arrow", [self.bundle.experts.digest, str(TOP)], texts, read)["shares"]

    @cached_property
    def _arrow(self) -> Callable[[Tensor], Tensor]:
        assert isinstance(self.bundle.model, TransformersBackbone)
        return arrow_shares(self.bundle.model, self.bundle.experts)

    def _kept(
        self, name: str, key: Sequence[str], texts: Sequence[str], read: Callable[[Sequence[str]], Arrays]
    ) -> Arrays:
        """Arrays of all these prompts; what no file has is read. The model decides them, and ``key``."""
        self.work.mkdir(parents=True, exist_ok=True)
        model, found = [self.bundle.model.fingerprint(), str(self.bundle.model.dtype)], list[Arrays]()
        for start in range(0, len(texts), CHUNK):
            own = texts[start : start + CHUNK]
            digest = blake2b(repr([*model, *key, *own]).encode(), digest_size=16).hexdigest()
            path = self.work / f"{name}-{digest}.npz"
            if not path.exists():
                part = path.with_suffix(".part.npz")
                np.savez(part, allow_pickle=False, **read(own))
                part.replace(path)
            with np.load(path, allow_pickle=False) as file:
                found.append(dict(file))
        return {each: np.concatenate([arrays[each] for arrays in found]) for each in found[0]}
