"""Streams and log-probabilities are what `generate` gives, token by token, in every way to generate. Rows that end
are not evaluated, and a caller's modes stay."""

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.generation import Generated, Step
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig, MambaFormerConfig

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

fast = pytest.mark.usefixtures("unchecked")
VOCAB = 7
KINDS: dict[str, dict[str, Any]] = {
    "full": {"n_pairs": 1},
    "window": {"n_pairs": 1, "attention_window": 3},
    "rotary": {"blocks": ("attention", "feed_forward"), "positions": "rotary"},
}


@pytest.fixture(scope="module")
def models() -> dict[str, "MambaFormerForCausalLM"]:
    """Of few tokens, so that rows end early."""
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

    made = {}
    for kind, sizes in KINDS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = MambaFormerConfig(d_model=16, n_heads=2, n_kv_heads=1, d_state=4, head_dim=8, **sizes)
            model = MambaFormerForCausalLM(LanguageModelConfig(backbone=backbone, vocab_size=VOCAB))
            with torch.no_grad():
                model.embedding.weight.mul_(30)
                for parameter in model.blocks.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        made[kind] = model.double().eval()
    return made


def padded(prompts: list[list[int]], left: float) -> tuple[Tensor, Tensor]:
    """``left`` is the share of the padding that comes first."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        first = int(left * (width - len(prompt)))
        place = slice(first, first + len(prompt))
        ids[b, place], mask[b, place] = torch.tensor(prompt), 1
    return ids, mask


def scales_of(model: "MambaFormerForCausalLM", *lead: int) -> Adaptation:
    draw = torch.Generator().manual_seed(0)
    return Adaptation(
        {name: 1 + 0.5 * torch.randn(*lead, rank, generator=draw).double() for name, rank in model.adaptable().items()}
    )


def same(a: Generated, b: Generated) -> bool:
    return (
        torch.equal(a.ids, b.ids)
        and torch.equal(a.lengths, b.lengths)
        and torch.allclose(a.log_probabilities, b.log_probabilities, rtol=0, atol=1e-10)
    )


tokens = st.integers(0, VOCAB - 1)
endings = st.fixed_dictionaries(
    {},
    optional={
        "eos_token_id": tokens | st.lists(tokens, max_size=3),
        "min_new_tokens": st.integers(0, 2),
        "stop_sequences": st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=3),
    },
)
ways = st.one_of(
    st.fixed_dictionaries({}, optional={"repetition_penalty": st.floats(0.5, 3)}),
    st.fixed_dictionaries(
        {"num_beams": st.integers(2, 4), "length_penalty": st.sampled_from([-1.0, 1.0])},
        optional={"repetition_penalty": st.floats(0.5, 3)},
    ),
    st.fixed_dictionaries(
        {"do_sample": st.just(True), "seed": st.integers(0, 99)},
        optional={
            "temperature": st.floats(0.5, 5),
            "top_k": st.integers(1, VOCAB),
            "top_p": st.floats(0.1, 1),
            "min_p": st.floats(0, 0.9),
            "repetition_penalty": st.floats(0.5, 3),
        },
    ),
)


@fast
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(2, 7),
    ways,
    endings,
    st.sampled_from(["none", "shared", "per row"]),
)
def test_every_way_agrees(
    models: dict[str, "MambaFormerForCausalLM"],
    kind: str,
    prompts: list[list[int]],
    left: float,
    length: int,
    way: dict[str, Any],
    ending: dict[str, Any],
    scales: str,
) -> None:
    """Cached = uncached = one by one = streamed, whatever the options; rows end where they should."""
    model = models[kind]
    adaptation = {"none": None, "shared": scales_of(model), "per row": scales_of(model, len(prompts))}[scales]
    ids, mask = padded(prompts, left)
    options = {"max_new_tokens": length, **way, **ending}
    given = {"attention_mask": mask, "adaptation": adaptation, **options}
    result = model.generate_with_log_probabilities(ids, **given)
    assert same(result, model.generate_with_log_probabilities(ids, **given, use_cache=False))
    assert torch.equal(result.ids, model.generate(ids, **given))
    assert result.ids.shape[1] == int(result.lengths.max())
    if "num_beams" not in way:
        assert same(result, gathered(list(model.stream(ids, **given))))
    stops, least = [tuple(stop) for stop in ending.get("stop_sequences", [])], ending.get("min_new_tokens", 0)
    eos = ending.get("eos_token_id", [])
    eos = [eos] if isinstance(eos, int) else eos
    for b, (prompt, n) in enumerate(zip(prompts, result.lengths.tolist(), strict=True)):
        own = None if adaptation is None else adaptation.select([b])
        new = result.ids[b, :n].tolist()
        if prompts.count(prompt) == 1:  # copies draw differently
            alone = model.generate_with_log_probabilities(torch.tensor([prompt]), adaptation=own, **options)
            assert alone.ids[0].tolist() == new
        ended = [
            new[t - 1] in eos or (t >= least and any(tuple(new[:t][-len(stop) :]) == stop for stop in stops))
            for t in range(1, n + 1)
        ]
        assert not set(new[:least]) & set(eos)
        assert not any(ended[:-1])
        assert ended[-1] or n == length
        assert (result.ids[b, n:] == [*eos, -1][0]).all()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new]), adaptation=own).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0]
        assert torch.allclose(result.log_probabilities[b, :n], expected, rtol=0, atol=1e-10)
        assert (result.log_probabilities[b, n:] == 0).all()
        if "num_beams" not in way and "do_sample" not in way:
            assert new == plain_greedy(model, prompt, n, way.get("repetition_penalty", 1.0), own, eos, least)


def gathered(steps: list[Step]) -> Generated:
    ids, scores, finished = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    lengths = [row.index(True) + 1 if True in row else len(row) for row in finished.tolist()]
    assert all(row == sorted(row) for row in finished.tolist())  # what has ended stays so
    return Generated(ids, scores, torch.tensor(lengths))


@torch.no_grad()
def plain_greedy(
    model: "MambaFormerForCausalLM",
    prompt: list[int],
    length: int,
    penalty: float,
    adaptation: Adaptation | None,
    eos: list[int],
    least: int,
) -> list[int]:
    row = list(prompt)
    for made in range(length):
        logits = model(torch.tensor([row]), adaptation=adaptation).logits[0, -1]
        for token in set(row):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        if made < least:
            logits[eos] = -torch.inf
        row.append(int(logits.argmax()))
    return row[len(prompt) :]


class Evaluated:
    """(rows, tokens) that a model's embedding was given, call by call."""

    def __init__(self, model: "MambaFormerForCausalLM") -> None:
        self.shapes: list[tuple[int, int]] = []
        self.handle = model.embedding.register_forward_hook(
            lambda module, given, out: self.shapes.append((out.shape[0], out.shape[1]))
        )

    def __enter__(self) -> "Evaluated":
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


