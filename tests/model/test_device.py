"""On another device a MambaFormer gives the CPU's numbers, and mixes no tensors of the two."""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_dispatch.model.adaptation import Adaptation, Delta
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from tests.model.device import DEVICE, Remote, device, there

SIZES = {"d_model": 32, "n_heads": 4, "head_dim": 16}
BACKBONES = {
    "mamba1": MambaFormerConfig(**SIZES, n_pairs=1, mixer="mamba1"),
    "mamba2": MambaFormerConfig(**SIZES, n_pairs=1),
    "window": MambaFormerConfig(**SIZES, n_pairs=1, attention_window=5),
    "grouped": MambaFormerConfig(
        **SIZES, n_kv_heads=2, blocks=("mamba2", "feed_forward", "attention", "feed_forward"), positions="rotary"
    ),
}
Model = MambaFormerForCausalLM


@pytest.fixture(params=BACKBONES)
def pair(request: pytest.FixtureRequest, make_model: Any) -> tuple[Model, Model]:
    """The same model here and there."""
    here = make_model(BACKBONES[request.param])
    return here, there(deepcopy(here))  # type: ignore[return-value]


def ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(258, (rows, tokens), generator=torch.Generator().manual_seed(rows))


def adapted(model: Model, rows: int, seed: int = 0) -> Adaptation:
    """Scales and a delta of each matrix, of each row."""
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=draw)

    deltas = {n: Delta(numbers(o, 2), numbers(2, i), numbers(rows, 2)) for n, (o, i) in model.linears().items()}
    return Adaptation({name: 1 + numbers(rows, rank) for name, rank in model.adaptable().items()}, deltas)


def reading(model: Model) -> list[Tensor | None]:
    """Ragged prompts, tokens one by one, rows that go, are copied and joined."""
    session, counts = model.open(3, 40, adapted(model, 3)), torch.tensor([9, 4, 7])
    ragged = session.read(ids(3, 9), counts, own=True, tail=2)
    found = [ragged.after, *(each[n, :count] for each in (ragged.own, ragged.hidden) for n, count in enumerate(counts))]
    found += session.read(ids(3, 1), own=True)
    session.keep([2, 0])
    other = session.select([1])
    found += session.read(ids(2, 3))
    session.join(other)
    session.reserve(60)
    found += session.read(ids(3, 1))
    plain = model.open(2, 40)
    found += plain.read(ids(2, 20))
    found += plain.read(ids(2, 4))
    below = model.open(2, 40, None, range(1))
    found += model.open(2, 40, None, range(1, model.depth)).read(ids(2, 6), x=below.read(ids(2, 6)).hidden)
    return found


def caching(model: Model) -> list[Tensor | None]:
    """Keys and values in int8, forgotten in part."""
    cache = model.init_cache(2, 30, kv_dtype=torch.int8)
    there_ = ids(2, 12).to(model.device)
    found = [model(there_, cache=cache).logits]
    cache.prune(6, 1)
    found += [model(there_[:, :1], cache=cache).logits, model(there_[:, :3], cache=cache.clone()).logits]
    with tempfile.TemporaryDirectory() as directory:
        cache.save(Path(directory) / "cache")
        again = Cache.load(Path(directory) / "cache", model.device)
    return [*found, model(there_, cache=again).logits]


def scoring(model: Model) -> list[Tensor | None]:
    """Whole texts, some of them padded, with and without weights that differ by row."""
    texts, counts = ids(3, 11), torch.tensor([11, 3, 8])
    ragged = [model.score(texts, counts), model.score(texts, counts, adapted(model, 3))]
    return [model.score(texts), *(each[n, :count] for each in ragged for n, count in enumerate(counts.tolist()))]


def writing(model: Model) -> list[Tensor | None]:
    """Greedy, drawn and by beams."""
    prompt = ids(2, 5).to(model.device)
    return [
        model.generate(prompt, max_new_tokens=4),
        model.generate(prompt, max_new_tokens=3, adaptation=adapted(model, 2)),
        model.generate(prompt, max_new_tokens=3, num_beams=2),
    ]


@pytest.mark.parametrize("work", [reading, caching, scoring, writing], ids=lambda work: work.__name__)
def test_numbers_are_the_cpus(pair: tuple[Model, Model], work: Callable[[Model], list[Tensor | None]]) -> None:
    here, away = pair
    assert away.device == DEVICE
    with torch.no_grad(), device():
        expected, found = work(here), work(away)
    assert any(isinstance(each, Remote) for each in found)
    for own, other in zip(found, expected, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            held = own.held if isinstance(own, Remote) else own
            torch.testing.assert_close(held, other, rtol=1e-4, atol=1e-4, equal_nan=True)


class Uploads(TorchDispatchMode):
    """Shapes of numbers that go to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        goes = func is torch.ops.aten._to_copy.default and kwargs.get("device") == DEVICE
        if goes and not isinstance(args[0], Remote) and args[0].is_floating_point():
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs)


def test_an_adaptation_goes_to_the_device_once(pair: tuple[Model, Model]) -> None:
    """Not with each token; its digest is that of the one on the CPU."""
    _, away = pair
    adaptation = adapted(away, 2)
    with torch.no_grad(), device(), Uploads() as uploads:
        session = away.open(2, 20, adaptation)
        assert len(uploads.shapes) == len(adaptation.scales) + 3 * len(adaptation.deltas)
        uploads.shapes.clear()
        for width in (3, 1, 1):
            session.read(ids(2, width))
        assert uploads.shapes == []
        assert adaptation.to(DEVICE).digest() == adaptation.digest()


def test_tensors_of_both_devices_are_refused() -> None:
    """As on a GPU; so the tests above can fail."""
    with device():
        assert isinstance(torch.tensor([1], device=DEVICE), Remote)
        x = torch.ones(3, device=DEVICE)
        assert isinstance(x, Remote)
        assert float((x * torch.tensor(2.0)).sum()) == 6
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="one device"):
            torch.cat([x, torch.ones(1)])
        with pytest.raises(RuntimeError, match="indices on the CPU"):
            torch.ones(3)[x.long()]
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
            x.numpy()
        y = x[1:]
        y += 1
        assert x.cpu().tolist() == [1, 2, 2]
