"""Laws: scales are checked once, cannot be changed, carry gradients, and their digests tell them apart."""

import copy
import pickle

import pytest
import torch

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.adaptation import Adaptation


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
    adaptation = Adaptation(given)
    digest = adaptation.digest()
    optimizer = torch.optim.SGD(given.values(), lr=1.0)
    (2 * adaptation.scales["a"]).sum().backward()  # gradients flow through the copies
    assert torch.equal(given["a"].grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    optimizer.step()
    given["b"] = torch.ones(3)
    with torch.no_grad():
        adaptation.scales["a"].mul_(2)
    with pytest.raises(TypeError):
        adaptation.scales["a"] = torch.zeros(3)  # type: ignore[index]
    for same in (adaptation, copy.deepcopy(adaptation), pickle.loads(pickle.dumps(adaptation))):
        assert same.scales == {"a": torch.ones(3)}
        assert same.digest() == digest
    assert Adaptation({"a": given["a"]}).digest() != digest


def test_made_in_inference_mode_it_is_used_outside() -> None:
    with torch.inference_mode():
        adaptation = Adaptation({"a": torch.ones(3)})
    weight = torch.ones(3, requires_grad=True)
    (weight * adaptation.scales["a"]).sum().backward()
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
