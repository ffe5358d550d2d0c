"""Held-out prompts that are a given number of tokens long: of one domain, or of several at known shares."""

from collections.abc import Sequence
from zlib import crc32

import numpy as np

from bayes_dispatch.errors import ConfigError, PromptError
from bayes_dispatch.experts.domains import Domain
from bayes_dispatch.experts.domains.mixtures import mixed_parts, owners_of
from bayes_dispatch.inference.scoring.evidence_sets import token_shares
from bayes_dispatch.model.backbone import Tokenizer

__all__ = ["beginning", "mixed_prompts", "pure_prompts"]

LONGEST = 8  # bytes of a token, in the mean of a prompt
SMALLEST = 0.02  # share of a domain that is in a prompt


def beginning(text: str, tokens: int, tokenizer: Tokenizer) -> str | None:
    """The first ``tokens`` tokens of a text; ``None`` where it is shorter, or what they say has other tokens."""
    data, spans = text.encode(), tokenizer.tokenize(text).spans
    if len(spans) < tokens:
        return None
    try:
        cut = tokenizer.tokenize(data[: spans[tokens - 1][1]])
    except PromptError:  # amid a character
        return None
    return data[: spans[tokens - 1][1]].decode() if len(cut.ids) == tokens else None


def pure_prompts(domain: Domain, tokens: int, count: int, tokenizer: Tokenizer, seed: int) -> list[str]:
    """Beginnings of documents of a domain."""
    rng, found = np.random.default_rng([seed, tokens, crc32(domain.name.encode())]), list[str]()
    while len(found) < count:
        text = domain.document(rng, 0, LONGEST * tokens, "held_out").text
        if (prompt := beginning(text, tokens, tokenizer)) is not None:
            found.append(prompt)
    return found


def mixed_prompts(
    domains: Sequence[Domain], tokens: int, count: int, tokenizer: Tokenizer, seed: int
) -> tuple[list[str], np.ndarray]:
    """Prompts whose lines come from two or three domains, and each domain's share of their tokens (N, K).

    Domains are drawn, with shares that are uniform on the simplex, until two at least are in a prompt: in a short one
    they are those of short lines.
    """
    if len(domains) < 2:
        raise ConfigError(f"expected at least two domains to mix, got {len(domains)}")
    rng, prompts, found = np.random.default_rng([seed, tokens]), list[str](), list[np.ndarray]()
    while len(prompts) < count:
        chosen = rng.choice(len(domains), size=min(int(rng.integers(2, 4)), len(domains)), replace=False)
        weights = rng.dirichlet(np.ones(len(chosen))).tolist()
        parts = mixed_parts([domains[i] for i in chosen], weights, rng, LONGEST * tokens, "held_out")
        text = b"".join(part for _, part in parts).decode(errors="ignore")  # the end may cut a character
        prompt = beginning(text, tokens, tokenizer)
        if prompt is None:
            continue
        owners = chosen[owners_of(parts)]
        shares = token_shares(tokenizer.tokenize(prompt.encode()), owners[: len(prompt.encode())], len(domains))
        if (shares > SMALLEST).sum() > 1:
            prompts.append(prompt)
            found.append(shares)
    return prompts, np.stack(found)
