"""Prompts drawn from the fitted program at given weights: what calibration by simulation infers them from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from bayes_dispatch.dispatcher.fitting.svi import GlobalsPosterior
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts

__all__ = ["simulate"]

AT_ONCE = 256  # prompts whose globals are in memory together


@torch.no_grad()
def simulate(
    model: DispatchModel,
    posterior: GlobalsPosterior,
    like: Prompts,
    weights: Float[Tensor, "prompt weight"],
    temper: float,
) -> Prompts:
    """Draw independent prompts of weights ``(N, K+1)`` with torch's generator, every view observed.

    Args:
        model, posterior: the program and its globals, of which every prompt has a draw of its own.
        like: prompts whose lengths, totals and missing views these take (bootstrap).
        temper: τ.
    """
    pieces = []
    for known in weights.split(AT_ONCE):
        blank = replace(like.select(torch.randint(len(like), (len(known),))), known=known)
        sites = posterior.draw(shape=(len(known),))
        nodes: Any = poutine.trace(model.sample_prompts).get_trace(sites, blank, torch.tensor(temper)).nodes
        observed = {view.name: nodes[view.name]["value"] for view in model.views}
        pieces.append(replace(blank, observed=observed, known=None))
    return Prompts.concatenate(pieces)
