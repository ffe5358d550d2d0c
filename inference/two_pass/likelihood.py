"""How probable a language model, or each expert, finds the text that it has read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.two_pass.prompts import check_prompts
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["ExpertLogLikelihoods", "log_likelihood_of", "mean_log_likelihood"]

POSITIONS_AT_ONCE = 256  # bounds the memory that normalising the logits takes beside the logits themselves
TOKENS_AT_ONCE = 8192  # of one batch: rows times the longest of them, which bounds the memory of the logits


@dataclass(frozen=True, eq=False)
class ExpertLogLikelihoods:
    """Mean log-likelihood per byte of prompts under every expert and under base, in nats.

    Experts run as rows of one batch, each with its own scales. It serves as the ``score`` of
    ``evidence_functions.LogLikelihoods``.

    Args:
        model: the base model.
        experts: K experts made for it.
        tokenizer: the model's.

    Raises:
        ForeignExpertError: the experts were made for another model.
    """

    model: Backbone
    experts: ExpertBank
    tokenizer: ByteTokenizer

    def __post_init__(self) -> None:
        self.experts.check_base(self.model)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt component"]:
        """Score prompts of at most 4,096 bytes each.

        Returns:
            (N, K + 1), base last; a row of NaN for an empty prompt, which has no bytes to average over.

        Raises:
            PromptError: no prompts, or one that is too long or no UTF-8.
        """
        filled = [index for index, prompt in enumerate(prompts) if prompt != ""]
        scores = np.full((len(prompts), len(self.experts.components)), np.nan)
        if filled or not prompts:
            checked = check_prompts([prompts[index] for index in filled])
            scores[filled] = self._score(checked)
        return scores

    def _score(self, prompts: list[bytes]) -> np.ndarray:
        copies = len(self.experts.components)
        vertices = torch.eye(copies, dtype=self.model.dtype)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # similar lengths run together
        scores = np.empty((len(prompts), copies))
        while order:
            at_once = max(1, TOKENS_AT_ONCE // (copies * (1 + len(prompts[order[0]]))))
            batch, order = order[:at_once], order[at_once:]
            ids, mask = self.tokenizer.pad([[self.tokenizer.bos_token_id, *prompts[i]] for i in batch])
            ids, mask = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)  # (B (K + 1), T)
            adaptation = self.experts.blend(vertices.repeat(len(batch), 1))
            logits = self.model(ids, attention_mask=mask, adaptation=adaptation).logits
            scores[batch] = mean_log_likelihood(logits, ids, mask).reshape(-1, copies).cpu().numpy()
        return scores


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
