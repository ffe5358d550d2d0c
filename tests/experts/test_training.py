"""Training an expert moves its scales, or low-rank updates, alone and lowers the loss of its domain; the best are kept
and the seed decides. Which matrices are adapted is a choice, and those that are not there are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import CONVENTIONS
from bayes_dispatch.experts.domains.own import OwnText
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.objectives import Judgement, Likelihood, Objective, Reinforce
from bayes_dispatch.experts.provenance import provenance
from bayes_dispatch.experts.training import EarlyStopping, ExpertSettings, Kind, train_expert
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.pretraining.run import next_token_loss, pack_rows, schedule
from bayes_dispatch.model.tokenizer import ByteTokenizer
from tests.tiny import tiny_backbone, tiny_model

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

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


@pytest.mark.parametrize("objective", [Likelihood(), Reinforce(samples=2, answer_bytes=4)])
def test_documents_are_cut_to_what_the_model_can_read(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, objective: Objective
) -> None:
    model, read, longest = make_model(seed=2), list[int](), 24
    settings = ExpertSettings(steps=1, batch_size=2, length=96, objective=objective)
    opened, scored = type(model).open, type(model).score
    monkeypatch.setattr(type(model), "longest", longest)
    monkeypatch.setattr(type(model), "open", lambda own, *a, **b: (read.append(a[1]), opened(own, *a, **b))[1])
    monkeypatch.setattr(type(model), "score", lambda own, ids, *a: (read.append(ids.shape[1]), scored(own, ids, *a))[1])
    train_expert(model, SORT, settings, progress=False)
    assert longest // 2 < max(read) <= longest
    with pytest.raises(ConfigError, match="answers of fewer tokens than the 24 that the model can read, got 31"):
        train_expert(model, SORT, replace(settings, objective=Reinforce(samples=2, answer_bytes=30)), progress=False)


def test_a_loss_that_is_no_number_ends_it_with_the_best_so_far(
    base: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any it is an error, which names step and rate."""
    settings = ExpertSettings(steps=4, batch_size=4, length=16, learning_rate=0.01)
    judge, losses, lost = Likelihood.judge, [0], 3

    def failing(*given: Any) -> Judgement:
        judged = judge(*given)
        losses[0] += judged.loss.requires_grad
        return judged._replace(loss=judged.loss * torch.nan) if losses[0] >= lost else judged

    monkeypatch.setattr(Likelihood, "judge", failing)
    with pytest.raises(ConfigError, match=r"^expected a learning rate at .* finite, got 0\.01: nan at step 2$"):
        train_expert(base, SORT, settings, progress=False)
    losses[0] = 0
    stopping = EarlyStopping(every=1, documents=2)
    found = train_expert(base, SORT, replace(settings, stopping=stopping), progress=False)
    assert (found.metadata["steps"], found.metadata["best_step"]) == ("2", "2")
    losses[0], lost = 0, 1
    with pytest.raises(ConfigError, match="at step 0"):
        train_expert(base, SORT, replace(settings, stopping=stopping), progress=False)


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


