"""Texts whose lines come from several domains, with their true shares: what a posterior of weights should find."""

from collections.abc import Sequence

import numpy as np

from bayes_dispatch.experts.domains.domain import Domain, Split

__all__ = ["mixed_text"]


def mixed_text(
    domains: Sequence[Domain], weights: Sequence[float], rng: np.random.Generator, total_bytes: int, split: Split
) -> tuple[str, np.ndarray]:
    """Lines of several domains in random order, cut at ``total_bytes``.

    Args:
        domains: where lines come from. weights: wanted share of the bytes of each.
        rng: randomness. total_bytes: length of the text. split: of all domains.

    Returns:
        The text, and each domain's share of its bytes.
    """
    lines = [domain.document(rng, 0, 2 * total_bytes, split).text.splitlines(keepends=True) for domain in domains]
    counts = np.zeros(len(domains))
    data = b""
    while len(data) < total_bytes:
        lacking = np.maximum(np.asarray(weights) * (len(data) + 40) - counts, 0) + 1e-9
        which = int(rng.choice(len(domains), p=lacking / lacking.sum()))
        if not lines[which]:
            lines[which] = domains[which].document(rng, 0, 2 * total_bytes, split).text.splitlines(keepends=True)
        line = lines[which].pop(0).encode()[: total_bytes - len(data)]
        data += line
        counts[which] += len(line)
    return data.decode(errors="ignore"), counts / counts.sum()  # the end may cut a character
