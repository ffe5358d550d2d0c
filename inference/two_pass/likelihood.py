"""How probable a language model finds the text that it has read."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["log_likelihood_of", "mean_log_likelihood"]

POSITIONS_AT_ONCE = 256  # bounds the memory that normalising the logits takes beside the logits themselves


def mean_log_likelihood(
    logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Mean log-probability per token of each row, its first token being given, in nats.

    Args:
        logits: of the token after each one, as the model returns them.
        ids: right-padded tokens, at least two in each row. mask: 1 where there is a token.
    """
    total = torch.zeros(len(ids), dtype=torch.float64, device=logits.device)
    for start in range(0, ids.shape[1] - 1, POSITIONS_AT_ONCE):
        stop = min(start + POSITIONS_AT_ONCE, ids.shape[1] - 1)
        part = logits[:, start:stop]
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        following = slice(start + 1, stop + 1)
        own = part.gather(2, ids[:, following, None])[..., 0] - part.logsumexp(-1)  # (B, t)
        total += own.double().masked_fill(mask[:, following] == 0, 0.0).sum(1)
    return total / (mask.sum(1) - 1)


def log_likelihood_of(
    logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"], counted: Float[Tensor, "B T-1"]
) -> Float[Tensor, " B"]:
    """Log-probability of the tokens of each row that are ``counted`` (1, else 0), in nats, float64; differentiable.

    Args:
        logits: of the token after each one. ids: the tokens. counted: for all tokens but the first.
    """
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return -(losses.double() * counted).sum(1)
