"""Costs of products: what they predict, when folding pays, where they are kept; and that folding changes no result."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.mambaformer.compiled import product_costs, stepping
from bayes_dispatch.model.mambaformer.compiled.product_costs import (
    ProductCosts,
    costs_file,
    machine,
    present_costs,
    read_costs,
    save_costs,
)
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

COSTS = ProductCosts(machine(), (1000, 100_000), (1e-10, 4e-10), 1e-11)


def test_between_sizes_and_beyond() -> None:
    """The time of a byte grows with the logarithm of the size, and stays as it is outside of what was measured."""
    assert COSTS.token(1000) == pytest.approx(1000 * 1e-10)
    assert COSTS.token(10_000) == pytest.approx(10_000 * 2.5e-10)
    assert COSTS.token(10) == pytest.approx(10 * 1e-10)
    assert COSTS.token(10**7) == pytest.approx(10**7 * 4e-10)


def test_what_a_token_and_a_matrix_cost() -> None:
    """Two products of rank 4 read 4 (4 + 8) numbers, W(z) has 32, and takes 4 · 8 · 4 multiplications to build."""
    even = replace(COSTS, reading=(1e-10, 1e-10))
    assert even.factored([(4, 8)], 4, 10) == pytest.approx(10 * 4 * 48 * 1e-10)
    assert even.folded([(4, 8)], 4, 10) == pytest.approx(10 * 4 * 32 * 1e-10 + 128 * 1e-11)
    assert even.folded([(4, 8)] * 2, 8, 10) == pytest.approx(2 * 10 * 8 * 32 * 1e-10 + 2 * 2 * 128 * 1e-11)


@settings(deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), min_size=1, max_size=4),
    slow=st.floats(1e-13, 1e-8),
    tokens=st.integers(1, 1000),
)
def test_once_it_pays_it_pays_for_more_tokens(shapes: list[tuple[int, int]], slow: float, tokens: int) -> None:
    """At a time per byte that does not fall with the size, W(z) is read sooner than its factors, so tokens decide."""
    costs = replace(COSTS, building=slow)
    pays = [costs.folding_pays(shapes, 4, n) for n in (tokens, 2 * tokens, 10**15)]
    assert pays == sorted(pays)
    assert pays[-1]
    assert not costs.folding_pays([], 4, tokens)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": (5, 5)}, "expected rising sizes and a time for each, got"),
        ({"sizes": ()}, "expected rising sizes"),
        ({"reading": (1e-10,)}, "expected rising sizes"),
        ({"reading": (1e-10, 0.0)}, "expected times above 0, got"),
        ({"building": float("inf")}, "expected times above 0"),
        ({"building": float("nan")}, "expected times above 0"),
    ],
)
def test_impossible_costs_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(COSTS, **changed)


def test_saved_costs_are_read(tmp_path: Path) -> None:
    save_costs(COSTS, tmp_path / "new" / "costs.json")
    assert read_costs(tmp_path / "new" / "costs.json") == COSTS
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["costs.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON in"),
        ("[]", "expected costs of products, version 1, in .* got others"),
        (json.dumps({"version": 2}), "version 1"),
        (json.dumps({"version": 1}), "got damaged ones: 'machine'|got damaged ones: 'sizes'"),
        (json.dumps({"version": 1, **asdict(COSTS), "reading": [1, "x"]}), "got damaged ones: could not convert"),
        (json.dumps({"version": 1, **asdict(COSTS), "building": -1}), "damaged ones: expected times above 0"),
        (json.dumps({"version": 1, **asdict(COSTS), "sizes": [float("inf")]}), "got damaged ones"),
        (json.dumps({"version": 1, **asdict(COSTS), "machine": "z80"}), "expected costs measured on .*, got in .* z80"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    """And where a choice needs them, a warning says why there are none."""
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=message):
        read_costs(path)
    monkeypatch.setenv("BAYES_DISPATCH_COSTS", str(path))
    with pytest.warns(UserWarning, match=rf"({message}).*`bayes-dispatch measure` makes a new one"):
        assert present_costs() is None


def test_where_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAYES_DISPATCH_COSTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert costs_file() == tmp_path / "bayes-dispatch" / "products.json"
    assert present_costs() is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert costs_file() == tmp_path / "home" / ".cache" / "bayes-dispatch" / "products.json"
    monkeypatch.setenv("BAYES_DISPATCH_COSTS", "off")
    assert costs_file() is None
    assert present_costs() is None
    save_costs(COSTS, tmp_path / "own.json")
    monkeypatch.setenv("BAYES_DISPATCH_COSTS", str(tmp_path / "own.json"))
    assert present_costs() == COSTS


def test_measured_costs_are_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_costs, "SECONDS", 0.001)
    monkeypatch.setattr(product_costs, "SIZES", (2**16, 2**18))
    found = product_costs.measure()
    assert (found.machine, found.sizes) == (machine(), (2**16, 2**18))


def steps_under(
    model: "MambaFormerForCausalLM", ids: torch.Tensor, scales: dict[str, torch.Tensor], costs: ProductCosts | None
) -> tuple[torch.Tensor, bool]:
    """Logits of the last four tokens, read one by one, and whether all matrices were built under their scales."""
    built: list[SVDLinear] = []
    folded = SVDLinear.folded

    def watched(linear: SVDLinear, z: torch.Tensor) -> torch.Tensor:
        built.append(linear)
        return folded(linear, z)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(stepping, "present_costs", lambda: costs)
        patch.setattr(SVDLinear, "folded", watched)
        adaptation, cache = Adaptation(scales, 4), model.init_cache(len(ids), 16)
        model(ids[:, :4], cache=cache, adaptation=adaptation)
        logits = [model(ids[:, t : t + 1], cache=cache, adaptation=adaptation).logits for t in range(4, 8)]
    assert len(built) in (0, len(scales))
    return torch.cat(logits, 1), bool(built)


@pytest.mark.parametrize("kind", ["shared", "one row", "two rows", "some of the rank"])
def test_both_choices_give_the_same(
    model: "MambaFormerForCausalLM", model64: "MambaFormerForCausalLM", kind: str
) -> None:
    """Where it pays, full-rank scales that all rows share are multiplied into the matrices; logits stay.

    Of the largest singular values alone they always are.
    """
    never, always = (replace(COSTS, reading=(1e-9, 1e-9), building=building) for building in (1e30, 1e-30))
    for own, tolerance in ((model, 1e-5), (model64, 1e-10)):
        rng = np.random.default_rng(7)
        lead = {"one row": (1,), "two rows": (2,)}.get(kind, ())
        part = 2 if kind == "some of the rank" else 1
        scales = {
            name: torch.from_numpy(1 + 0.3 * rng.standard_normal((*lead, rank // part))).to(own.dtype)
            for name, rank in own.adaptable().items()
        }
        ids = torch.from_numpy(rng.integers(0, 256, (1 if kind == "one row" else 2, 8)))
        expected, *others = [steps_under(own, ids, scales, costs) for costs in (None, never, always)]
        for logits, _ in others:
            torch.testing.assert_close(logits, expected[0], rtol=tolerance, atol=tolerance)
        told = [built for _, built in (expected, *others)]
        assert told == {"two rows": [False] * 3, "some of the rank": [True] * 3}.get(kind, [False, False, True])


def test_generations_that_take_turns_build_once(
    model: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each matrix once for each of two adaptations, and again only when too many others came between."""
    rng = np.random.default_rng(8)
    ids, built, folded = torch.from_numpy(rng.integers(0, 256, (1, 12))), [], SVDLinear.folded
    monkeypatch.setattr(stepping, "present_costs", lambda: replace(COSTS, reading=(1e-9, 1e-9), building=1e-30))
    monkeypatch.setattr(SVDLinear, "folded", lambda linear, z: built.append(linear) or folded(linear, z))

    def adapted() -> Adaptation:
        drawn = {name: 1 + 0.3 * torch.from_numpy(rng.standard_normal(r)).float() for name, r in ranks.items()}
        return Adaptation(drawn, 4)

    ranks = model.adaptable()
    both = [(adapted(), model.init_cache(1, 12)) for _ in range(2)]
    with torch.no_grad():
        for t in range(6):
            for adaptation, cache in both:
                model(ids[:, t : t + 1], cache=cache, adaptation=adaptation)
        assert len(built) == 2 * len(ranks)
        others = [adapted() for _ in range(stepping.MOST_KEPT)]
        for adaptation in others:
            model(ids[:, :1], cache=model.init_cache(1, 12), adaptation=adaptation)
        built.clear()
        model(ids[:, 6:7], cache=both[0][1], adaptation=both[0][0])
        assert len(built) == len(ranks)
        kept = next(iter(model._stretches.values())).steppers._kept
        assert len(kept) == stepping.MOST_KEPT
        del adaptation, others, both
        assert len(kept) == 1  # that which the model has checked last


