"""Two passes of a model on another device: the dispatcher, and what experts add, are here."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import bayes_dispatch as bd
from tests.model.device import DEVICE, device, there

PROMPTS = ["abcd>dcba\nfgh>", "37+58="]


@pytest.fixture(scope="module")
def away(bundle: bd.Bundle) -> bd.Bundle:
    return replace(bundle, model=there(deepcopy(bundle.model)))


@pytest.mark.parametrize(
    ("blend", "sampled"),
    [
        ("posterior_predictive", True),
        ("posterior_predictive", False),
        ("posterior_mean", False),
        ("refined_mean", False),
        ("base", True),
        ("top_k(2)", True),
    ],
)
def test_texts_are_those_of_the_cpu(bundle: bd.Bundle, away: bd.Bundle, blend: str, sampled: bool) -> None:
    assert away.model.device == DEVICE
    with device():
        found, expected = (
            bd.TwoPassGenerator(each).generate(PROMPTS, blend=blend, max_new_tokens=4, do_sample=sampled, seed=3)
            for each in (away, bundle)
        )
    assert found.texts == expected.texts
    torch.testing.assert_close(torch.tensor(found.weights), torch.tensor(expected.weights), rtol=1e-3, atol=1e-4)