class TestEarlyStopping:
    """With an objective whose score is told beforehand, and whose gradient moves all scales at each step."""

    class Scripted:
        def __init__(self, *scores: float) -> None:
            self.scores = list(scores)
            self.checks: list[torch.Tensor] = []

        def judge(
            self, model: object, adaptation: Adaptation, domain: object, documents: object, seed: int
        ) -> Judgement:
            total = torch.stack([z.sum() for z in adaptation.scales.values()]).sum()
            if not total.requires_grad:  # a check
                self.checks.append(total.clone())
                return Judgement(total, self.scores[len(self.checks) - 1])
            return Judgement(total, 0.0)

    def train(self, base: "MambaFormerForCausalLM", *scores: float, steps: int = 20) -> tuple[ExpertVector, "Scripted"]:
        objective = self.Scripted(*scores)
        stopping = EarlyStopping(every=2, patience=2, documents=1)
        settings = ExpertSettings(steps=steps, batch_size=1, length=16, objective=objective, stopping=stopping)
        return train_expert(base, SORT, settings, progress=False), objective

    def test_it_keeps_the_best(self, base: "MambaFormerForCausalLM") -> None:
        expert, objective = self.train(base, 0.1, 0.3, 0.9, 0.2, 0.8)
        assert len(objective.checks) == 5  # two without a new best are enough
        assert torch.stack([z.sum() for z in expert.scales.values()]).sum() == objective.checks[2]
        names = ("steps", "best_step", "validation", "base_validation")
        assert [expert.metadata[name] for name in names] == ["8", "4", "0.9", "0.1"]

    def test_the_base_model_may_be_the_best(self, base: "MambaFormerForCausalLM") -> None:
        expert, _ = self.train(base, 0.5, 0.4, 0.5)
        assert all(torch.equal(z, torch.ones_like(z)) for z in expert.scales.values())

    def test_the_last_scales_count(self, base: "MambaFormerForCausalLM") -> None:
        expert, objective = self.train(base, 0.1, 0.2, 0.3, 0.4, steps=5)
        assert expert.metadata["steps"] == expert.metadata["best_step"] == "5"
        assert torch.stack([z.sum() for z in expert.scales.values()]).sum() == objective.checks[3]

    def test_checks_read_documents_of_their_own(self, base: "MambaFormerForCausalLM") -> None:
        """Of the training split by default, not those of any step; and they change nothing."""
        read = []

        class Watched:
            name = "sort"

            def document(self, rng: np.random.Generator, prompt_bytes: int, total_bytes: int, split: str) -> Document:
                document = SORT.document(rng, prompt_bytes, total_bytes, split)  # type: ignore[arg-type]
                read.append((split, document.text))
                return document

        settings = ExpertSettings(steps=4, batch_size=2, length=32, stopping=EarlyStopping(every=2, documents=3))
        stopped = train_expert(base, Watched(), settings, progress=False)
        assert {split for split, _ in read} == {"train"}
        checks = [{text for _, text in read[start : start + 3]} for start in (0, 7, 14)]
        assert checks[0] == checks[1] == checks[2]
        assert not checks[0] & {text for _, text in (*read[3:7], *read[10:14])}
        read.clear()
        plain = train_expert(base, Watched(), replace(settings, stopping=None), progress=False)
        assert stopped.metadata["best_step"] == "4"
        assert all(torch.equal(plain.scales[name], z) for name, z in stopped.scales.items())
        held_out = replace(settings, stopping=EarlyStopping(documents=3, split="held_out"))
        read.clear()
        train_expert(base, Watched(), held_out, progress=False)
        assert [split for split, _ in read] == ["held_out"] * 3 + ["train"] * 8 + ["held_out"] * 3


def test_the_shipped_recipe_is_this_loop(base: "MambaFormerForCausalLM") -> None:
    """Bit for bit: Adam on all bytes, questions at half weight, documents by seed, step and row."""
    expert = train_expert(base, SORT, ExpertSettings(steps=12, batch_size=2, length=32, seed=4), progress=False)
    scales = {name: torch.ones(rank, requires_grad=True) for name, rank in base.adaptable().items()}
    optimizer = torch.optim.Adam(scales.values(), lr=2e-2)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 2e-2 * schedule(step, 12, warmup=10, flat=0.1)
        generators = [np.random.default_rng([4, step, row]) for row in range(2)]
        documents = [SORT.document(rng, 0, 32, "train").cut(32) for rng in generators]
        ids, weights = pack_rows([(d.data, d.byte_weights(0.5)) for d in documents], ByteTokenizer())
        loss = next_token_loss(base(ids, adaptation=Adaptation(scales)).logits, ids, weights) / weights.sum()
        for z, gradient in zip(scales.values(), torch.autograd.grad(loss, list(scales.values())), strict=True):
            z.grad = gradient
        optimizer.step()
    assert all(torch.equal(z, scales[name]) for name, z in expert.scales.items())


def test_metadata_tell_the_objective(base: "MambaFormerForCausalLM") -> None:
    told = train_expert(base, SORT, ExpertSettings(steps=1, batch_size=1, length=16), progress=False).metadata
    expected = {"domain": "sort", "steps": "1", "objective": "likelihood", "question_weight": "0.5"}
    assert dict(told) == {**provenance(), **expected}
    settings = ExpertSettings(steps=1, batch_size=1, length=32, objective=Reinforce(samples=2))
    told = train_expert(base, SORT, settings, progress=False).metadata
    assert dict(told) == {
        **provenance(),
        "domain": "sort",
        "steps": "1",
        "objective": "reinforce",
        "samples": "2",
        "kl": "0.2",
        "answer_bytes": "16",
    }


ADAPTABLE = {"blocks.0.mixer.in_proj": 32, "blocks.1.mixer.qkv": 32, "blocks.1.mixer.out_proj": 8, "head": 5}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (ExpertSettings(), ADAPTABLE),
        (ExpertSettings(matrices=("qkv", "in_proj")), {"blocks.0.mixer.in_proj": 32, "blocks.1.mixer.qkv": 32}),
        (ExpertSettings(adapt_from=1, rank=10), {"blocks.1.mixer.qkv": 10, "blocks.1.mixer.out_proj": 8}),
    ],
)
def test_which_matrices_are_adapted(settings: ExpertSettings, expected: dict[str, int]) -> None:
    assert settings.adapted(ADAPTABLE) == expected


