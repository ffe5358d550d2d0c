"""Asking a language model for the category of a prompt: by the likelihood of the categories' names after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import Domain, Split
from bayes_dispatch.inference.two_pass.likelihood import log_likelihood_of
from bayes_dispatch.inference.two_pass.prompts import check_prompts
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["QUESTION", "CategoryDomain", "category_text", "name_probabilities"]

QUESTION = "\n# category: "
TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class CategoryDomain:
    """Documents of several domains, each followed by the question and its category's name, which alone is scored.

    Attributes:
        domains: where documents come from. names: domain → name of its category; by default its own.
        lengths: shortest and longest beginning, in bytes, log-uniform.
    """

    domains: tuple[Domain, ...]
    names: Mapping[str, str] | None = None
    lengths: tuple[int, int] = (16, 160)
    name = "category"

    def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: Split) -> Document:
        """A beginning of a random domain's document, and its category; lengths are the domain's own."""
        domain = self.domains[int(rng.integers(len(self.domains)))]
        length = int(np.exp(rng.uniform(*np.log(self.lengths))))
        beginning = domain.document(rng, 0, length, split).cut(length).data
        answer = category_text((self.names or {}).get(domain.name, domain.name)).encode()
        asked = beginning + QUESTION.encode()
        text = (asked + answer).decode("utf-8", errors="ignore")
        return Document(text, len(asked), ((len(asked), len(asked) + len(answer)),))


def category_text(name: str) -> str:
    """How a category's name ends the text."""
    return f"{name}\n"


@torch.no_grad()
def name_probabilities(
    model: Backbone,
    tokenizer: ByteTokenizer,
    prompts: Sequence[str | bytes],
    names: Sequence[str],
    adaptation: Adaptation | None,
) -> Float[np.ndarray, "prompt name"]:
    """How likely each name is as the answer, normalised over the names.

    Args:
        model, tokenizer: of a bundle. prompts: 1 to 4,096 bytes each. names: the answers.
        adaptation: one set of scales for the model, or ``None``.

    Raises:
        PromptError: see ``check_prompts``.
    """
    checked = check_prompts(prompts)
    answers = [name.encode() for name in names]
    order = sorted(range(len(checked)), key=lambda i: -len(checked[i]))
    scores = np.empty((len(checked), len(names)))
    longest = max(map(len, answers)) + len(QUESTION)
    while order:
        at_once = max(1, TOKENS_AT_ONCE // (len(names) * (1 + longest + len(checked[order[0]]))))
        batch, order = order[:at_once], order[at_once:]
        asked = [[tokenizer.bos_token_id, *checked[i], *QUESTION.encode()] for i in batch]
        ids, mask = tokenizer.pad([[*row, *answer] for row in asked for answer in answers])
        counted = torch.zeros(ids.shape[0], ids.shape[1] - 1)
        for place, row in enumerate(asked):
            for which, answer in enumerate(answers):
                counted[place * len(answers) + which, len(row) - 1 : len(row) - 1 + len(answer)] = 1.0
        logits = model(ids, attention_mask=mask, adaptation=adaptation).logits
        scores[batch] = log_likelihood_of(logits, ids, counted).reshape(len(batch), -1).cpu().numpy()
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)
