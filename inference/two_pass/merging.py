"""Which particles of a prompt can be run as one, because their predictives can hardly be told apart.

Particle s, of filtered probability ``v_s``, is replaced by a representative r(s). By convexity the mixture changes by
no more than ``Σ_s v_s KL(p_s ‖ p_r(s))`` nats a token; these are measured on the last tokens of what was read. A
particle of next to no probability costs next to nothing, whatever it predicts.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["divergences", "representatives"]

NEVER = -1e300  # for the logarithm of 0, by which none can be multiplied; sums of it are finite


def divergences(
    log_probabilities: Float[Tensor, "N S T V"], counted: Bool[Tensor, "N T"]
) -> Float[np.ndarray, "N S S"]:
    """``Σ_t KL(p_s ‖ p_r)`` for all s and r of each prompt, in nats, over the tokens that are ``counted``.

    Where r gives no probability to what s does, it is beyond any tolerance, and finite.
    """
    log_p = log_probabilities.double().clamp(min=NEVER)
    p = log_p.exp() * counted[:, None, :, None]
    cross = torch.einsum("nstv,nrtv->nsr", p, log_p)
    within = cross.diagonal(dim1=1, dim2=2)
    return (within[:, :, None] - cross).clamp(min=0).cpu().numpy()


def representatives(
    probabilities: Float[np.ndarray, " S"], kl: Float[np.ndarray, "S S"], tolerance: float
) -> Int[np.ndarray, " S"]:
    """A representative of each particle, as few as a greedy search finds.

    Args:
        probabilities: of the particles. kl: (S, S), ``KL(p_s ‖ p_r)`` in nats a token, 0 for s = r.
        tolerance: the most that ``Σ_s v_s KL(p_s ‖ p_r(s))`` may be, in nats a token.

    Returns:
        (S,) the index of each particle's representative; a representative has its own.
    """
    cost = probabilities[:, None] * kl
    chosen = [int(cost.sum(0).argmin())]
    least = cost[:, chosen[0]]
    while least.sum() > tolerance:
        after = np.minimum(least[:, None], cost).sum(0)
        after[chosen] = np.inf
        chosen.append(int(after.argmin()))
        least = np.minimum(least, cost[:, chosen[-1]])
    place = kl[:, chosen].copy()
    place[chosen, np.arange(len(chosen))] = -1.0  # its own
    return np.asarray(chosen)[place.argmin(1)]