def test_what_is_adapted_on_request_alone() -> None:
    """No setting but its name brings the embedding in; it belongs to what comes before the first block."""
    embedding = {"embedding": 20}
    assert ExpertSettings().adapted(ADAPTABLE, embedding) == ADAPTABLE
    found = ExpertSettings(matrices=("qkv", "embedding"), rank=10).adapted(ADAPTABLE, embedding)
    assert found == {"blocks.1.mixer.qkv": 10, "embedding": 10}
    with pytest.raises(ConfigError, match="expected adapt_from of 0 to adapt the embedding, got 1"):
        ExpertSettings(matrices=("qkv", "embedding"), adapt_from=1).adapted(ADAPTABLE, embedding)
    with pytest.raises(ConfigError, match=r"expected kinds of matrices among .*'embedding'.*, got 'q_proj'"):
        ExpertSettings(matrices=("q_proj",)).adapted(ADAPTABLE, embedding)


def test_matrices_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"expected kinds of matrices among .*, got 'q_proj'"):
        ExpertSettings(matrices=("q_proj",)).adapted(ADAPTABLE)
    with pytest.raises(ConfigError, match="expected a matrix from block 2 on"):
        ExpertSettings(adapt_from=2).adapted(ADAPTABLE)


@pytest.mark.usefixtures("unchecked")
def test_numbers_out_of_bounds() -> None:
    for wrong in ({"adapt_from": -1}, {"rank": 0}, {"steps": 2**70}, {"steps": 1.5}, {"seed": -1}, {"seed": True}):
        with pytest.raises(ConfigError, match=f"expected {next(iter(wrong))} to be a whole number"):
            ExpertSettings(**wrong)
    with pytest.raises(ConfigError, match="expected learning_rate to be a finite number > 0, got nan"):
        ExpertSettings(learning_rate=float("nan"))