def test_plain_generation_chooses_too(model64: "MambaFormerForCausalLM", monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own number of tokens; matrices that were built for a call are there for the next one like it."""
    rng, built, folded = np.random.default_rng(9), [], SVDLinear.folded
    monkeypatch.setattr(SVDLinear, "folded", lambda linear, z: built.append(linear) or folded(linear, z))
    ranks = model64.adaptable()
    adaptation = Adaptation({name: 1 + 0.3 * torch.from_numpy(rng.standard_normal(r)) for name, r in ranks.items()})
    ids = torch.from_numpy(rng.integers(0, 256, (2, 5)))
    monkeypatch.setattr(stepping, "present_costs", lambda: None)
    expected = model64.generate(ids, max_new_tokens=8, adaptation=adaptation)
    assert built == []
    monkeypatch.setattr(stepping, "present_costs", lambda: replace(COSTS, reading=(1e-9, 1e-9), building=1e-30))
    fresh = Adaptation(adaptation.scales)
    for _ in range(2):
        assert torch.equal(model64.generate(ids, max_new_tokens=8, adaptation=fresh), expected)
    assert len(built) == len(ranks)


def test_a_process_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAYES_DISPATCH_COSTS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert costs_file() is None
    assert present_costs() is None


def test_a_path_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAYES_DISPATCH_COSTS", f"/{'x' * 5000}")
    with pytest.warns(UserWarning, match="`bayes-dispatch measure` makes a new one"):
        assert present_costs() is None


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("model name\t: Fast\nflags: a b\nmodel name\t: Other\n", "Fast"),
        ("CPU implementer\t: 0x41\nCPU variant\t: 0x1\nCPU part\t: 0xd0c\nCPU part\t: 0xd05\n", "0x41 0xd0c 0x1"),
    ],
)
def test_processors_have_names(lines: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of x86 and of ARM, the first one's."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: lines)
    assert f" {expected}, torch {torch.__version__}" in machine.__wrapped__()


def test_tokens_ahead() -> None:
    """They stay with the rows that are selected, are no part of what the scales are, and cannot be fewer than none."""
    adaptation = Adaptation({"blocks.0.mixer.a": torch.ones(2, 3)}, 5)
    assert adaptation.select([1]).ahead == 5
    assert adaptation.expecting(5) is adaptation
    assert adaptation.expecting(2).ahead == 2
    assert adaptation.expecting(2) is adaptation.expecting(2)
    assert adaptation.expecting(2).digest(0) == adaptation.digest(0)
    with pytest.raises(ConfigError, match="expected at least 0 tokens ahead, got -1"):
        adaptation.expecting(-1)
