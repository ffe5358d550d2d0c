"""The in-context benchmark: its prompts and labels are what they say, answers see nothing after their query, its
models are of one size, its numbers are repeatable."""

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import icl
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig, StateSpaceKind
from in_context.tasks import AssociativeRecall, LinearRegression, Prompts, SparseParity, Task
from in_context.training import InContextModel, Recipe, judge, train

TASKS = [SparseParity(5, 2, 24), LinearRegression(4, 12), AssociativeRecall(6, 4, 8)]
SMOKE = icl.PRESETS["smoke"]


def draw(task: Task, batch: int = 256, seed: int = 0, progress: float = 1.0) -> Prompts:
    return task.sample(batch, torch.Generator().manual_seed(seed), progress)


def test_a_parity_is_the_product_of_some_bits() -> None:
    """In every row the labels are those of one choice of two bits; over the rows, all choices occur."""
    prompts = draw(TASKS[0])
    x, y = prompts.inputs[:, ::2].numpy(), prompts.targets[..., 0].numpy()
    assert set(np.unique(x)) == {-1.0, 1.0}
    choices = list(combinations(range(5), 2))
    fits = np.array(
        [[(row[:, i] * row[:, j] == labels).all() for i, j in choices] for row, labels in zip(x, y, strict=True)]
    )
    assert fits.any(1).all()
    assert fits.any(0).all()
    assert fits.sum(1).mean() < 1.01  # 24 examples leave a second choice standing with probability 9 / 2^24


def test_the_exact_posterior_counts_the_choices_that_fit() -> None:
    task = SparseParity(5, 2, 6)
    prompts = draw(task, batch=16)
    probability = task.posterior(prompts).sigmoid()[..., 0].numpy()
    x, y = prompts.inputs[:, ::2].numpy(), prompts.targets[..., 0].numpy()
    for row in range(16):
        for n in range(6):
            fitting = [
                x[row, n, i] * x[row, n, j]
                for i, j in combinations(range(5), 2)
                if (x[row, :n, i] * x[row, :n, j] == y[row, :n]).all()
            ]
            assert probability[row, n] == pytest.approx(np.mean(np.array(fitting) > 0), abs=1e-5)


def test_least_squares_is_exact_from_as_many_examples_as_dimensions() -> None:
    """Before that, 1 − n/d of the variance is left; 4,096 prompts estimate it to ±.1 with a false alarm below 1e-3."""
    task = LinearRegression(4, 8)
    prompts = draw(task, batch=4096)
    wrong = (task.least_squares(prompts) - prompts.targets).square().mean((0, 2)).numpy()
    np.testing.assert_allclose(wrong[:4], [1, 0.75, 0.5, 0.25], atol=0.1)
    assert wrong[4:].max() < 1e-3  # some sets of four examples are nearly singular
    assert wrong[5:].max() < 1e-6
    x, y = prompts.inputs[0, ::2].numpy(), prompts.targets[0, :, 0].numpy()
    for n in (2, 7):
        w = np.linalg.lstsq(x[:n], y[:n])[0]
        assert float(task.least_squares(prompts)[0, n, 0]) == pytest.approx(float(x[n] @ w), abs=1e-4)


def test_a_recalled_value_stands_after_its_key() -> None:
    prompts = draw(TASKS[2], batch=64)
    queries = prompts.inputs[:, prompts.places]
    for row in range(64):
        context = prompts.inputs[row, :12]
        places = [int((context == query).all(-1).nonzero()) for query in queries[row]]
        assert all(place % 2 == 0 for place in places)
        assert len(set(places)) == 4
        assert torch.equal(context[[place + 1 for place in places]], prompts.targets[row])
    torch.testing.assert_close(prompts.inputs.norm(dim=-1), torch.full((64, 16), 8**0.5))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prompts_are_repeatable(task: Task) -> None:
    first, again, other = draw(task, 8, seed=1), draw(task, 8, seed=1), draw(task, 8, seed=2)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, other.inputs)
    assert first.inputs.shape[2] == task.width
    assert first.targets.shape == (8, len(first.places), task.outputs)


@pytest.mark.parametrize("task", TASKS[:2], ids=lambda task: task.name)
def test_a_label_stands_only_after_its_query(task: Task) -> None:
    """Inputs are x, then y in the first place of a vector of zeros, and the last y is nowhere."""
    prompts = draw(task)
    assert prompts.places.tolist() == list(range(0, prompts.inputs.shape[1], 2))
    labels = prompts.inputs[:, 1::2]
    assert torch.equal(labels[..., 0], prompts.targets[:, :-1, 0])
    assert not labels[..., 1:].any()
    if task.name == "regression":  # signs repeat, real numbers do not
        for query, place in enumerate(prompts.places.tolist()):
            assert not (prompts.inputs[:, : place + 1] == prompts.targets[:, query, None]).any()


