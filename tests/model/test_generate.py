"""Generation is the same with and without a cache, in a batch and one by one; greedy takes the best logit, seeds
decide, rows end with end tokens or stop sequences. Padding counts for nothing, and bad arguments are refused."""

import itertools
import pydoc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.generation.settings import GenerationOptions
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]

fast = pytest.mark.usefixtures("unchecked")  # the other tests here check the shapes
PROMPTS = [[256, 1, 2, 3, 4, 5, 6, 7, 8], [256, 90], [256, 7, 7, 20]]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The prompts in one batch, padded left or right."""
    width = max(map(len, PROMPTS))
    ids, mask = torch.full((len(PROMPTS), width), 257), torch.zeros(len(PROMPTS), width, dtype=torch.long)
    for b, prompt in enumerate(PROMPTS):
        left = width - len(prompt) if side == "left" else 0
        ids[b, left : left + len(prompt)] = torch.tensor(prompt)
        mask[b, left : left + len(prompt)] = 1
    return ids, mask


def rows_of(model: "MambaFormerForCausalLM", *lead: int) -> Adaptation:
    draw = torch.Generator().manual_seed(0)
    return Adaptation(
        {n: (1 + 0.5 * torch.randn(*lead, r, generator=draw)).to(model.dtype) for n, r in model.adaptable().items()}
    )


@pytest.fixture(scope="module", params=["full attention", "window"])
def generator(request: pytest.FixtureRequest, make_model: MakeModel) -> "MambaFormerForCausalLM":
    window = 4 if request.param == "window" else None
    config = MambaFormerConfig(
        d_model=16, n_pairs=1, n_heads=2, n_kv_heads=1, d_state=4, head_dim=8, attention_window=window
    )
    return make_model(config, dtype=torch.float64)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}])
def test_the_narrowest_sampling_is_greedy(generator: "MambaFormerForCausalLM", narrow: dict[str, Any]) -> None:
    ids, mask = padded("right")
    greedy = generator.generate(ids, attention_mask=mask, max_new_tokens=10)
    sampled = generator.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=True, seed=5, **narrow)
    assert torch.equal(greedy, sampled)


@fast
def test_an_end_token_changes_nothing_before_it(generator: "MambaFormerForCausalLM") -> None:
    ids, mask = padded("left")
    given: dict[str, Any] = {"max_new_tokens": 10, "do_sample": True, "seed": 3}
    free = generator.generate(ids, attention_mask=mask, **given)
    eos = int(free[1, 4])
    ended = generator.generate(ids, attention_mask=mask, eos_token_id=eos, **given)
    lengths = []
    for b in range(3):
        at = (free[b] == eos).nonzero()
        lengths.append(int(at[0]) + 1 if len(at) else 10)
        assert torch.equal(ended[b, : lengths[b]], free[b, : lengths[b]])
        assert (ended[b, lengths[b] :] == eos).all()
    assert lengths[1] <= 5
    assert ended.shape[1] == max(lengths)  # and no longer than the longest row needs


def test_seeds(generator: "MambaFormerForCausalLM") -> None:
    ids = torch.tensor(PROMPTS[:1])

    def sample(seed: int | None) -> list[int]:
        return generator.generate(ids, max_new_tokens=12, do_sample=True, temperature=3.0, seed=seed)[0].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_copies_of_a_prompt_differ_when_sampled_only(generator: "MambaFormerForCausalLM") -> None:
    ids = torch.tensor([PROMPTS[0]] * 3)
    greedy = generator.generate(ids, max_new_tokens=12)
    assert torch.equal(greedy, greedy[:1].expand(3, -1))
    sampled = generator.generate(ids, max_new_tokens=12, do_sample=True, temperature=3.0, seed=0)
    assert len({tuple(row.tolist()) for row in sampled}) == 3
    alone = generator.generate(ids[:1], max_new_tokens=12, do_sample=True, temperature=3.0, seed=0)
    assert torch.equal(alone[0], sampled[0])


def test_short_integers_are_the_same_prompt(generator: "MambaFormerForCausalLM") -> None:
    ids = torch.tensor(PROMPTS[:1])
    long, short = (generator.generate(i, max_new_tokens=5, do_sample=True, seed=0) for i in (ids, ids.int()))
    assert torch.equal(long, short)


def test_the_prompt_is_left_alone(generator: "MambaFormerForCausalLM") -> None:
    ids, mask = padded("left")
    generator.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip((ids, mask), padded("left"), strict=True))


def test_padding_counts_as_no_token(generator: "MambaFormerForCausalLM") -> None:
    """Nor is it penalised as one that came before."""
    ids, mask = padded("left")
    given = {"attention_mask": mask, "max_new_tokens": 4, "repetition_penalty": 1.2}
    expected = generator.generate(ids, **given)
    for token in expected[1].tolist():
        assert torch.equal(generator.generate(torch.where(mask.bool(), ids, token), **given), expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_memory_is_for_what_is_written(generator: "MambaFormerForCausalLM", use_cache: bool, beams: int) -> None:
    """Not for all that may be."""
    ids, mask = padded("left")
    given = {"attention_mask": mask, "use_cache": use_cache, "num_beams": beams, "eos_token_id": range(258)}
    assert generator.generate(ids, max_new_tokens=10**12, **given).shape == (3, 1)


@fast
@pytest.mark.parametrize("beams", [1, 2])
def test_a_long_text_is_the_same_without_a_cache(generator: "MambaFormerForCausalLM", beams: int) -> None:
    """Longer than a cache has room for at first, and more than twice."""
    ids, mask = padded("left")
    given = {"attention_mask": mask, "max_new_tokens": 160, "num_beams": beams, "repetition_penalty": 1.5}
    cached = generator.generate(ids, **given)
    assert len(cached.unique()) > 50
    assert torch.equal(cached, generator.generate(ids, use_cache=False, **given))


# Stop sequences


def first_end(new: list[int], stop: list[int]) -> int:
    """Tokens of ``new`` up to the first ``stop`` and with it."""
    return next((t for t in range(len(stop), len(new) + 1) if new[t - len(stop) : t] == stop), len(new))


@fast
def test_a_row_ends_after_a_stop_sequence(generator: "MambaFormerForCausalLM") -> None:
    ids = torch.tensor(PROMPTS[:1])
    new = generator.generate(ids, max_new_tokens=8)[0].tolist()
    assert len(set(new)) > 2
    for first, width in itertools.product((0, 2, 5), (1, 2, 3)):
        stop = new[first : first + width]
        for stops in ([stop], [[*stop, 0, 0, 0], stop]):
            result = generator.generate(ids, max_new_tokens=8, stop_sequences=stops)
            assert result[0].tolist() == new[: first_end(new, stop)]
    as_bytes = generator.generate(ids, max_new_tokens=2, stop_sequences=[b"ab"])
    assert as_bytes[0].tolist() == new[:2]


def test_a_stop_sequence_that_begins_in_the_prompt_is_none(generator: "MambaFormerForCausalLM") -> None:
    ids = torch.tensor(PROMPTS[:1])
    new = generator.generate(ids, max_new_tokens=8)[0].tolist()
    for stop in ([PROMPTS[0][-1], new[0]], PROMPTS[0][-2:], [*PROMPTS[0], *new[:2]]):
        assert first_end(new, stop) == 8
        assert generator.generate(ids, max_new_tokens=8, stop_sequences=[stop])[0].tolist() == new
    beams = generator.generate(ids, max_new_tokens=8, num_beams=3)
    stop = [PROMPTS[0][-1], int(beams[0, 0])]
    assert torch.equal(generator.generate(ids, max_new_tokens=8, num_beams=3, stop_sequences=[stop]), beams)


def test_what_fills_a_row_that_has_ended(generator: "MambaFormerForCausalLM") -> None:
    ids, mask = padded("left")
    free = generator.generate(ids, attention_mask=mask, max_new_tokens=6)
    unused = next(token for token in range(258) if token not in free)
    stop = free[0, :3].tolist()
    assert first_end(free[1].tolist(), stop) == 6
    for options, fill in (({}, -1), ({"eos_token_id": unused}, unused)):
        result = generator.generate(ids, attention_mask=mask, max_new_tokens=6, stop_sequences=[stop], **options)
        assert result.shape == (3, 6)
        assert result[0].tolist() == [*stop, *[fill] * 3]
        assert fill != -1 or generator.tokenizer.decode(result[0]) == generator.tokenizer.decode(stop)


@pytest.mark.usefixtures("unchecked")
def test_tokens_may_come_in_tensors(model: "MambaFormerForCausalLM") -> None:
    ids = torch.tensor([[1, 2, 3]])
    free = model.generate(ids, max_new_tokens=4)[0].tolist()
    for one, listed in ((torch.tensor(free[1]), free[1]), (torch.tensor(free[1:3]), free[1:3])):
        expected = model.generate(ids, max_new_tokens=4, eos_token_id=listed)
        assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=one), expected)  # type: ignore[arg-type]
    stops: Any = torch.tensor([free[:2], free[1:3]])
    expected = model.generate(ids, max_new_tokens=4, stop_sequences=stops.tolist())
    assert torch.equal(model.generate(ids, max_new_tokens=4, stop_sequences=stops), expected)


# Errors


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens to be a whole number ≥ 1, got 0"),
        ({"max_new_tokens": 1.5}, ConfigError, "max_new_tokens to be a whole number ≥ 1, got 1.5"),
        ({"do_sample": "no"}, ConfigError, "do_sample to be true or false, got 'no'"),
        ({"temperature": 0.0}, ConfigError, "temperature to be a finite number > 0, got 0.0"),
        ({"temperature": float("nan")}, ConfigError, "temperature to be a finite number > 0, got nan"),
        ({"top_k": 0}, ConfigError, "top_k to be a whole number ≥ 1, got 0"),
        ({"top_p": 0.0}, ConfigError, "top_p to be a finite number > 0 and ≤ 1, got 0.0"),
        ({"top_p": 1.5}, ConfigError, "top_p to be a finite number > 0 and ≤ 1, got 1.5"),
        ({"min_p": 1.5}, ConfigError, "min_p to be a finite number ≥ 0 and ≤ 1, got 1.5"),
        ({"repetition_penalty": 1e-40}, ConfigError, "repetition_penalty to be a finite number ≥ 0.01 and ≤ 100, got"),
        (
            {"repetition_penalty": float("inf")},
            ConfigError,
            "repetition_penalty to be a finite number ≥ 0.01 and ≤ 100",
        ),
        ({"eos_token_id": 258}, ConfigError, "tokens in 0 … 257, got 258"),
        ({"eos_token_id": [3, -1]}, ConfigError, "each token of eos_token_id to be a whole number ≥ 0, got -1"),
        ({"eos_token_id": 1.5}, ConfigError, "each token of eos_token_id to be a whole number ≥ 0, got 1.5"),
        ({"eos_token_id": range(258), "min_new_tokens": 1}, ConfigError, "a token that ends no row"),
        ({"min_new_tokens": 3}, ConfigError, "min_new_tokens to be a whole number from 0 to 2, got 3"),
        ({"seed": -1}, ConfigError, "seed to be a whole number"),
        ({"stop_sequences": [[1, 999]]}, ConfigError, "tokens in 0 … 257, got 999"),
        ({"stop_sequences": [[1], []]}, ConfigError, "at least one token in each stop sequence"),
        ({"stop_sequences": [1, 2]}, ConfigError, r"stop_sequences to be token ids, got 1"),
        ({"stop_sequences": ["ab"]}, ConfigError, "stop_sequences to be token ids, got 'ab'"),
        ({"stop_sequences": 3}, ConfigError, "stop_sequences to be a list, got 3"),
        ({"input_ids": torch.tensor([[1, 258]])}, TensorError, "input_ids in 0 … 257, got 1 … 258"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, TensorError, r"got \(0, 3\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, TensorError, r"got \(1, 0\)"),
        ({"input_ids": torch.zeros(1, 2)}, TensorError, "integer input_ids, got torch.float32"),
        ({"attention_mask": torch.ones(2, 2)}, TensorError, r"shape \(2, 3\), got \(2, 2\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1]] * 2)}, TensorError, "a mask with holes"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, TensorError, "got a row of padding"),
        ({"adaptation": 3}, TensorError, "scales for 2 rows, got 3"),
    ],
)
@fast
def test_bad_arguments(
    model: "MambaFormerForCausalLM", bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A stream raises, too, before its first step."""
    if "adaptation" in bad:
        bad = {"adaptation": rows_of(model, bad["adaptation"])}
    options = {"input_ids": torch.tensor([[1, 2, 3]] * 2), "max_new_tokens": 2, "do_sample": True} | bad
    ids = options.pop("input_ids")
    for call in (model.generate, model.generate_with_log_probabilities, model.stream):
        with pytest.raises(error, match=message):
            call(ids, **options)


