"""Tasks of reasoning-gym: seeded, split by question, each right by its own checker."""

import importlib.util
from itertools import islice, pairwise

import numpy as np
import pytest

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import TASKS, Checked, Interleaved, ReasoningTask, held_out

MISSING = importlib.util.find_spec("reasoning_gym") is None
needs_the_package = pytest.mark.skipif(MISSING, reason="reasoning-gym is not installed")


@needs_the_package
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_questions_and_answers(task: ReasoningTask) -> None:
    """Other questions' answers are seldom right: formats alone earn nothing much."""
    assert isinstance(task, Checked)
    for split in ("train", "held_out"):
        items = list(islice(task.items(np.random.default_rng(0), split), 40))
        assert items == list(islice(task.items(np.random.default_rng(0), split), 40))
        assert len({question for question, _ in items}) > 30
        for question, answer in items:
            text = question.removeprefix("Q: ").removesuffix("\nA:")
            assert held_out(text) == (split == "held_out")
            assert "\n" not in text + answer
            assert len(f"{question}{answer}".encode()) <= 256
            assert task.reward(question, answer, answer) == 1
            assert task.reward(question, answer, " 906 = 12 ×, [") < 1
        others = [task.reward(question, answer, wrong) for (question, answer), (_, wrong) in pairwise(items)]
        assert 0 <= min(others) <= np.mean(others) < 0.3


@needs_the_package
def test_answers_alone_are_scored() -> None:
    document = Interleaved("tasks", TASKS).document(np.random.default_rng(0), 300, 1500, "held_out")
    lines = document.data[document.prompt_bytes :].decode().splitlines()
    scored = [document.data[start:stop].decode() for start, stop in document.ranges]
    assert scored == [line.removeprefix("A:") for line in lines[1::2]]


@needs_the_package
def test_zero_which_has_no_digits_is_not_converted() -> None:
    items = islice(ReasoningTask("base_conversion").items(np.random.default_rng(0), "train"), 400)
    assert all(answer.strip() for _, answer in items)


def test_right_by_hand() -> None:
    task = ReasoningTask("spell_backward")
    if MISSING:
        with pytest.raises(ConfigError, match=r"^expected reasoning-gym and what it needs \(pip install"):
            next(task.items(np.random.default_rng(0), "train"))
        return
    question, answer = next(task.items(np.random.default_rng(0), "train"))
    assert answer == " " + question.removesuffix("\nA:").split()[-1][::-1]


def test_an_unknown_task() -> None:
    with pytest.raises(ConfigError, match=r"^expected a task of spell_backward, .*, got 'sudoku'$"):
        ReasoningTask("sudoku")
