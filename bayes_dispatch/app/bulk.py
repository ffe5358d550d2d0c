"""Many documents, or prompts, in blocks: each is scored, or read, in a process that has loaded the bundle by then.

A posterior depends on the seed and on the prompt alone, so that blocks of documents give what all together give, to the
rounding of matrix products of another size. A block of prompts is whole batches of the first pass over all of them, so
that its evidence is the same to the last bit on processors of one kind with as many threads: fitting makes more of a
difference than rounding does.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.app.bundle_at import BundleAt
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.errors import BayesDispatchError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.inference.scoring.compare import compare_blends
from bayes_dispatch.inference.scoring.scores import Comparison
from bayes_dispatch.inference.two_pass.first_pass import PROMPTS_AT_ONCE, batches, first_pass
from bayes_dispatch.model.backbone import Tokenizer

__all__ = ["MapBlocks", "compare_in_blocks", "evidence_in_blocks", "read_block", "score_block"]

DOCUMENTS = 8  # of a block: as many as are scored together where they have some hundred bytes
PROMPTS = 2 * PROMPTS_AT_ONCE  # of a block


# (work, blocks, *constants, progress) → work(block, *constants) of each: ``map_blocks`` of ``serving.ray.bulk``
MapBlocks = Callable[..., list[Any]]


def compare_in_blocks(
    mapped: MapBlocks,
    bundle: BundleAt,
    documents: Sequence[Document],
    blends: Sequence[str],
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """What ``compare_blends`` finds, block by block.

    Args:
        mapped: does the work of each block somewhere. bundle: to be loaded wherever a block is scored.
        documents, blends, seed, progress: as in ``compare_blends``.
    """
    return Comparison.concatenate(
        mapped(score_block, _blocks(documents, DOCUMENTS), bundle, tuple(blends), seed, progress=progress)
    )


def evidence_in_blocks(
    mapped: MapBlocks, bundle: BundleAt, tokenizer: Tokenizer, prompts: Sequence[str], progress: bool = False
) -> Evidence:
    """The evidence of a first pass over the blocks that no expert touches, block by block of prompts.

    Args:
        mapped, bundle, progress: as in ``compare_in_blocks``. tokenizer: the bundle's. prompts: as in ``first_pass``.
    """
    blocks: list[list[int]] = []
    for batch in batches([tokenizer.tokenize(prompt) for prompt in prompts]):
        if not blocks or len(blocks[-1]) + len(batch) > PROMPTS:
            blocks.append([])
        blocks[-1] += batch
    try:
        texts = [[prompts[n] for n in block] for block in blocks]
        read = Evidence.concatenate(mapped(read_block, texts, bundle, progress=progress))
    except BayesDispatchError as error:
        raise type(error)(f"{error}; prompts are counted from the shortest to the longest") from None
    return read.select(np.argsort(np.concatenate(blocks)))


def score_block(documents: Sequence[Document], bundle: BundleAt, blends: Sequence[str], seed: int) -> Comparison:
    """``compare_blends`` of a block; Ray calls its processes by this name."""
    return compare_blends(_loaded(bundle), documents, blends, seed)


def read_block(prompts: Sequence[str], bundle: BundleAt) -> Evidence:
    """The evidence of a block, likewise."""
    system = _loaded(bundle)
    return first_pass(system.model, system.tokenizer, prompts, cut=system.cut).evidence


@lru_cache(maxsize=2)  # a process that scores many blocks loads a bundle once; `compare --other` has two
def _loaded(bundle: BundleAt) -> Bundle:
    return bundle.load()


def _blocks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
