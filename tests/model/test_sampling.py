"""Draws follow the distribution that temperature, top-k, top-p, min-p and penalty define, each row by its own seed.
Each chi-square test rejects a right sampler once in a million seeds."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.generation.sampling import Sampling, penalise_repetition, row_generators, row_seeds

FALSE_ALARM = 1e-6
DRAWS = 20_000
LOGITS = np.random.default_rng(0).normal(size=12)


def p_value(setting: dict[str, Any], expected: np.ndarray) -> float:
    """Of the chi-square test of draws from ``LOGITS`` against ``expected``, whose zeros are never drawn."""
    generator = np.random.default_rng(1)
    logits = torch.from_numpy(LOGITS).expand(DRAWS, -1)
    drawn = Sampling(do_sample=True, **setting).choose(logits, [generator] * DRAWS)
    counts = np.bincount(drawn.numpy(), minlength=len(LOGITS))
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    return float(chisquare(counts[kept], DRAWS * expected[kept]).pvalue)


def distribution(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float = 0.0
) -> np.ndarray:
    """By the definitions, one token at a time."""
    p = np.exp(LOGITS / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    if top_p is not None:
        total, nucleus = 0.0, []
        for i in order:
            nucleus.append(i)
            total += p[i]
            if total >= top_p:
                break
        order = nucleus
    order = [i for i in order if p[i] >= min_p * p.max()]
    kept = np.zeros_like(p)
    kept[order] = p[order]
    return kept / kept.sum()


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 1.0},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
        {"min_p": 0.0},
        {"min_p": 0.2},
        {"temperature": 3.0, "min_p": 0.5},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.3},
    ],
)
def test_draws_follow_the_distribution(setting: dict[str, Any]) -> None:
    assert p_value(setting, distribution(**setting)) > FALSE_ALARM


def test_the_check_would_notice_a_small_error() -> None:
    assert p_value({"temperature": 1.1}, distribution()) < FALSE_ALARM


def test_the_least_temperature_takes_the_mode() -> None:
    """Where logits divided by it are too large for any number."""
    logits = torch.tensor(LOGITS)[None].float() + 5
    drawn = Sampling(do_sample=True, temperature=5e-324).choose(logits, [np.random.default_rng(0)])
    assert drawn.tolist() == [int(LOGITS.argmax())]


def test_min_p_of_one_leaves_the_most_probable() -> None:
    logits = torch.from_numpy(LOGITS).expand(50, -1)
    drawn = Sampling(do_sample=True, temperature=9.0, min_p=1.0).choose(logits, [np.random.default_rng(0)] * 50)
    assert set(drawn.tolist()) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_bad_min_p(bad: float) -> None:
    with pytest.raises(ConfigError, match=rf"min_p to be a finite number ≥ 0 and ≤ 1, got {bad}"):
        Sampling(min_p=bad)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=1, max_size=6), st.floats(0.1, 9), st.integers(1, 3)
)
def test_repetition_penalty(tokens: list[tuple[float, bool]], penalty: float, batch: int) -> None:
    """As CTRL and its users have it, one logit at a time; above 1 it never helps a token that was seen."""
    logits = torch.tensor([[logit for logit, _ in tokens]] * batch, dtype=torch.double)
    seen = torch.tensor([[was for _, was in tokens]] * batch)
    penalised = penalise_repetition(logits, seen, penalty)
    for row in penalised.tolist():
        for (logit, was), new in zip(tokens, row, strict=True):
            assert new == pytest.approx((logit / penalty if logit > 0 else logit * penalty) if was else logit)
    assert bool(((penalised <= logits) | (penalty < 1)).all())


def test_rows_draw_independently() -> None:
    """Pairs of draws of two rows follow the product of their distributions."""
    generators = row_generators(0, [b"a", b"b"])
    logits = torch.from_numpy(np.stack([LOGITS[:3], LOGITS[3:6]]))
    counts = np.zeros((3, 3))
    for _ in range(2000):
        a, b = Sampling(do_sample=True).choose(logits, generators).tolist()
        counts[a, b] += 1
    p = logits.softmax(-1).numpy()
    assert chisquare(counts.ravel(), 2000 * np.outer(p[0], p[1]).ravel()).pvalue > FALSE_ALARM


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.integers(1, 8), st.floats(0.01, 0.99), st.integers(0, 99))
def test_kept_tokens_are_the_fewest_that_reach_top_p(logits: list[float], k: int, p: float, seed: int) -> None:
    probabilities = np.sort(torch.tensor(logits, dtype=torch.double).softmax(-1).numpy())[::-1]
    totals = probabilities.cumsum()
    assume(np.abs(totals - p).min() > 1e-9)
    least = probabilities[min(int((totals < p).sum()), k - 1, len(logits) - 1)]  # the least probable token that is kept
    sampling = Sampling(do_sample=True, top_k=k, top_p=p)
    rows = torch.tensor([logits] * 50, dtype=torch.double)
    drawn = sampling.choose(rows, [np.random.default_rng(seed)] * 50)
    assert (rows.softmax(-1)[0][drawn].numpy() >= least - 1e-12).all()


@pytest.mark.usefixtures("unchecked")
def test_greedy_takes_no_randomness() -> None:
    class Untouched:
        def random(self) -> float:
            raise AssertionError

    assert Sampling().choose(torch.tensor([[0.0, 2.0, 1.0]]), [Untouched()]).tolist() == [1]  # type: ignore[list-item]


@pytest.mark.usefixtures("unchecked")
def test_extreme_uniforms_choose_kept_tokens() -> None:
    class Constant:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]] * 2)
    sampling = Sampling(do_sample=True, top_k=3)
    assert sampling.choose(logits, [Constant(0.0), Constant(np.nextafter(1.0, 0.0))]).tolist() == [1, 3]  # type: ignore[list-item]


rows_strategy = st.lists(st.binary(max_size=6), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(rows_strategy, st.integers(0, 2**63), st.randoms())
def test_a_rows_seed_depends_on_it_alone(rows: list[bytes], seed: int, random: Any) -> None:
    together = row_seeds(seed, rows)
    assert len(set(together)) == len(rows)  # copies differ too
    for row, got in zip(rows, together, strict=True):
        if rows.count(row) == 1:
            assert row_seeds(seed, [row]) == [got]
    shuffled = rows[:]
    random.shuffle(shuffled)
    assert sorted(row_seeds(seed, shuffled)) == sorted(together)
    assert not set(row_seeds(seed + 1, rows)) & set(together)


def test_no_seed_is_a_fresh_one() -> None:
    assert row_seeds(None, [b"a"]) != row_seeds(None, [b"a"])
