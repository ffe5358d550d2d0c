"""Laws: scales are checked once, cannot be changed, carry gradients, and their digests tell them apart."""

import copy
import gc
import pickle
import sys

import pytest
import torch

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model import adaptation, factors
from bayes_dispatch.model.adaptation import Adaptation, Delta


def test_rows_are_counted() -> None:
    assert Adaptation.identity().rows is None
    assert Adaptation({"a": torch.ones(3), "b": torch.ones(5)}).rows is None
    assert Adaptation({"a": torch.ones(2, 3), "b": torch.ones(2, 5)}).rows == 2


@pytest.mark.parametrize(
    "scales",
    [
        {"a": torch.ones(3), "b": torch.ones(2, 5)},
        {"a": torch.ones(2, 3), "b": torch.ones(4, 5)},
        {"a": torch.ones(2, 2, 3)},
        {"a": torch.tensor(1.0)},
        {"a": torch.tensor([1.0, torch.nan])},
        {"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf])},
    ],
)
def test_mixed_or_infinite_scales_are_refused(scales: dict[str, torch.Tensor]) -> None:
    with pytest.raises(TensorError, match=r"expected .* got") as error:
        Adaptation(scales)
    assert "\n" not in str(error.value)


def test_the_scales_cannot_be_changed() -> None:
    """Neither by what was given nor by what is read, and digests are of what they are."""
    given = {"a": torch.ones(3, requires_grad=True)}
    adapted = Adaptation(given)
    digest = adapted.digest()
    optimizer = torch.optim.SGD(given.values(), lr=1.0)
    (2 * adapted.scales["a"]).sum().backward()  # gradients flow through the copies
    assert torch.equal(given["a"].grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    optimizer.step()
    given["b"] = torch.ones(3)
    with torch.no_grad():
        adapted.scales["a"].mul_(2)
    with pytest.raises(TypeError):
        adapted.scales["a"] = torch.zeros(3)  # type: ignore[index]
    for same in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert same.scales == {"a": torch.ones(3)}
        assert same.digest() == digest
    assert Adaptation({"a": given["a"]}).digest() != digest


def test_made_in_inference_mode_it_is_used_outside() -> None:
    with torch.inference_mode():
        adapted = Adaptation({"a": torch.ones(3)})
    weight = torch.ones(3, requires_grad=True)
    (weight * adapted.scales["a"]).sum().backward()
    assert weight.grad is not None


def test_select_takes_rows_in_order() -> None:
    rows = Adaptation({"a": torch.arange(6.0).view(3, 2)})
    assert torch.equal(rows.select([2, 0]).scales["a"], torch.tensor([[4.0, 5.0], [0.0, 1.0]]))
    shared = Adaptation({"a": torch.ones(2)})
    assert shared.select([0, 0]) is shared


def test_digest_belongs_to_the_scales_of_a_block() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    digest = Adaptation({"blocks.0.a": x, "blocks.1.a": y}).digest
    assert digest(0) == Adaptation({"blocks.1.a": x, "blocks.0.a": x.clone()}).digest(0)
    different = [
        digest(0),
        digest(1),
        Adaptation({"blocks.0.b": x}).digest(0),  # another matrix
        Adaptation({"blocks.0.a": x.flip(0)}).digest(0),
        Adaptation({"blocks.0.a": x.double()}).digest(0),
        Adaptation({"blocks.0.a": x[None]}).digest(0),  # one row is not the same as shared by all rows
        Adaptation({"blocks.0.a": torch.nextafter(x, x + 1)}).digest(0),
        Adaptation({}).digest(0),
    ]
    assert len(set(different)) == len(different)
    assert digest(2) == Adaptation({}).digest() == ""
    assert digest() not in different


def delta(seed: int = 0, weights: tuple[float, ...] = (1.0, 2.0), dtype: torch.dtype = torch.float32) -> Delta:
    drawn = torch.Generator().manual_seed(seed)
    up, down = torch.randn(4, 2, generator=drawn), torch.randn(2, 3, generator=drawn)
    return Delta(up.to(dtype), down.to(dtype), torch.tensor(weights, dtype=dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["up", "down"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_that_are_not_finite_are_refused(part: str, value: float, dtype: torch.dtype) -> None:
    wrong = delta(dtype=dtype)
    getattr(wrong, part)[1, 1] = value
    with pytest.raises(TensorError, match=f"^expected finite numbers in {part} of the delta of b.1, got NaN or inf"):
        Adaptation({}, {"a": delta(), "b.1": wrong})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_huge_factors_are_finite(dtype: torch.dtype) -> None:
    """Whose sum is not."""
    huge = delta(dtype=dtype)
    huge.up.fill_(torch.finfo(dtype).max)
    assert Adaptation({}, {"a": huge}).digest()


def test_digest_tells_factors_and_weights() -> None:
    """However the tensors that hold them came to be."""
    known = Adaptation({}, {"a": delta()})
    with torch.inference_mode():
        unversioned = Adaptation({}, {"a": delta()})
    for same in (delta(), copy.deepcopy(delta())):
        assert Adaptation({}, {"a": same}).digest() == known.digest() == unversioned.digest()
    assert pickle.loads(pickle.dumps(known)).digest() == known.digest()
    swapped = delta()._replace(up=delta().up.flip(0))
    others = [Adaptation({}, {"a": delta(1)}), Adaptation({}, {"a": swapped}), Adaptation({}, {"b": delta()})]
    others += [Adaptation({}, {"a": delta(weights=(1.0, 3.0))}), Adaptation({}, {"a": delta(dtype=torch.float64)})]
    assert len({known.digest(), *(each.digest() for each in others)}) == 6


def test_what_changes_nothing_is_in_no_digest() -> None:
    """So that rows that join others keep theirs, though these adapt other matrices."""
    z, names = torch.tensor([1.0, 2.0]), ("blocks.0.a", "blocks.0.b", "blocks.1.a")
    some = [Adaptation({}), *(Adaptation({name: z}) for name in names), *(Adaptation({}, {n: delta()}) for n in names)]
    for one in some:
        for other in some:
            joined = one.followed_by(other, 2, 1)
            for block in (None, 0, 1):
                digest = joined.digest(block)
                rows = (digest,) * 3 if isinstance(digest, str) else digest
                assert rows == (one.digest(block),) * 2 + (other.digest(block),)
    assert Adaptation({"a": torch.ones(2)}, {"a": delta(weights=(0.0, 0.0))}).digest() == ""


def test_factors_that_were_changed_in_place_are_seen() -> None:
    """As an optimiser changes them, and as a view of them does; a number that is not finite, too."""
    given = delta()
    digests = [Adaptation({}, {"a": given}).digest()]
    given.up.mul_(2)
    digests.append(Adaptation({}, {"a": given}).digest())
    given.down[0][1] += 1
    digests.append(Adaptation({}, {"a": given}).digest())
    leaf = given.up.requires_grad_()
    leaf.grad = torch.ones_like(leaf)
    torch.optim.SGD([leaf], lr=1.0).step()
    digests.append(Adaptation({}, {"a": given}).digest())
    with torch.inference_mode():
        inner = delta()
        digests.append(Adaptation({}, {"a": inner}).digest() + "1")
        inner.up.mul_(3)
        digests.append(Adaptation({}, {"a": inner}).digest())
    assert len(set(digests)) == 6
    with torch.no_grad():
        leaf[0, 0] = torch.nan
    with pytest.raises(TensorError, match="expected finite numbers in up of the delta of a"):
        Adaptation({}, {"a": given})


def test_factors_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all blends that share them, all rows of these and all parts; they are not kept alive."""
    hashed: list[tuple[int, ...]] = []
    before, kept = factors.hashed, set(factors._known)

    def counted(named: dict[str, torch.Tensor]) -> str:
        hashed.extend(tuple(tensor.shape) for tensor in named.values())
        return before(named)

    for module in (adaptation, factors):
        monkeypatch.setattr(module, "hashed", counted)
    given = delta()
    blends = [Adaptation({}, {"blocks.0.a": given._replace(c=torch.rand(3, 2))}) for _ in range(3)]
    blends += [blends[0].select([1, 0]), blends[0].followed_by(blends[1], 3, 3), blends[0].detached()]
    blends += [blends[0].part("blocks")]
    digests = [blend.digest() for blend in blends] + [blend.digest(0) for blend in blends]
    assert len(set(digests)) > 5
    assert [shape for shape in hashed if shape in ((4, 2), (2, 3))] == [(4, 2), (2, 3)]
    del given, blends
    gc.collect()
    assert set(factors._known) <= kept


def test_what_is_known_of_a_tensor_may_be_gone_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the interpreter ends, and modules have forgotten their names."""
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    tensor = torch.ones(3)
    factors.looked_at({"a": tensor})
    monkeypatch.setattr(factors, "_known", None)
    del tensor
    gc.collect()
    assert not told
