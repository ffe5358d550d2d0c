"""Every row is read as if alone: in parts, in steps, with copies, with what is dropped on the way."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.two_pass import readers as readers_module
from bayes_dispatch.inference.two_pass.blends import Particles
from bayes_dispatch.inference.two_pass.first_pass import Prefix, read_prefix
from bayes_dispatch.inference.two_pass.readers import CachedReader, ParticleReader, UncachedReader, straight
from bayes_dispatch.model.backbone import padded

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
    model: "MambaFormerForCausalLM", block: int, prompts: list[bytes], weights: np.ndarray, joins: bool = False
) -> list[ParticleReader]:
    """The fast reader, copies of a prompt sharing its prefix, and the slow one."""
    bank, distinct = experts_from(model, block), list(dict.fromkeys(prompts))
    particles = Particles(weights, np.full(weights.shape[:2], 1 / weights.shape[1]))
    prefix = prefix_of(model, block, distinct)
    ids, tokens = padded([[256, *prompt] for prompt in prompts], 257)
    return [
        CachedReader(model, bank, particles, prefix, [distinct.index(prompt) for prompt in prompts], 30, joins),
        UncachedReader(model, bank, particles, ids, tokens),
    ]


def prefix_of(model: "MambaFormerForCausalLM", block: int, prompts: list[bytes]) -> Prefix:
    return read_prefix(model, block, [[256, *prompt] for prompt in prompts], 257, 30)


@settings(max_examples=20, deadline=None)
@given(
    block=st.integers(0, 2),
    which=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    copies=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    seed=st.integers(0, 999),
    tail=st.integers(1, 20),
    at_once=st.sampled_from([1, 20_000, 2**22]),
)
def test_fast_is_slow(
    model64: "MambaFormerForCausalLM",
    block: int,
    which: list[int],
    copies: list[int],
    seed: int,
    tail: int,
    at_once: int,
) -> None:
    """Prompts and particles with copies among them, whose ends are told in parts or at once; then two steps, a drop of
    some of both, and another step.
    """
    rng = np.random.default_rng(seed)
    prompts = [TEXTS[i] for i in which]
    weights = rng.dirichlet(np.ones(4), size=3)[copies][None].repeat(len(prompts), 0)
    if seed % 2:
        weights = rng.dirichlet(np.ones(4), size=weights.shape[:2])
    readers = both(model64, block, prompts, weights)
    lengths = torch.tensor([len(prompt) + 1 for prompt in prompts])
    with torch.no_grad():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers_module, "AFTER_AT_ONCE", at_once)
            fast = straight(readers[0].read_prompts(own=True, tail=tail))
        slow = straight(readers[1].read_prompts(own=True, tail=tail))
        assert fast.own is not None
        assert slow.own is not None
        real = torch.arange(fast.own.shape[2]) < lengths[:, None]
        assert bool(fast.own[:, :, 0].isnan().all())
        torch.testing.assert_close(
            fast.own[:, :, 1:].swapaxes(1, 2)[real[:, 1:]],
            slow.own[:, :, 1:].swapaxes(1, 2)[real[:, 1:]],
            rtol=0,
            atol=1e-10,
        )
        one, other = (torch.cat(list(said.after), 2) for said in (fast, slow))
        width = min(tail, int(lengths.max()))
        real = torch.arange(width) >= width - lengths[:, None]
        torch.testing.assert_close(one.swapaxes(1, 2)[real], other.swapaxes(1, 2)[real], rtol=0, atol=1e-10)
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


@pytest.mark.parametrize("block", [0, 2])
def test_joined_readers_go_on_as_if_alone(model64: "MambaFormerForCausalLM", block: int) -> None:
    """Of prompts and particles of any number; and when one of them has gone."""
    rng = np.random.default_rng(2)
    given = [
        ([TEXTS[0], TEXTS[2]], rng.dirichlet(np.ones(4), size=(2, 1))),
        ([TEXTS[1]], rng.dirichlet(np.ones(4), size=(1, 3))),
    ]
    alone, joined = ([both(model64, block, *each, joins=True) for each in given] for _ in range(2))
    with torch.no_grad():
        for reader in [each for pair in (*alone, *joined) for each in pair]:
            straight(reader.read_prompts(own=False))
        fast, slow = joined[0]
        fast.join(joined[1][0])
        slow.join(joined[1][1])
        token = torch.tensor([65, 66, 67])
        one, other = (pair[1].read(part) for pair, part in zip(alone, (token[:2], token[2:]), strict=True))
        expected = torch.cat([one.expand(-1, 3, -1), other])
        for reader in (fast, slow):
            torch.testing.assert_close(reader.read(token), expected, rtol=0, atol=1e-10)
            reader.keep([2, 0], [[0, 2], [0]])
        assert (fast.rows, fast.nbytes > 0) == (3, True)
        torch.testing.assert_close(fast.read(token[:2]), slow.read(token[:2]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", [0, 1])
def test_what_is_run(model64: "MambaFormerForCausalLM", block: int) -> None:
    """Copies of a prompt under the same scales are read once; a step runs the blocks below once a prompt."""
    weights = np.tile(np.eye(4)[[0, 1, 0]], (3, 1, 1))
    fast, slow = both(model64, block, [TEXTS[1]] * 3, weights)
    above, tokens = 3 - block, len(TEXTS[1]) + 1
    with torch.no_grad():
        for reader in (fast, slow):
            straight(reader.read_prompts(own=True))
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
    bank, prefixes = experts_from(model64, block), [prefix_of(model64, block, [text]) for text in (beginning, whole)]
    reader = CachedReader(model64, bank, Particles(weights, np.full((1, 3), 1 / 3)), prefixes[0], [0], 5)
    with torch.no_grad():
        expected = straight(both(model64, block, [whole], weights)[1].read_prompts(own=True, tail=20))
        first = straight(reader.read_prompts(own=True, tail=5))
        if dropped:
            reader.keep([0], [[2, 0]])
        reader.lengthen(prefixes[1], len(whole) + 1)
        rest = straight(reader.read_prompts(own=True, tail=20))
    chosen = [2, 0] if dropped else [0, 1, 2]
    assert expected.own is not None
    assert first.own is not None
    assert rest.own is not None
    for before, since, whole_text in (
        (first.own, rest.own, expected.own),
        (*first.after, *rest.after, *expected.after),
    ):
        found = torch.cat([before[:, chosen], since], 2)
        torch.testing.assert_close(found, whole_text[:, chosen], rtol=0, atol=1e-10, equal_nan=True)
    assert reader.evaluated == (3 * 5 + len(chosen) * (len(whole) - 4)) * (3 - block)
