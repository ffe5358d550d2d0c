"""A model cut between two blocks is the whole model, with caches and without, however the text is cut and padded;
what is below an adaptation outlasts it. Threads may cut at once; what cannot be cut is refused."""

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import CacheFullError, ConfigError, StaleCacheError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.frozen import frozen
from tests.model.tensors import tokens

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]


def scales(model: "MambaFormerForCausalLM", block: int, rows: int, seed: int = 0) -> Adaptation:
    """Random scales, other ones in each row, of the matrices from a block on."""
    draw = torch.Generator().manual_seed(seed)
    return Adaptation(
        {
            name: (1 + 0.3 * torch.randn(rows, rank, generator=draw)).to(model.dtype)
            for name, rank in model.adaptable().items()
            if int(name.split(".")[1]) >= block
        }
    )


@settings(max_examples=15, deadline=None)
@given(
    block=st.integers(0, 2),
    rows=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 7), min_size=3, max_size=3),
    steps=st.integers(0, 3),
    copies=st.integers(1, 3),
)
def test_cut_models_are_whole_ones(
    make_model: MakeModel, block: int, rows: int, lengths: list[int], steps: int, copies: int
) -> None:
    """Below once for each text, above for several adaptations of it, in chunks and single steps."""
    model = make_model(dtype=torch.float64)
    counts = torch.tensor(lengths[:rows]) + 1
    ids, adaptation = tokens(rows, rows, int(counts.max()) + steps), scales(model, block, rows * copies)
    prompt, owner = ids[:, : int(counts.max())], torch.arange(rows).repeat_interleave(copies)
    below = model.open(rows, ids.shape[1], blocks=range(block)) if block else None
    above = model.open(rows * copies, ids.shape[1], adaptation, range(block, 3))

    def read(part: Tensor, real: Tensor | None) -> Tensor:
        x = None if below is None else below.read(part, real).hidden[owner]
        after = above.read(part[owner], None if real is None else real[owner], x).after
        assert after is not None
        return after[:, -1]

    last = read(prompt, counts)
    for step in range(steps):
        last = read(ids[:, prompt.shape[1] + step, None], None)
    for row in range(rows):
        text = torch.cat([prompt[row, : counts[row]], ids[row, prompt.shape[1] :]])[None]
        for each in range(row * copies, (row + 1) * copies):
            whole = model(text, adaptation=adaptation.select([each])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(last[each], whole, rtol=0, atol=1e-10)


def test_uncached_parts(make_model: MakeModel) -> None:
    model = make_model(dtype=torch.float64)
    ids = tokens(1, 2, 9)
    for block in (1, 2):
        adaptation = scales(model, block, 2)
        hidden = model.upper(block, model.below(block, ids), adaptation=adaptation)
        torch.testing.assert_close(hidden, model(ids, adaptation=adaptation).hidden, rtol=0, atol=1e-12)


def test_states_below_outlast_an_adaptation(make_model: MakeModel) -> None:
    """Another adaptation continues from the same states below, and is refused by those above."""
    model = make_model(dtype=torch.float64)
    ids = tokens(2, 1, 6)
    below, above = (model.init_cache(1, 8, blocks=blocks) for blocks in (range(1), range(1, 3)))
    x = model.below(1, ids, cache=below)
    model.upper(1, x, cache=above, adaptation=scales(model, 1, 1))
    following = model.below(1, ids[:, :1], cache=below)
    other = scales(model, 1, 1, seed=5)
    with pytest.raises(StaleCacheError, match="block 1"):
        model.upper(1, following, cache=above, adaptation=other)
    fresh = model.init_cache(1, 8, blocks=range(1, 3))
    again = model.upper(1, torch.cat([x, following], 1), cache=fresh, adaptation=other)[:, -1]
    whole = model(torch.cat([ids, ids[:, :1]], 1), adaptation=other).hidden[:, -1]
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-10)


