"""Every row is read as if alone: in parts, in steps, with copies, with what is dropped on the way."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.first_pass import read_prefix
from bayes_dispatch.inference.two_pass.readers import CachedReader, ParticleReader, UncachedReader
from bayes_dispatch.model.parts import CutModel
from bayes_dispatch.model.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

TEXTS = [b"kfpa>apfk\nbc", b"12+34", b"a"]


def experts_from(model: "MambaFormerForCausalLM", block: int) -> ExpertBank:
    """Three experts of random scales in the blocks from one on."""
    draw = torch.Generator().manual_seed(4)
    ranks = {name: rank for name, rank in model.adaptable().items() if int(name.split(".")[1]) >= block}
    return ExpertBank(
        [
            ExpertVector(
                name, {m: 1 + 0.5 * torch.randn(r, generator=draw) for m, r in ranks.items()}, model.fingerprint()
            )
            for name in "xyz"
        ]
    )


def both(
    model: "MambaFormerForCausalLM", block: int, prompts: list[bytes], weights: np.ndarray
) -> list[ParticleReader]:
    """The fast reader, copies of a prompt sharing its prefix, and the slow one."""
    tokenizer, bank = ByteTokenizer(), experts_from(model, block)
    particles = Particles(weights, np.full(weights.shape[:2], 1 / weights.shape[1]))
    cut, distinct = CutModel(model, block), list(dict.fromkeys(prompts))
    prefix = read_prefix(cut, tokenizer, distinct, 30)
    ids, mask = tokenizer.pad([[256, *prompt] for prompt in prompts])
    return [
        CachedReader(cut, bank, particles, prefix, [distinct.index(prompt) for prompt in prompts], 30),
        UncachedReader(model, bank, particles, ids, mask.sum(1)),
    ]


@settings(max_examples=20, deadline=None)
@given(
    block=st.integers(0, 2),
    which=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    copies=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    seed=st.integers(0, 999),
    parts=st.integers(1, 20),
)
def test_fast_is_slow(
    model64: "MambaFormerForCausalLM", block: int, which: list[int], copies: list[int], seed: int, parts: int
) -> None:
    """Prompts and particles with copies among them; then two steps, a drop of some of both, and another step."""
    rng = np.random.default_rng(seed)
    prompts = [TEXTS[i] for i in which]
    weights = rng.dirichlet(np.ones(4), size=3)[copies][None].repeat(len(prompts), 0)
    if seed % 2:
        weights = rng.dirichlet(np.ones(4), size=weights.shape[:2])
    readers = both(model64, block, prompts, weights)
    longest = max(map(len, prompts)) + 1
    with torch.no_grad():
        for start in range(0, longest, parts):
            fast, slow = (reader.read_prompts(start, start + parts) for reader in readers)
            real = (
                torch.arange(start, start + fast.shape[2])[None] < torch.tensor([len(p) + 1 for p in prompts])[:, None]
            )
            torch.testing.assert_close(fast.swapaxes(1, 2)[real], slow.swapaxes(1, 2)[real], rtol=0, atol=1e-10)
        for step in range(3):
            count = len(prompts) if step < 2 else len(kept)
            token = torch.from_numpy(rng.integers(0, 256, count))
            fast, slow = (reader.read(token) for reader in readers)
            torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
            if step == 1:
                kept = sorted(rng.choice(len(prompts), size=rng.integers(1, len(prompts) + 1), replace=False).tolist())
                chosen = [sorted(rng.choice(3, size=rng.integers(1, 4), replace=False).tolist()) for _ in kept]
                for reader in readers:
                    reader.keep(kept, chosen)


def test_ends_alone(model64: "MambaFormerForCausalLM") -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(4), size=(3, 2))
    for block in (0, 1):
        with torch.no_grad():
            fast, slow = (reader.read_ends() for reader in both(model64, block, TEXTS, weights))
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", [0, 1])
def test_what_is_run(model64: "MambaFormerForCausalLM", block: int) -> None:
    """Copies of a prompt under the same scales are read once; a step runs the blocks below once a prompt."""
    weights = np.tile(np.eye(4)[[0, 1, 0]], (3, 1, 1))
    fast, slow = both(model64, block, [TEXTS[1]] * 3, weights)
    above, tokens = 3 - block, len(TEXTS[1]) + 1
    with torch.no_grad():
        for reader in (fast, slow):
            reader.read_prompts(0, tokens)
        assert (fast.rows, fast.evaluated) == (2, 2 * tokens * above)
        assert (slow.rows, slow.evaluated) == (9, 9 * tokens * 3)
        fast.read(torch.tensor([1, 2, 3]))
        assert (fast.rows, fast.evaluated) == (6, 2 * tokens * above + 3 * block + 6 * above)
        fast.keep([2], [[0, 1, 2]])
        assert fast.rows == 2


@pytest.mark.parametrize(("block", "dropped"), [(0, False), (1, True)])
def test_prompts_that_grow(model64: "MambaFormerForCausalLM", block: int, dropped: bool) -> None:
    """A longer prompt is read on from where its beginning ended, with room made for it."""
    weights = np.random.default_rng(1).dirichlet(np.ones(4), size=(1, 3))
    whole, beginning = TEXTS[0], TEXTS[0][:4]
    cut, bank = CutModel(model64, block), experts_from(model64, block)
    prefixes = [read_prefix(cut, ByteTokenizer(), [text], 30) for text in (beginning, whole)]
    reader = CachedReader(cut, bank, Particles(weights, np.full((1, 3), 1 / 3)), prefixes[0], [0], 5)
    with torch.no_grad():
        expected = both(model64, block, [whole], weights)[1].read_prompts(0, 20)
        parts = [reader.read_prompts(0, 5)]
        if dropped:
            reader.keep([0], [[2, 0]])
            expected = expected[:, [2, 0]]
        reader.lengthen(prefixes[1], len(whole) + 1)
        parts += [reader.read_prompts(start, start + 3) for start in range(5, len(whole) + 1, 3)]
    found = torch.cat([parts[0][:, [2, 0]] if dropped else parts[0], *parts[1:]], 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert reader.evaluated == (3 * 5 + (2 if dropped else 3) * (len(whole) - 4)) * (3 - block)