@fast
@pytest.mark.parametrize("way", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_weights_that_are_no_numbers_are_one_error(make_model: MakeModel, way: dict[str, Any]) -> None:
    broken = make_model(MambaFormerConfig.tiny())
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    for call in (broken.generate, broken.generate_with_log_probabilities):
        with pytest.raises(TensorError, match="expected logits that are numbers, got NaN"):
            call(torch.tensor([[256, 1]]), max_new_tokens=2, eos_token_id=3, **way)


@fast
@pytest.mark.parametrize("way", [{}, {"do_sample": True}, {"num_beams": 2}, {"use_cache": False}])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_later_on_are_the_same_error(
    make_model: MakeModel, way: dict[str, Any], bad: float
) -> None:
    """The prompt is read well; what comes first brings in the bad number."""
    broken, ids = make_model(MambaFormerConfig.tiny(), tie_embeddings=False), torch.tensor([[256, 1]])
    first = broken.generate(ids, max_new_tokens=1, seed=0, **way)
    others = torch.ones(broken.vocab_size, dtype=torch.bool)
    others[ids] = False
    with torch.no_grad():
        broken.embedding.weight[others] = bad
    assert torch.equal(broken.generate(ids, max_new_tokens=1, seed=0, **way), first)
    for call in (broken.generate, broken.generate_with_log_probabilities):
        with pytest.raises(TensorError, match="expected logits that are numbers, got NaN") as error:
            call(ids, max_new_tokens=3, seed=0, **way)
        assert "\n" not in str(error.value)


@fast
def test_help_names_every_option(model: "MambaFormerForCausalLM") -> None:
    text = pydoc.render_doc(model.generate)
    assert [name for name in GenerationOptions.__annotations__ if f"``{name}``" not in text] == []


@fast
def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(model: "MambaFormerForCausalLM") -> None:
    ids, one = torch.tensor([[256, 1, 2]]), np.int64(1)
    plain = {"max_new_tokens": 3, "min_new_tokens": 1, "top_k": 9, "eos_token_id": [5, 6], "seed": 1}
    given = {"max_new_tokens": 3 * one, "min_new_tokens": one, "top_k": 9 * one, "seed": one}
    for eos in (np.array([5, 6]), torch.tensor([5, 6]), (5 * one, 6 * one)):
        got = model.generate(ids, do_sample=True, eos_token_id=eos, **given)
        assert torch.equal(got, model.generate(ids, do_sample=True, **plain))
