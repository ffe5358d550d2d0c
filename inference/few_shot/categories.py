"""Asking a language model for the category of a prompt: by the likelihood of the categories' names after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from bayes_dispatch.errors import TensorError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import Domain, Split
from bayes_dispatch.inference.two_pass.prompts import check_prompts, tokenized
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.backbone import Backbone, Tokenizer, padded

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
    tokenizer: Tokenizer,
    prompts: Sequence[str | bytes],
    names: Sequence[str],
    adaptation: Adaptation | None,
) -> Float[np.ndarray, "prompt name"]:
    """How likely each name is as the answer, normalised over the names.

    Args:
        model, tokenizer: of a bundle. prompts: UTF-8. names: the answers.
        adaptation: one set of scales for the model, or ``None``.

    Raises:
        PromptError: see ``check_prompts``. TensorError: the model says NaN of a name, or that none can be.
    """
    checked = check_prompts(prompts)
    answers = [tokenizer.tokenize(name, begin=False).ids for name in names]
    question = tokenizer.tokenize(QUESTION, begin=False).ids
    room = len(question) + max(map(len, answers))
    asked = [(*text.ids, *question) for text in tokenized(tokenizer, checked, model.longest, room)]
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i]))
    scores = np.empty((len(asked), len(names)))
    longest = max(map(len, answers))
    while order:
        at_once = max(1, TOKENS_AT_ONCE // (len(names) * (longest + len(asked[order[0]]))))
        batch, order = order[:at_once], order[at_once:]
        ids, tokens = padded([(*asked[i], *answer) for i in batch for answer in answers], tokenizer.pad_token_id)
        begins = torch.tensor([len(asked[i]) for i in batch]).repeat_interleave(len(names))
        places = torch.arange(ids.shape[1])
        said = model.score(ids, tokens, adaptation).double().cpu()
        counted = (places >= begins[:, None]) & (places < tokens[:, None])
        scores[batch] = said.masked_fill(~counted, 0.0).sum(1).reshape(len(batch), -1).numpy()
    if not (finite := np.isfinite(scores.max(1))).all():
        asked_of = f"of the names after prompt {int(finite.argmin())}"
        raise TensorError(f"expected finite log-probabilities {asked_of}, got NaN or infinity")
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)