PROMPTS = [[1, 2, 3, 4], [5], [6, 2], [3, 3], [0, 4, 1]]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_rows_that_end_are_not_evaluated(
    models: dict[str, "MambaFormerForCausalLM"], use_cache: bool, call: str
) -> None:
    model = models["full"]
    ids, mask = padded(PROMPTS, True)
    options = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": 4}
    options |= {"do_sample": True, "seed": 0, "temperature": 3.0}
    lengths = model.generate_with_log_probabilities(ids, **options).lengths.tolist()
    assert len(set(lengths)) > 2
    with Evaluated(model) as evaluated:
        result = getattr(model, call)(ids, **options, use_cache=use_cache)
        list(result)
    assert [rows for rows, _ in evaluated.shapes] == [sum(n > t for n in lengths) for t in range(max(lengths))]
    if use_cache:
        assert {tokens for _, tokens in evaluated.shapes[1:]} == {1}


def test_tokens_come_as_they_are_made(models: dict[str, "MambaFormerForCausalLM"]) -> None:
    model = models["full"]
    with Evaluated(model) as evaluated:
        stream = model.stream(torch.tensor([[1, 2, 3]]), max_new_tokens=9)
        assert evaluated.shapes == []
        next(stream)
        assert evaluated.shapes == [(1, 3)]
        next(stream)
        assert evaluated.shapes == [(1, 3), (1, 1)]
        rest = list(stream)
    assert len(rest) == 7
    assert len(evaluated.shapes) == 9  # nothing is evaluated after the last token


def test_a_stream_leaves_the_callers_modes_alone(models: dict[str, "MambaFormerForCausalLM"]) -> None:
    model = models["full"]
    ids = torch.tensor([[1, 2, 3]])
    for step in itertools.islice(model.stream(ids, max_new_tokens=5, repetition_penalty=1.5), 3):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        model(step.tokens[:, None]).logits.sum().backward()  # saves the tokens
        assert model.embedding.weight.grad is not None
        model.zero_grad()
        for value in step:
            value.add_(1) if value.dtype != torch.bool else value.logical_not_()
    expected = model.generate(ids, max_new_tokens=5, repetition_penalty=1.5)
    changed = [step.tokens.clone() for step in model.stream(ids, max_new_tokens=5, repetition_penalty=1.5)]
    assert torch.equal(torch.stack(changed, 1), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_results_may_be_trained_on(models: dict[str, "MambaFormerForCausalLM"], beams: int) -> None:
    model, ids = models["full"], torch.tensor([[1, 2, 3], [4, 5, 6]])
    result = model.generate_with_log_probabilities(ids, max_new_tokens=4, num_beams=beams)
    for new in (result.ids, model.generate(ids, max_new_tokens=4, num_beams=beams)):
        logits = model(torch.cat([ids, new], 1)).logits
        (logits.mean() * result.log_probabilities.mean() * result.lengths.sum()).backward()
        new[0, 0] = 0
    model.zero_grad()