def test_a_part_is_trained_and_the_rest_stays(base: "MambaFormerForCausalLM") -> None:
    settings = ExpertSettings(steps=2, batch_size=2, length=24, adapt_from=1, rank=3)
    expert = train_expert(base, SORT, settings, progress=False)
    assert {len(z) for z in expert.scales.values()} == {3}
    assert all(int(name.split(".")[1]) >= 1 for name in expert.scales)
    assert all((z != 1).any() for z in expert.scales.values())
    bank = ExpertBank([expert])
    ids = torch.tensor([[256, 97, 98]])
    with torch.no_grad():
        one, half, none = (base(ids, adaptation=bank.blend(torch.tensor([w, 1 - w]))).logits for w in (1.0, 0.5, 0.0))
        torch.testing.assert_close(none, base(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, none)
    assert not torch.allclose(half, one)


@pytest.mark.parametrize("rank", [None, 8])
def test_the_embedding_is_trained(base: "MambaFormerForCausalLM", rank: int | None) -> None:
    """Alone it helps, its weight stays, and what it learnt is a bank's, on disk too."""
    settings = replace(SETTINGS, matrices=("embedding",), rank=rank)
    before = base.fingerprint()
    expert = train_expert(base, SORT, settings, progress=False)
    assert expert.matrices == {"embedding": rank or 32}
    assert base.fingerprint() == before
    assert held_out_loss(base, expert) < held_out_loss(base, None) - 0.2


def test_it_lowers_the_training_loss_together_with_the_blocks(
    base: "MambaFormerForCausalLM", expert: ExpertVector
) -> None:
    kinds = ("in_proj", "out_proj", "qkv")
    documents = [SORT.document(np.random.default_rng([0, 0, row]), 0, 48, "train").cut(48) for row in range(20)]
    ids, weights = pack_rows([(d.data, d.byte_weights(0.5)) for d in documents], ByteTokenizer())
    both = train_expert(base, SORT, replace(SETTINGS, matrices=(*kinds, "embedding")), progress=False)
    same = train_expert(base, SORT, replace(SETTINGS, matrices=kinds), progress=False)
    assert all(torch.equal(z, expert.scales[name]) for name, z in same.scales.items())
    assert list(both.matrices) == [*expert.matrices, "embedding"]
    with torch.no_grad():
        losses = [
            float(next_token_loss(base(ids, adaptation=each.adaptation()).logits, ids, weights))
            for each in (both, same)
        ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("kind", ["x_proj", "dt_proj"])
def test_projections_of_mamba1_are_a_choice(make_model: MakeModel, kind: str) -> None:
    model = make_model(MambaFormerConfig(d_model=32, n_pairs=1, n_heads=2, mixer="mamba1", chunk_size=8), seed=2)
    expert = train_expert(model, SORT, replace(SETTINGS, steps=12, matrices=(kind,)), progress=False)
    ranks = {name: rank for name, rank in model.adaptable().items() if name.endswith(kind)}
    assert expert.matrices == ranks
    assert list(ranks) == [f"blocks.0.mixer.{kind}", f"blocks.2.mixer.{kind}"]
    assert held_out_loss(model, expert) < held_out_loss(model, None)


OWN_TEXT = "".join(f"Of {number} things, none is like another.\n" for number in range(60))
OWN = OwnText("own", OWN_TEXT)
TINY = ExpertSettings(steps=12, batch_size=4, length=48, stopping=EarlyStopping(every=6, documents=8, split="held_out"))
LORA = replace(TINY, kind="lora", rank=4, alpha=8.0, learning_rate=1e-2)


@pytest.mark.parametrize(("settings", "dtype"), [(TINY, torch.bfloat16), (LORA, torch.float32)], ids=["svf", "lora"])
def test_on_any_backbone(settings: ExpertSettings, dtype: torch.dtype) -> None:
    """The base stays as it was; blocks run again in the backward pass, or not, and it is the same in the end."""
    backbone = tiny_backbone(dtype=dtype)
    before = backbone.fingerprint()
    expert = train_expert(backbone, OWN, settings, progress=False)
    told = expert.metadata
    assert float(told["validation"]) > float(told["base_validation"]) + 0.1
    assert expert.base == before == tiny_backbone(dtype=dtype).fingerprint()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backbone.model.parameters())
    assert list(expert.matrices) == list(backbone.adaptable())
    again = train_expert(backbone, OWN, replace(settings, checkpointing=True), progress=False)
    assert again.metadata == told
    assert not any(module.training for module in backbone.model.modules())
    with torch.no_grad():
        ids = torch.tensor([[1, 40, 50, 60]])
        own, other = (backbone.score(ids, adaptation=each.adaptation())[:, 1:] for each in (expert, again))
        assert torch.equal(own, other)
        assert not torch.equal(own, backbone.score(ids)[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("settings", [TINY, LORA], ids=["svf", "lora"])
def test_in_any_precision(make_model: MakeModel, settings: ExpertSettings, dtype: torch.dtype) -> None:
    expert = train_expert(make_model(seed=2, dtype=dtype), SORT, settings, progress=False)
    assert float(expert.metadata["validation"]) > float(expert.metadata["base_validation"]) + 0.1
    adapted = expert.adaptation()
    numbers = [*adapted.scales.values(), *(each for delta in adapted.deltas.values() for each in delta)]
    assert {each.dtype for each in numbers} == {torch.float32}


def test_a_name_that_no_expert_can_have_is_refused_at_once(base: "MambaFormerForCausalLM") -> None:
    class Unread(OwnText):
        def document(self, *_: object) -> Document:  # type: ignore[override]
            raise AssertionError("expected no training")

    with pytest.raises(ConfigError, match=r"expected an expert name of letters, .* got 'de both ways'"):
        train_expert(base, Unread("de both ways", OWN_TEXT), TINY, progress=False)


def test_blocks_run_again_under_checkpointing() -> None:
    """Twice in a step, and their inner values are not kept meanwhile."""
    backbone, calls = tiny_backbone(), []
    projection = backbone.model.model.layers[1].mlp.up_proj
    handle = projection.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    settings = replace(LORA, steps=1, stopping=None)
    counts = []
    for checkpointing in (False, True):
        calls.clear()
        train_expert(backbone, OWN, replace(settings, checkpointing=checkpointing), progress=False)
        counts.append(len(calls))
    handle.remove()
    assert counts == [1, 2]


def test_a_lora_expert_is_an_adapter_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    backbone = tiny_backbone()
    settings = replace(LORA, matrices=("q_proj", "v_proj"), adapt_from=2)
    expert = train_expert(backbone, OWN, settings, progress=False)
    assert isinstance(expert, LoraExpert)
    layers = [f"model.layers.{block}.self_attn.{kind}" for block in (2, 3) for kind in ("q_proj", "v_proj")]
    assert expert.matrices == dict.fromkeys(layers, 4)
    assert all(up.dtype == torch.float32 and bool(up.any()) for _, up in expert.factors.values())
    ExpertBank([expert]).export([1.0, 0.0], tmp_path / "own", backbone)
    ids = torch.tensor([[1, 20, 70, 33, 90, 101, 55]])
    with torch.no_grad():
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / "own", autocast_adapter_dtype=False).eval()
        expected = model(input_ids=ids).logits.log_softmax(-1)
        found = backbone.open(1, 7, expert.adaptation()).read(ids, tail=7).after
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(found, tiny_model()(input_ids=ids).logits.log_softmax(-1), atol=1e-3)


def test_factors_begin_as_those_of_peft() -> None:
    """No update at all, from ``down`` of the spread that PEFT's layers begin with; the seed decides."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(tiny_model(dtype=torch.float32), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    bounds = {"q_proj": 32**-0.5, "down_proj": 64**-0.5}
    downs = {name: each.detach() for name, each in theirs.named_parameters() if "lora_A" in name}
    still = replace(LORA, steps=1, learning_rate=1e-12, stopping=None, matrices=tuple(bounds))
    ours = {seed: train_expert(tiny_backbone(), OWN, replace(still, seed=seed), progress=False) for seed in (0, 1)}
    for kind, bound in bounds.items():
        for seed in (0, 1):
            factors = ours[seed].factors[f"model.layers.0.{'mlp' if kind == 'down_proj' else 'self_attn'}.{kind}"]
            assert float(factors[1].abs().max()) < 1e-11
            assert 0.9 * bound < float(factors[0].abs().max()) <= bound + 1e-6
        assert all(0.9 * bound < float(each.abs().max()) <= bound for name, each in downs.items() if kind in name)
    first, second = (torch.cat([down.flatten() for down, _ in each.factors.values()]) for each in ours.values())
    assert not torch.allclose(first, second)


def test_decay_keeps_updates_small() -> None:
    backbone, settings = tiny_backbone(dtype=torch.float32), replace(LORA, stopping=None)
    experts = [train_expert(backbone, OWN, replace(settings, decay=decay), progress=False) for decay in (0.0, 1.0)]
    sizes = [sum(float((up @ down).square().sum()) for down, up in each.factors.values()) for each in experts]
    assert sizes[1] < sizes[0] / 4


def test_outside_the_blocks_on_request_alone() -> None:
    backbone = tiny_backbone(dtype=torch.float32)
    settings = replace(TINY, matrices=("lm_head",))
    assert train_expert(backbone, OWN, settings, progress=False).matrices == {"lm_head": 32}
    with pytest.raises(ConfigError, match="expected adapt_from of 0 to adapt the lm_head, got 1"):
        train_expert(backbone, OWN, replace(settings, adapt_from=1), progress=False)


@pytest.mark.usefixtures("unchecked")
def test_what_a_model_or_an_objective_cannot(base: "MambaFormerForCausalLM") -> None:
    with pytest.raises(ConfigError, match=r"^expected a transformers model to checkpoint, got a MambaFormer"):
        train_expert(base, SORT, ExpertSettings(checkpointing=True))
    for wrong, told in (
        ({"checkpointing": True, "objective": Reinforce()}, "checkpointing with the objective likelihood alone"),
        ({"alpha": 4}, "alpha with the kind lora alone, got 4"),
        ({"kind": "lora", "alpha": 0}, "alpha to be a finite number > 0, got 0"),
        ({"kind": "dora"}, "a kind of svf or lora, got 'dora'"),
        ({"objective": "likelihood"}, r"an objective, such as Likelihood\(\), got 'likelihood'"),
        ({"objective": Reinforce}, r"an objective, such as Likelihood\(\), got <class"),
        ({"stopping": True}, r"stopping as EarlyStopping\(\), or None, got True"),
    ):
        with pytest.raises(ConfigError, match=f"^expected {told}"):
            ExpertSettings(**wrong)
    with pytest.raises(ConfigError, match=r"^expected a split of train or held_out, got 'test'"):
        EarlyStopping(split="test")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["svf", "lora"])
def test_matrices_that_the_model_has_not(base: "MambaFormerForCausalLM", kind: Kind) -> None:
    for matrices, got in (({}, "none"), ({"blocks.0.mixer.in_proj": 2, "blocks.9.mixer.in_proj": 2}, "blocks.9.mixer")):
        with pytest.raises(ConfigError, match=f"^expected matrices of the model to adapt, got {got}"):
            train_expert(base, SORT, ExpertSettings(kind=kind), progress=False, matrices=matrices)
