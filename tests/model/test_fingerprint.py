"""Laws: however weights are changed, their fingerprint tells, and nothing that was made from the old ones is used."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, weight_norm

from bayes_dispatch.errors import StaleCacheError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer import fingerprint
from bayes_dispatch.model.mambaformer.fingerprint import contents, part_count
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., MambaFormerForCausalLM]
IDS = torch.arange(12).view(2, 6)


def by_fused_optimizer(model: MambaFormerForCausalLM) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=True)
        model(IDS).logits.square().mean().backward()
        optimizer.step()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CHANGES: dict[str, Callable[[Any], object]] = {
    "operation": lambda m: m.blocks[0].mixer.in_proj.weight.mul_(1.5),
    "data": lambda m: m.blocks[0].mixer.in_proj.weight.data.mul_(1.5),
    "assigned data": lambda m: setattr(m.blocks[1].mixer.qkv.weight, "data", m.blocks[1].mixer.qkv.weight.data * 1.5),
    "signs": lambda m: m.blocks[1].mixer.qkv.weight.data.neg_(),
    "small": lambda m: m.blocks[0].mixer.A_log.data.add_(0.3),
    "array": lambda m: np.multiply(view := m.blocks[0].norm.weight.detach().numpy(), 2, out=view),
    "fused": by_fused_optimizer,
    "prune": lambda m: prune.l1_unstructured(m.blocks[0].mixer.in_proj, "weight", 0.5),
    "parametrize": lambda m: parametrize.register_parametrization(m.blocks[0].mixer.in_proj, "weight", Doubled()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, make_model: MakeModel) -> None:
    """At the next token an old cache is refused; a new one, factors and compiled steps are of the new weights."""
    model = make_model()
    scales = Adaptation({name: torch.full((rank,), 1.1) for name, rank in model.adaptable().items()})
    with torch.no_grad():
        old = model.init_cache(2, 16)
        for ids in (IDS, IDS[:, :1]):
            model(ids, cache=old, adaptation=scales)
        before = model.fingerprint()
        CHANGES[change](model)
        with pytest.raises(StaleCacheError, match="expected a cache of model"):
            model(IDS[:, :1], cache=old, adaptation=scales)
        assert model.fingerprint() != before
        cache = model.init_cache(2, 16)
        model(IDS, cache=cache, adaptation=scales)
        got = model(IDS[:, :1], cache=cache, adaptation=scales).logits
        new = make_model()
        for mine, its in zip(new.blocks, model.blocks, strict=True):
            if hasattr(its.mixer, "in_proj"):
                mine.mixer.in_proj.weight = nn.Parameter(its.mixer.in_proj.weight.detach().clone())
        new.load_state_dict(model.state_dict(), strict=False)
        expected = new(torch.cat([IDS, IDS[:, :1]], 1), adaptation=scales).logits[:, -1:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_made_of_others(make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        plain, before = model(IDS).logits, model.fingerprint()
        weight_norm(model.blocks[0].mixer.in_proj)
        assert model.fingerprint() != before
        torch.testing.assert_close(model(IDS, cache=model.init_cache(2, 6)).logits, plain, rtol=0, atol=1e-4)


def test_the_mask_of_pruned_weights_counts(make_model: MakeModel) -> None:
    model = make_model()
    linear: Any = model.blocks[0].mixer.in_proj
    prune.identity(linear, "weight")
    before = model.fingerprint()
    linear.weight_mask[0, 0] = 0
    assert model.fingerprint() != before


@pytest.mark.parametrize("large", [False, True])
def test_a_few_numbers_are_seen_within_some_tokens(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """A decoded token looks at a part of each tensor; any other call at all of them."""
    if large:
        monkeypatch.setattr(fingerprint, "LARGE", 1)
    model = make_model()
    parts = 64 if large else 8
    assert part_count(list(model.parameters())) == parts

    def read(tokens: int, times: int) -> None:
        with torch.no_grad():
            cache = model.init_cache(2, 80)
            model(IDS, cache=cache)
            model.embedding.weight.detach().numpy()[100, 3] += 1
            for _ in range(times):
                model(IDS[:, :tokens], cache=cache)

    for tokens, times in ((1, parts), (2, 1)):
        with pytest.raises(StaleCacheError):
            read(tokens, times)


def test_a_model_may_become_smaller(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is then looked at in fewer parts than the turn that it has come to."""
    monkeypatch.setattr(fingerprint, "LARGE", 1)
    model = make_model()

    def read(count: int) -> None:
        with torch.no_grad():
            cache = model.init_cache(2, 80)
            for _ in range(count):
                model(IDS[:, :1], cache=cache)

    read(40)
    monkeypatch.setattr(fingerprint, "LARGE", 2**26)
    with torch.no_grad():
        model.norm.weight.add_(1)
    before = model.fingerprint()
    read(20)
    assert model.fingerprint() == before


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_bit_counts(data: st.DataObject) -> None:
    """In tensors of all sizes and layouts; equal tensors have equal contents."""
    sizes = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    tensors = [torch.randn(2, size, dtype=dtype) for size in sizes]
    before = contents(tensors)
    assert contents([tensor.clone() for tensor in tensors]) == before
    chosen = data.draw(st.sampled_from(tensors))
    raw = chosen.view(torch.uint8).numpy()
    place = data.draw(st.integers(0, raw.size - 1))
    raw.reshape(-1)[place] ^= 1 << data.draw(st.integers(0, 7))
    after = contents(tensors)
    assert after != before
    assert [row for part in range(part_count(tensors)) for row in contents(tensors, part)] == list(after)
    assert contents([tensor.mT for tensor in tensors]) == contents([tensor.mT.contiguous() for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 64, 4096, 2**16])
def test_patterns_do_not_cancel(dtype: torch.dtype, size: int) -> None:
    """What changes every number alike: signs, and powers of two, which change the same bits everywhere."""
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    seen = [contents([tensor])]
    for change in (lambda w: w.neg_(), lambda w: w.mul_(2), lambda w: w.mul_(4), lambda w: w.mul_(0.5)):
        change(tensor.data)
        seen.append(contents([tensor]))
    assert len({tuple(each) for each in seen}) == len(seen)


def test_tensors_elsewhere() -> None:
    """Off the CPU nothing is read."""
    assert contents([torch.empty(3, device="meta")]) == contents([torch.empty(3, device="meta")])
