"""How probable a language model, or each expert, finds the text that it has read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from bayes_dispatch.dispatcher.evidence.reading import checked_prompts
from bayes_dispatch.errors import TensorError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.two_pass.prompts import check_prompts, tokenized
from bayes_dispatch.model.backbone import Backbone, Tokenizer, padded

__all__ = ["ExpertLogLikelihoods"]

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
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.experts.check_base(self.model)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt component"]:
        """Score prompts, as long as the model can read.

        Returns:
            (N, K + 1), base last; a row of NaN for an empty prompt, which has no bytes to average over.

        Raises:
            PromptError: no prompts, or one that is too long or no UTF-8.
            TensorError: an expert, or base, under which the model says NaN, or that a token cannot be.
        """
        prompts = checked_prompts(prompts)
        filled = [index for index, prompt in enumerate(prompts) if prompt]
        scores = np.full((len(prompts), len(self.experts.components)), np.nan)
        if filled:
            scores[filled] = self._score(check_prompts([prompts[index] for index in filled]))
        return scores

    def _score(self, prompts: list[bytes]) -> np.ndarray:
        copies = len(self.experts.components)
        vertices = torch.eye(copies, dtype=self.model.weights_dtype)
        texts = [text.ids for text in tokenized(self.tokenizer, prompts, self.model.longest)]
        order = sorted(range(len(prompts)), key=lambda i: -len(texts[i]))  # similar lengths run together
        scores = np.empty((len(prompts), copies))
        while order:
            at_once = max(1, TOKENS_AT_ONCE // (copies * len(texts[order[0]])))
            batch, order = order[:at_once], order[at_once:]
            ids, tokens = padded([texts[i] for i in batch], self.tokenizer.pad_token_id)
            ids, tokens = ids.repeat_interleave(copies, 0), tokens.repeat_interleave(copies, 0)  # (B (K + 1), T)
            adaptation = self.experts.blend(vertices.repeat(len(batch), 1))
            said = self.model.open(len(ids), ids.shape[1], adaptation).read(ids, tokens, own=True).own
            assert said is not None
            place = torch.arange(ids.shape[1])
            counted = (place > 0) & (place < tokens[:, None])  # nothing is said of the first
            total = said.double().masked_fill(~counted.to(said.device), 0.0).sum(1).reshape(-1, copies).cpu().numpy()
            if not (finite := np.isfinite(total).all(0)).all():
                broken = self.experts.components[int(finite.argmin())]
                raise TensorError(f"expected finite log-probabilities under {broken}, got NaN or infinity")
            scores[batch] = total / np.array([len(prompts[i]) for i in batch])[:, None]
        return scores
