"""Training an expert moves its scales alone, and it gets better at its domain."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.experts.training import ExpertSettings, train_expert
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.model.pretraining import next_token_loss, pack_rows
from bayes_dispatch.model.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]
SORT = next(convention for convention in CONVENTIONS if convention.name == "sort")
SETTINGS = ExpertSettings(steps=25, batch_size=4, length=48)


@pytest.fixture(scope="module")
def base(make_model: MakeModel) -> "MambaFormerForCausalLM":
    return make_model(seed=2)


@pytest.fixture(scope="module")
def expert(base: "MambaFormerForCausalLM") -> ExpertVector:
    return train_expert(base, SORT, SETTINGS, progress=False)


def held_out_loss(model: "MambaFormerForCausalLM", expert: ExpertVector | None) -> float:
    documents = [SORT.document(np.random.default_rng(i), 0, 48, "held_out") for i in range(20)]
    ids, weights = pack_rows([(d.data, d.byte_weights(0.5)) for d in documents], ByteTokenizer())
    with torch.no_grad():
        logits = model(ids, adaptation=expert.adaptation() if expert else None).logits
        return float(next_token_loss(logits, ids, weights) / weights.sum())


def test_it_lowers_the_loss_on_held_out_documents(base: "MambaFormerForCausalLM", expert: ExpertVector) -> None:
    assert held_out_loss(base, expert) < held_out_loss(base, None) - 0.5


def test_the_model_stays_as_it_was(make_model: MakeModel) -> None:
    model = make_model(seed=2)
    model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    expert = train_expert(model, SORT, ExpertSettings(steps=2, batch_size=2, length=16), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert expert.base == model.fingerprint()


def test_a_failure_leaves_the_model_trainable(make_model: MakeModel) -> None:
    class Failing:
        name = "failing"

        def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: str) -> Document:
            raise ConnectionError

    model = make_model(seed=2)
    with pytest.raises(ConnectionError):
        train_expert(model, Failing(), SETTINGS, progress=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_is_an_expert_of_its_model(base: "MambaFormerForCausalLM", expert: ExpertVector) -> None:
    ExpertBank([expert]).check_base(base)
    assert expert.name == "sort"
    assert {name: len(z) for name, z in expert.scales.items()} == base.adaptable()
    assert all(not torch.equal(z, torch.ones_like(z)) and not z.requires_grad for z in expert.scales.values())


def test_the_seed_decides(base: "MambaFormerForCausalLM") -> None:
    def train(seed: int) -> torch.Tensor:
        settings = ExpertSettings(steps=3, batch_size=2, length=16, seed=seed)
        return torch.cat(list(train_expert(base, SORT, settings, progress=False).scales.values()))

    one = train(0)
    torch.rand(1)  # of no influence
    assert torch.equal(train(0), one)
    assert not torch.equal(train(1), one)


def test_only_training_documents_are_read(base: "MambaFormerForCausalLM") -> None:
    splits = set()

    class Watched:
        name = "sort"

        def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: str) -> Document:
            splits.add(split)
            return SORT.document(rng, prompt_bytes, total_bytes, split)  # type: ignore[arg-type]

    train_expert(base, Watched(), ExpertSettings(steps=1, batch_size=1, length=16), progress=False)
    assert splits == {"train"}


def test_decay_keeps_the_scales_near_one(base: "MambaFormerForCausalLM", expert: ExpertVector) -> None:
    decayed = train_expert(base, SORT, ExpertSettings(**vars(SETTINGS) | {"decay": 1.0}), progress=False)
    distance = [sum(float((z - 1).square().sum()) for z in e.scales.values()) for e in (expert, decayed)]
    assert distance[1] < distance[0] / 4