def test_caches_of_some_blocks(make_model: MakeModel, tmp_path: Any) -> None:
    """They are saved and loaded as whole ones are, and cost less."""
    model = make_model(dtype=torch.float64)
    below, above = (model.init_cache(2, 8, blocks=blocks) for blocks in (range(1), range(1, 3)))
    assert below.nbytes + above.nbytes == model.init_cache(2, 8).nbytes
    model.upper(1, model.below(1, tokens(3, 2, 4), cache=below), cache=above, adaptation=scales(model, 1, 2))
    above.save(tmp_path / "cache.safetensors")
    loaded = type(above).load(tmp_path / "cache.safetensors")
    assert loaded.first == 1
    x = model.below(1, tokens(4, 2, 1), cache=below)
    one, other = (model.upper(1, x, cache=c, adaptation=scales(model, 1, 2)) for c in (above.clone(), loaded))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_caches_of_other_blocks_are_refused(make_model: MakeModel) -> None:
    """Whatever runs, its cache is one of the blocks that run."""
    model, ids = make_model(dtype=torch.float64), tokens(6, 1, 4)
    x = model.below(1, ids)
    for blocks in (range(1), range(1, 3), range(2, 3)):
        with pytest.raises(StaleCacheError, match=r"expected a cache of blocks 0 … 2, got one of blocks"):
            model(ids, cache=model.init_cache(1, 8, blocks=blocks))
    for blocks in (range(3), range(2, 3), range(1)):
        with pytest.raises(StaleCacheError, match=r"expected a cache of blocks 1 … 2, got one of blocks"):
            model.upper(1, x, cache=model.init_cache(1, 8, blocks=blocks))
    for blocks in (range(-1, 2), range(4), range(0)):
        with pytest.raises(ConfigError, match="expected blocks of 0 … 2, got"):
            model.init_cache(1, 8, blocks=blocks)
    with pytest.raises(ConfigError, match="expected blocks of 0 … 2, got blocks -1 … 2"):
        model.upper(-1, x)


def test_a_model_that_has_been_adapted_can_be_copied(make_model: MakeModel) -> None:
    """What it keeps of its last calls comes along, or not, but stands in no copy's way."""
    model = make_model(dtype=torch.float64)
    adaptation, ids = scales(model, 1, 1), tokens(5, 1, 4)
    cache = model.init_cache(1, 8)
    model(ids, adaptation=adaptation, cache=cache)
    expected = model(ids[:, :1], adaptation=adaptation, cache=cache).logits
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = made.init_cache(1, 8)
        made(ids, adaptation=copy.deepcopy(adaptation), cache=again)
        found = made(ids[:, :1], adaptation=copy.deepcopy(adaptation), cache=again).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_cannot_be_cut_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="expected blocks of 0 … 2"):
        model.open(1, 8, blocks=range(3, 3))
    with pytest.raises(ConfigError, match=r"expected the first or the last of 3 blocks, got range\(1, 2\)"):
        model.open(1, 8, blocks=range(1, 2))
    for blocks, block in ((range(2), 2), (range(2, 3), 2)):
        with pytest.raises(TensorError, match=f"expected scales of block {block} and above alone, got some of 1"):
            model.open(1, 8, scales(model, 1, 1), blocks)
    with pytest.raises(TensorError, match="expected scales of block 2 and above alone"):
        model.upper(2, torch.zeros(1, 2, model.backbone.d_model), adaptation=scales(model, 1, 1))
    with pytest.raises(ConfigError, match=r"expected blocks of 0 … 2"):
        model.below(4, tokens(0, 1, 2))


def test_what_fails_leaves_nothing_frozen(make_model: Any) -> None:
    """Whether that is the work inside, or the freezing itself; parameters that come meanwhile are their owner's."""
    model = make_model()

    @frozen(model)
    def work() -> None:
        model.extra = torch.nn.Linear(2, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.last = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2), requires_grad=False)])
    model.last[0].mul_(torch.ones(2, requires_grad=True))  # from here on it is computed
    with pytest.raises(RuntimeError, match="leaf"), frozen(model):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())
    del model.last
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_threads_may_freeze_a_model_together(make_model: Any) -> None:
    """Its weights want gradients again once the last has ended, and not before."""
    model, one, other = make_model(), ExitStack(), ExitStack()
    one.enter_context(frozen(model))
    other.enter_context(frozen(model))
    one.close()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    other.close()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_read_that_is_refused_reads_nothing(make_model: MakeModel) -> None:
    """Room and ids are checked for all pieces of a long read before the first."""
    session = make_model(dtype=torch.float64).open(1, 300)
    bad = tokens(1, 1, 290)
    bad[0, 280] = 258
    for ids, error in ((tokens(0, 1, 400), CacheFullError), (bad, TensorError)):
        with pytest.raises(error):
            session.read(ids)
        assert session.lengths.tolist() == [0]
