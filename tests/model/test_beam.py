"""Beam search finds the best of all continuations, is a plain search over lists, and with one beam is greedy. Prompts
are read once, those that are done leave, penalties rank only, bad settings are refused."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.generation import Beginning, Generated
from bayes_dispatch.model.generation.beams import beam_search
from bayes_dispatch.model.generation.decoding import decode_scored
from bayes_dispatch.model.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

Row = tuple[int, ...]

fast = pytest.mark.usefixtures("unchecked")


class Toy:
    """Sequences whose next-token logits are a fixed random function of all their tokens, the first being the prompt."""

    def __init__(self, prompts: Sequence[int], vocab: int) -> None:
        self.rows: list[Row] = [(prompt,) for prompt in prompts]
        self.vocab = vocab
        self.evaluated: list[int] = []  # rows, at each step

    def start(self) -> Tensor:
        self.evaluated.append(len(self.rows))
        return torch.stack([toy_logits(row, self.vocab) for row in self.rows])

    def step(self, tokens: Tensor) -> Tensor:
        self.rows = [(*row, token) for row, token in zip(self.rows, tokens.tolist(), strict=True)]
        return self.start()

    def reorder(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


def toy_logits(row: Row, vocab: int) -> Tensor:
    return torch.from_numpy(2 * np.random.default_rng(row).normal(size=vocab))


def toy_prompts(prompts: Sequence[int], vocab: int) -> tuple[Toy, Beginning]:
    toy = Toy(prompts, vocab)
    ids = torch.tensor([[prompt % vocab] for prompt in prompts])
    return toy, Beginning(toy, [b"%d" % prompt for prompt in prompts], ids)


def toy_log_probabilities(prompt: int, new: Row, vocab: int) -> Tensor:
    """Of each token of ``new``."""
    rows = torch.stack([toy_logits((prompt, *new[:t]), vocab) for t in range(len(new))]).log_softmax(-1)
    return rows[torch.arange(len(new)), torch.tensor(new)]


def ends(new: Row, setting: GenerationSettings) -> bool:
    """An end token is none before ``min_new_tokens`` others, a stop sequence is none before so many tokens with it."""
    if new[-1] in setting.ends:
        return len(new) > setting.min_new_tokens
    return len(new) >= setting.min_new_tokens and any(new[-len(stop) :] == stop for stop in setting.stops)


def chosen(new: Row, setting: GenerationSettings) -> bool:
    """Whether the last token may be."""
    return new[-1] not in setting.ends or len(new) > setting.min_new_tokens


def plain_beam_search(prompt: int, vocab: int, setting: GenerationSettings) -> Row:
    """The rule of ``beam_search``, over lists and one prompt."""
    beams, power = setting.num_beams, setting.length_penalty
    live: list[tuple[float, Row]] = [(0.0, ())]
    done: list[tuple[float, Row]] = []
    for length in range(1, setting.max_new_tokens + 1):
        longer = [
            (total + float(log_probability), (*row, token))
            for total, row in live
            for token, log_probability in enumerate(toy_logits((prompt, *row), vocab).log_softmax(-1))
            if chosen((*row, token), setting)
        ]
        longer.sort(reverse=True)
        done += [(total / length**power, row) for total, row in longer[:beams] if ends(row, setting)]
        done = sorted(done, reverse=True)[:beams]
        live = [(total, row) for total, row in longer if not ends(row, setting)][:beams]
        if not live or (len(done) == beams and live[0][0] / length**power <= done[-1][0]):
            break
    else:
        done += [(total / length**power, row) for total, row in live]
    return max(done)[1]


def rows_of(generated: Generated) -> list[Row]:
    return [tuple(row[:n]) for row, n in zip(generated.ids.tolist(), generated.lengths.tolist(), strict=True)]


ENDINGS: list[dict[str, Any]] = [
    {},
    {"eos_token_id": 0},
    {"stop_sequences": ((1, 2), (2,))},
    {"eos_token_id": 1, "stop_sequences": ((0, 0), (2, 0))},
    {"eos_token_id": [2, 0]},
    {"eos_token_id": [1], "stop_sequences": ((0,), (2, 0)), "min_new_tokens": 2},
]


@fast
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("length_penalty", [-2.0, 0.0, 1.0])
def test_as_many_beams_as_continuations_find_the_best_of_all(ending: dict[str, Any], length_penalty: float) -> None:
    vocab, length = 3, 4
    setting = GenerationSettings(
        max_new_tokens=length, num_beams=vocab**length, length_penalty=length_penalty, **ending
    )
    prompts = list(range(8))
    found = beam_search(toy_prompts(prompts, vocab)[1], setting)
    lengths = set()
    for prompt, row, scores in zip(prompts, rows_of(found), found.log_probabilities, strict=True):
        best = (-np.inf, ())
        for new in itertools.chain.from_iterable(
            itertools.product(range(vocab), repeat=n) for n in range(1, length + 1)
        ):
            if not all(chosen(new[:n], setting) for n in range(1, len(new) + 1)):
                continue
            if any(ends(new[:n], setting) for n in range(1, len(new))) or (
                len(new) < length and not ends(new, setting)
            ):
                continue  # it would have ended before, or not end
            score = float(toy_log_probabilities(prompt, new, vocab).sum()) / len(new) ** length_penalty
            best = max(best, (score, new))
        assert row == best[1]
        assert torch.allclose(scores[: len(row)], toy_log_probabilities(prompt, row, vocab), atol=1e-12)
        lengths.add(len(row))
    if length_penalty == 0 and "min_new_tokens" not in ending:
        assert bool(ending) == (len(lengths) > 1)  # or the test would say little


@fast
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True),
    st.integers(2, 6),
    st.sampled_from(ENDINGS),
    st.integers(1, 8),
    st.sampled_from([-1.0, 0.0, 0.5, 3.0]),
    st.integers(3, 5),
)
def test_equals_a_plain_beam_search(
    prompts: list[int], length: int, ending: dict[str, Any], beams: int, length_penalty: float, vocab: int
) -> None:
    """In a batch, and so one by one."""
    setting = GenerationSettings(max_new_tokens=length, num_beams=beams, length_penalty=length_penalty, **ending)
    toy, batch = toy_prompts(prompts, vocab)
    found = beam_search(batch, setting)
    assert rows_of(found) == [plain_beam_search(prompt, vocab, setting) for prompt in prompts]
    assert toy.evaluated[0] == len(prompts)  # each is read once
    assert all(rows <= beams * len(prompts) for rows in toy.evaluated)
    assert found.ids.shape[1] == int(found.lengths.max()) <= length
    for prompt, row, ids, scores in zip(prompts, rows_of(found), found.ids, found.log_probabilities, strict=True):
        assert torch.allclose(scores[: len(row)], toy_log_probabilities(prompt, row, vocab), atol=1e-12)
        assert (ids[len(row) :] == setting.fill).all()
        assert (scores[len(row) :] == 0).all()


@fast
@pytest.mark.parametrize("ending", ENDINGS)
def test_one_beam_is_greedy(ending: dict[str, Any]) -> None:
    prompts, setting = range(20), GenerationSettings(max_new_tokens=6, **ending)
    searched = beam_search(toy_prompts(prompts, 4)[1], setting)
    greedy = decode_scored(toy_prompts(prompts, 4)[1], setting, None)
    assert torch.equal(searched.ids, greedy.ids)
    assert torch.equal(searched.lengths, greedy.lengths)
    assert torch.allclose(searched.log_probabilities, greedy.log_probabilities, atol=1e-12)


@fast
def test_prompts_that_are_done_leave_the_batch() -> None:
    prompts, setting = range(12), GenerationSettings(max_new_tokens=30, num_beams=2, eos_token_id=0)
    toys, sizes = [], []
    for prompt in prompts:
        toy, alone = toy_prompts([prompt], 4)
        beam_search(alone, setting)
        toys.append(toy)
    together, batch = toy_prompts(prompts, 4)
    beam_search(batch, setting)
    for t in range(len(together.evaluated)):
        sizes.append(sum(toy.evaluated[t] for toy in toys if t < len(toy.evaluated)))
    assert together.evaluated == sizes
    assert len({len(toy.evaluated) for toy in toys}) > 2
    assert max(len(toy.evaluated) for toy in toys) < 30


@fast
def test_beams_find_no_worse_than_greedy() -> None:
    """Always so for two tokens; for more, a beam search may lose what greedy finds, but gains on average."""

    def totals(prompts: Sequence[int], length: int, beams: int) -> Tensor:
        setting = GenerationSettings(max_new_tokens=length, num_beams=beams)
        search = beam_search if beams > 1 else lambda *given: decode_scored(*given, None)
        return search(toy_prompts(prompts, 5)[1], setting).log_probabilities.sum(1)

    gains = totals(range(100), 2, 3) - totals(range(100), 2, 1)
    assert (gains >= -1e-12).all()
    assert (gains > 0.1).any()
    greedy, narrow, wide = (float(totals(range(40), 8, beams).mean()) for beams in (1, 2, 8))
    assert greedy + 0.1 < narrow < wide


@fast
def test_penalties_rank_but_are_not_reported() -> None:
    """Two tokens, all continuations: the best total of penalised log-probabilities; reported are the model's own."""
    vocab, penalty = 4, 2.0
    setting = GenerationSettings(max_new_tokens=2, num_beams=vocab**2, repetition_penalty=penalty)

    def penalised(prompt: int, new: Row) -> float:
        total = 0.0
        for t, token in enumerate(new):
            own = toy_logits((prompt, *new[:t]), vocab).log_softmax(-1)
            total += float(own[token]) * (penalty if token in (prompt % vocab, *new[:t]) else 1)
        return total

    prompts = range(20)
    found = beam_search(toy_prompts(prompts, vocab)[1], setting)
    for prompt, row, scores in zip(prompts, rows_of(found), found.log_probabilities, strict=True):
        assert torch.allclose(scores, toy_log_probabilities(prompt, row, vocab), atol=1e-12)
        assert row == max(itertools.product(range(vocab), repeat=2), key=lambda new: penalised(prompt, new))