@pytest.mark.parametrize("name", ["Mamba", "Transformer", "MambaFormer"])
def test_an_answer_sees_nothing_after_its_query(name: str) -> None:
    torch.manual_seed(0)
    prompts = draw(TASKS[1], 4)
    model = InContextModel(SMOKE.sizes.configs("mamba2")[name], 4, 1)
    changed = prompts.inputs.clone()
    changed[:, 9:] += 1
    before, after = model(prompts.inputs), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().min() > 1e-5


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_loss_counts_answers_to_queries_only(task: Task) -> None:
    torch.manual_seed(0)
    prompts = draw(task, 4)
    model = InContextModel(SMOKE.sizes.configs("mamba2")["MambaFormer"], task.width, task.outputs)
    outputs: list[torch.Tensor] = []
    model.read_out.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    (gradient,) = torch.autograd.grad(task.loss(model.answers(prompts), prompts), outputs)
    due = torch.zeros(prompts.inputs.shape[1], dtype=torch.bool)
    due[prompts.places] = True
    assert (gradient[:, due] != 0).all()
    assert not gradient[:, ~due].any()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_baselines_range_from_chance_to_perfect(task: Task) -> None:
    """Three standard errors, or a false alarm of .3%, around chance."""
    judged = [judge(task, answer, 2048, seed=0) for answer in task.baselines.values()]
    chance = {"parity": 0.5, "regression": 0.0, "recall": 1 / 6}[task.name]
    assert judged[0].score == pytest.approx(chance, abs=0.03)
    assert judged[0].loss == pytest.approx(np.log(2) if task.name == "parity" else 1.0, abs=0.05)
    assert judged[-1].score > 0.999
    assert sorted(judged, key=lambda judgement: -judgement.loss) == judged


@pytest.mark.parametrize("task", TASKS[:2], ids=lambda task: task.name)
def test_the_curriculum_adds_dimensions_until_half_time(task: Task) -> None:
    active = [int(draw(task, 8, progress=p).inputs[:, ::2].any(0).any(0).sum()) for p in (0, 0.2, 0.4, 0.5, 0.9)]
    assert active == sorted(active)
    assert active[0] < active[2] < active[3] == active[4] == task.width


@pytest.mark.parametrize("preset", icl.PRESETS.values(), ids=icl.PRESETS)
@pytest.mark.parametrize("mixer", get_args(StateSpaceKind))
def test_models_are_of_one_size(preset: icl.Preset, mixer: StateSpaceKind) -> None:
    for task in preset.tasks:
        with torch.device("meta"):
            models = [
                InContextModel(config, task.width, task.outputs) for config in preset.sizes.configs(mixer).values()
            ]
        counts = [model.parameter_count for model in models]
        assert max(counts) < 1.1 * min(counts)


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = Recipe(steps=100, batch=1, warmup=10)
    assert [recipe.rate_factor(step) for step in (0, 4, 9, 30, 50, 75)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5])
    assert recipe.rate_factor(99) < 1e-2


def test_a_seed_decides_a_run_and_training_learns() -> None:
    task, config = AssociativeRecall(2, 2, 4), MambaFormerConfig.tiny()
    state = torch.get_rng_state()
    first, again, other = (train(task, config, Recipe(steps=4, batch=4), 1e-3, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert first.test == again.test
    assert first.quarters == again.quarters
    assert first.test != other.test
    recipe = Recipe(steps=60, batch=16, warmup=5, judged=128)
    quarters = train(task, config, recipe, 1e-2, seed=0)[1].quarters
    assert quarters[0].loss > quarters[-1].loss
    assert quarters[-1].score > 0.7  # chance is .5 ± .03


def test_the_smoke_preset_writes_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    icl.main(preset="smoke", seeds=2, json_file=tmp_path / "icl.json")
    report = json.loads((tmp_path / "icl.json").read_text())
    printed = capsys.readouterr().out
    assert list(report["tasks"]) == ["parity", "regression", "recall"]
    for task, result in report["tasks"].items():
        assert task in printed
        assert result["baselines"]
        assert list(result["models"]) == ["Mamba", "Transformer", "MambaFormer"]
        for model in result["models"].values():
            losses = [run["loss"] for run in model["runs"]]
            assert [run["seed"] for run in model["runs"]] == [0, 1]
            assert model["loss"]["mean"] == pytest.approx(np.mean(losses))
            error = np.std(losses, ddof=1) / 2**0.5
            assert model["loss"]["se"] == pytest.approx(error)
            assert f"{model['loss']['mean']:.4f} ± {error:.4f}" in printed


def test_tuning_takes_the_rate_of_least_validation_loss(tmp_path: Path) -> None:
    icl.main(preset="smoke", tune=True, task=["recall"], model=["Transformer"], json_file=tmp_path / "icl.json")
    result = json.loads((tmp_path / "icl.json").read_text())["tasks"]["recall"]["models"]
    assert list(result) == ["Transformer"]
    tuning = result["Transformer"]["tuning"]
    assert sorted(run["rate"] for run in tuning) == sorted(icl.GRID)
    assert result["Transformer"]["rate"] == min(tuning, key=lambda run: run["quarters"][-1]["loss"])["rate"]
    assert {run["seed"] for run in tuning}.isdisjoint(run["seed"] for run in result["Transformer"]["runs"])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match=r"expected a model of Mamba, .*, got 'LSTM'"):
        icl.main(preset="smoke", model=["LSTM"])
