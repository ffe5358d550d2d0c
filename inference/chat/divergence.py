"""How far a posterior has moved, measured by what it predicts."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.inference.chat.state import Transcript
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.filtering import FilterState, ParticleFilter
from bayes_dispatch.inference.two_pass.first_pass import Prefix, read_prefix
from bayes_dispatch.inference.two_pass.readers import CachedReader
from bayes_dispatch.model.parts import CutModel

if TYPE_CHECKING:
    from bayes_dispatch.inference.two_pass.system import System

__all__ = ["WINDOW", "expected_divergence"]

WINDOW = 64  # bytes at the end of a conversation on which predictives are compared


def expected_divergence(
    system: "System",
    cut: CutModel,
    transcript: Transcript,
    rows: Float[np.ndarray, "S components"],
    current: FilterState,
    candidate: Particles,
) -> tuple[float, int]:
    """What going on with the current particles is expected to cost, if the candidates are right, in nats a token.

    The mean of ``KL(candidate ‖ current)`` of the next token's distribution after each of the last ``WINDOW`` bytes,
    which both read afresh, and nothing before them. Both filters begin at their priors and count the user's bytes among
    these; the weights that they have at the end hold for all places. So what differs is the posterior, and what
    merging has left of the current particles, not how much either has read.

    Args:
        system, cut: the model and what goes with it. transcript: the conversation.
        rows: blend weights of the current particles. current: their filter. candidate: of one prompt.

    Returns:
        The divergence, and how often a block ran on a token for it.
    """
    window = Transcript(transcript.data[-WINDOW:], transcript.own[-WINDOW:])
    prefix = read_prefix(cut, system.tokenizer, [window.data], len(window) + 1)
    both = np.concatenate([rows[None], candidate.weights], axis=1)
    after, evaluated = _run(system, cut, prefix, both)
    new = _filtered(FilterState.prior(candidate), after[:, len(rows) :], window)
    if candidate.refined:
        refined, more = _run(system, cut, prefix, new.mean()[:, None])
        p, evaluated = refined[0, 0], evaluated + more
    else:
        p = _mixed(new, after[:, len(rows) :])
    q = _mixed(_filtered(current.forgotten(), after[:, : len(rows)], window), after[:, : len(rows)])
    kl = (p.exp() * (p - q)).sum(-1)[1:].mean()  # not after the beginning token
    return max(float(kl), 0.0), evaluated + (len(window) + 1) * cut.block


def _run(
    system: "System", cut: CutModel, prefix: Prefix, weights: Float[np.ndarray, "1 S components"]
) -> tuple[Float[Tensor, "1 S t V"], int]:
    particles, tokens = Particles(weights, np.ones(weights.shape[:2])), int(prefix.tokens[0])
    reader = CachedReader(cut, system.experts, particles, prefix, [0], tokens)
    return reader.read_prompts(0, tokens).double(), reader.evaluated


def _filtered(state: FilterState, after: Float[Tensor, "1 S t V"], window: Transcript) -> ParticleFilter:
    """The filter once it has read the user's bytes."""
    weights = ParticleFilter.at(state)
    said = np.flatnonzero(~window.own)
    data = np.frombuffer(window.data, np.uint8).astype(np.int64)
    weights.update(after[:, :, torch.from_numpy(said), torch.from_numpy(data[said])])
    return weights


def _mixed(weights: ParticleFilter, after: Float[Tensor, "1 S t V"]) -> Float[Tensor, "t V"]:
    return torch.logsumexp(weights.log_weights[0, :, None, None] + after[0], dim=0)
