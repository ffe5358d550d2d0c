"""The benchmark of examples: a prompt ends in a question, and the smoke test prints every way."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import examples
from bayes_dispatch.experts.domains import CONVENTIONS


def test_a_prompt_ends_in_a_question_of_the_convention() -> None:
    prompt, answer = examples.question(CONVENTIONS[0], 2, np.random.default_rng(0))
    *solved, asked = prompt.split("\n")
    assert len(solved) == 2
    assert all(line.partition(">")[2] == line.partition(">")[0][::-1] for line in solved)
    assert answer == asked.removesuffix(">")[::-1] + "\n"


@pytest.mark.slow
def test_the_smoke_test_prints_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    examples.main(questions=1, seeds=2, quick=True)
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == len(examples.BLENDS) + 4
    assert "nan" not in printed