def test_each_prompt_is_read_once(model: "MambaFormerForCausalLM") -> None:
    """Then a row for each beam: none is read again for the beams' sake."""
    shapes = []
    handle = model.embedding.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape[:2])))
    try:
        model.generate(torch.tensor([[256, 1, 2, 3]] * 2), max_new_tokens=4, num_beams=5)
    finally:
        handle.remove()
    assert shapes == [(2, 4), (10, 1), (10, 1), (10, 1)]


@fast
def test_more_beams_than_the_vocabulary_has_tokens() -> None:
    setting = GenerationSettings(max_new_tokens=3, num_beams=8)
    toy, prompts = toy_prompts([1, 2], 2)
    beam_search(prompts, setting)
    assert toy.evaluated == [2, 4, 8]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_beams": 0}, "num_beams to be a whole number ≥ 1, got 0"),
        ({"num_beams": 259, "max_new_tokens": 1}, "at most 258 beams.*got 259"),
        ({"num_beams": 2, "do_sample": True}, "do_sample=False with beams"),
        ({"num_beams": 2, "length_penalty": -11.0}, "length_penalty to be a finite number ≥ -10 and ≤ 10, got -11"),
        (
            {"num_beams": 2, "length_penalty": float("nan")},
            "length_penalty to be a finite number ≥ -10 and ≤ 10, got nan",
        ),
    ],
)
def test_bad_settings(model: "MambaFormerForCausalLM", bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate(torch.tensor([[256, 1]]), **{"max_new_tokens": 2} | bad)
    assert model.generate(torch.tensor([[256, 1]]), max_new_tokens=1, num_beams=258).shape == (1, 1)
