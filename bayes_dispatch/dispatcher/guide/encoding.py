"""What the guide's network sees of prompts: their evidence, and how well each expert alone would explain it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from bayes_dispatch.dispatcher.guide.importance import Table, vertex_densities
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.views import View

__all__ = ["Encoder", "encode"]


@dataclass(frozen=True, eq=False)
class Encoder:
    """Prompts, prior and τ to the inputs of a guide's network.

    Args:
        model: the program.
        sites: its globals, at one value: densities are taken there.
    """

    model: DispatchModel
    sites: Mapping[str, Tensor]
    _tables: list[Table] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tables", Table.of_views(self.model.views, [self.sites], 1.0))

    @property
    def width(self) -> int:
        """Numbers in each prompt's inputs."""
        return _width(self.model.views, self.model.n_experts + 1) + self.model.n_experts + 2

    def __call__(
        self,
        prompts: Prompts,
        temper: float | Float[Tensor, " prompt"],
        shares: Shaped[np.ndarray, "*prompts weight"] | Float[Tensor, "*prompts weight"],
    ) -> Float[np.ndarray, "prompt inputs"]:
        """The inputs ``(N, I)``, float64.

        They are those of :func:`encode`, the log joint density of each vertex and the evidence below the best one's,
        and the best expert's above base's.
        """
        densities = vertex_densities(self._tables, prompts, self.model.n_experts + 1) + np.log(
            np.asarray(shares, dtype=np.float64)
        )
        best = densities.max(1, keepdims=True)
        over_base = densities[:, :-1].max(1, keepdims=True) - densities[:, -1:]
        parts = (encode(self.model.views, prompts, temper, shares), np.arcsinh(densities - best), np.arcsinh(over_base))
        return np.concatenate(parts, axis=1)


def encode(
    views: Sequence[View],
    prompts: Prompts,
    temper: float | Float[Tensor, " prompt"],
    shares: Shaped[np.ndarray, "*prompts weight"] | Float[Tensor, "*prompts weight"],
) -> Float[np.ndarray, "prompt inputs"]:
    """The network's inputs ``(N, ·)``, in float64: each view and whether it is missing, log length and whether unknown,
    log τ, and the logs of the prior's label shares ``(K+1,)`` or ``(N, K+1)`` (relative to uniform ones)."""
    count, width = len(prompts), shares.shape[-1]
    out = np.empty((count, _width(views, width)))
    at = 0
    for view in views:
        values, absent = prompts.observed[view.name].numpy(), prompts.missing[view.name].numpy()
        if view.kind == "counts":
            values = np.sqrt(values / np.maximum(values.sum(-1, keepdims=True), 1.0))
        elif view.kind == "probabilities":
            values = np.log(values)
        end = at + view.width
        out[:, at:end], out[:, end] = values, absent
        if absent.any():
            out[absent, at:end] = 0.0
        at = end + 1
    lengths = prompts.lengths.numpy()
    np.log(np.maximum(lengths, 1.0), out=out[:, at])
    out[:, at + 1] = lengths == 0
    out[:, at + 2] = math.log(temper) if isinstance(temper, float) else np.log(temper.numpy())
    out[:, at + 3 :] = np.log(np.asarray(shares, dtype=np.float64) * width)
    return out


def _width(views: Sequence[View], n_weights: int) -> int:
    return sum(view.width + 1 for view in views) + n_weights + 3
