"""Plans of training: one that would fail after hours is refused at once."""

from dataclasses import replace

import pytest

from bayes_dispatch.app.training.plans import PLANS
from bayes_dispatch.dispatcher.gate import FEWEST_PROMPTS
from bayes_dispatch.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "fewest"),
    [("judged_documents", 2), ("gate_mixed_prompts", FEWEST_PROMPTS), ("gate_pure_prompts", 1), ("pure_prompts", 1)],
)
def test_numbers_that_a_late_stage_cannot_work_with(name: str, fewest: int) -> None:
    """Differences have errors where there are two documents, and a gate takes so many prompts."""
    assert getattr(replace(PLANS["smoke"], **{name: fewest}), name) == fewest  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=f"expected {name} to be a whole number from {fewest} to .*, got {fewest - 1}"
    ):
        replace(PLANS["smoke"], **{name: fewest - 1})  # type: ignore[arg-type]
