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
from bayes_dispatch.inference.two_pass.readers import CachedReader, straight
from bayes_dispatch.model.generation.decoding import divergence

if TYPE_CHECKING:
    from bayes_dispatch.inference.two_pass.system import System

__all__ = ["expected_divergence"]

WINDOW = 64  # tokens at the end of a conversation on which predictives are compared
NUMBERS = 2**26  # log-probabilities in memory: of a large vocabulary, fewer places are compared


def expected_divergence(
    system: "System",
    cut: int,
    begin: tuple[int, ...],
    transcript: Transcript,
    rows: Float[np.ndarray, "S components"],
    current: FilterState,
    candidate: Particles,
) -> tuple[float, int]:
    """What going on with the current particles is expected to cost, if the candidates are right, in nats a token.

    The mean of ``KL(candidate ‖ current)`` of the next token's distribution after each of the last ``WINDOW`` tokens,
    which both read afresh, and nothing before them. Both filters begin at what their posteriors say and count the
    user's tokens among these; the weights that they have at the end hold for all places. So what differs is the
    posterior, and what merging has left of the current particles, not how much either has read.

    Args:
        system, cut: the model and what goes with it, and how many of its blocks no expert adapts.
        begin: ids before the transcript. transcript: the conversation.
        rows: blend weights of the current particles. current: their filter. candidate: of one prompt.

    Returns:
        The divergence, and how often a block ran on a token for it.
    """
    window = transcript.since(max(0, len(transcript) - WINDOW))
    ids = [*begin, *window.ids.tolist()]
    user = np.concatenate([np.zeros(len(begin), dtype=bool), window.user])
    prefix = read_prefix(system.model, cut, [ids], system.tokenizer.pad_token_id, len(ids))
    both = np.concatenate([rows[None], candidate.weights], axis=1)
    own, after, evaluated = _run(system, prefix, both, len(window))
    count = len(rows)
    begin_at = FilterState.prior(candidate).aimed(candidate.target).forgotten()
    new = _filtered(begin_at, own[:, count:], user)
    if candidate.refined:
        _, refined, more = _run(system, prefix, new.mean()[:, None], len(window))
        p, evaluated = refined[0, 0].double(), evaluated + more
    else:
        p = _mixed(new, after[:, count:])
    q = _mixed(_filtered(current.forgotten(), own[:, :count], user), after[:, :count])
    return max(float(divergence(p, q).mean()), 0.0), evaluated + len(ids) * cut


def _run(
    system: "System", prefix: Prefix, weights: Float[np.ndarray, "1 S components"], places: int
) -> tuple[Float[Tensor, "1 S T"], Float[Tensor, "1 S t V"], int]:
    """What particles say of all tokens, and after as many of the last ones as there is memory for; evaluations."""
    particles = Particles(weights, np.ones(weights.shape[:2]))
    reader = CachedReader(system.model, system.experts, particles, prefix, [0], prefix.ids.shape[1])
    tail = min(places, max(1, NUMBERS // (weights.shape[1] * system.model.vocab_size)))
    said = straight(reader.read_prompts(own=True, tail=tail))
    assert said.own is not None
    return said.own, torch.cat(list(said.after), 2), reader.evaluated


def _filtered(state: FilterState, own: Float[Tensor, "1 S T"], user: np.ndarray) -> ParticleFilter:
    """The filter once it has read the user's tokens."""
    weights = ParticleFilter.at(state)
    weights.update(own[:, :, 1:], torch.from_numpy(user[None, 1:]))  # nothing is said of the first
    return weights


def _mixed(weights: ParticleFilter, after: Float[Tensor, "1 S t V"]) -> Float[Tensor, "t V"]:
    return torch.logsumexp(weights.log_weights[0, :, None, None] + after[0].double(), dim=0)
