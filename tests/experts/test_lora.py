"""LoRA experts, without a model: blends are sums of updates, banks of both kinds are kept and edited as others are."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import BundleError, ConfigError, ForeignExpertError, TensorError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.bank_files import verify_bank
from bayes_dispatch.experts.blending import STACKS, Expert
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.model.adaptation import Adaptation

SHAPES = {"layers.0.q": (5, 3), "layers.0.v": (2, 3), "layers.1.q": (4, 6), "head": (7, 4)}
SCALES = {"layers.0.q": 3, "layers.1.o": 2}

laws = settings(max_examples=25, deadline=None)


def lora(name: str, ranks: dict[str, int], seed: int = 0) -> LoraExpert:
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    factors = {m: (drawn(r, SHAPES[m][1]), drawn(SHAPES[m][0], r)) for m, r in ranks.items()}
    return LoraExpert(name, factors, "0123", {"domain": name})


def svf(name: str, seed: int = 0) -> ExpertVector:
    g = torch.Generator().manual_seed(seed)
    return ExpertVector(name, {m: 1 + torch.randn(r, generator=g).double() for m, r in SCALES.items()}, "0123")


def random_bank(draw: Callable[..., Any]) -> ExpertBank:
    """One to five experts of either kind; LoRA ones of some matrices, in ranks of their own."""
    experts: list[Expert] = []
    for k in range(draw(st.integers(1, 5))):
        ranks = draw(st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 4)))
        experts.append(lora(f"e{k}", ranks, k) if ranks else svf(f"e{k}", k))
    return ExpertBank(experts)


def simplexes(draw: Callable[..., Any], *shape: int) -> Tensor:
    """Weights that sum to 1 along the last axis; some are 0."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.rand(*shape, generator=g, dtype=torch.float64)
    w = torch.where(torch.rand(*shape, generator=g) < 0.4, 0.0, w)
    w[..., -1] += 1e-3
    return w / w.sum(dim=-1, keepdim=True)


def dense(adaptation: Adaptation) -> dict[str, Tensor]:
    """What is added to each matrix, and scales, whole: (*B, out, in) and (*B, rank)."""
    deltas = {f"{m}+": (d.up * d.c[..., None, :]) @ d.down for m, d in adaptation.deltas.items() if bool(d.c.any())}
    return {**dict(adaptation.scales), **deltas}


def expected(bank: ExpertBank, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same from the definition, for weights (K + 1,) of each matrix."""
    found: dict[str, Tensor] = {}
    for k, expert in enumerate(bank.values()):
        parts = (
            {f"{m}+": up @ down for m, (down, up) in expert.factors.items()}
            if isinstance(expert, LoraExpert)
            else {m: z - 1 for m, z in expert.scales.items()}
        )
        for name, part in parts.items():
            w = weights[name.rstrip("+")][k]
            if w or not name.endswith("+"):
                found[name] = found.get(name, 0.0 if name.endswith("+") else 1.0) + w * part
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-12)


class TestLaws:
    @laws
    @given(st.data())
    def test_a_blend_is_the_weighted_sum(self, data: st.DataObject) -> None:
        """Of all matrices, of each its own, of each layer its own; an expert without a matrix adds nothing to it."""
        bank = random_bank(data.draw)
        w = simplexes(data.draw, len(bank.adapts), len(bank) + 1)
        assert_same(dense(bank.blend(w[0])), expected(bank, dict.fromkeys(bank.adapts, w[0])))
        assert_same(dense(bank.blend_by_matrix(w)), expected(bank, dict(zip(bank.adapts, w, strict=True))))
        layers = [".".join(m.split(".")[:2]) for m in bank.adapts]
        assert bank.layers == tuple(dict.fromkeys(layers))
        by_layer = {m: w[bank.layers.index(layer)] for m, layer in zip(bank.adapts, layers, strict=True)}
        assert_same(dense(bank.blend_by_layer(w[: len(bank.layers)])), expected(bank, by_layer))

    @laws
    @given(st.data())
    def test_rows_are_blended_one_by_one(self, data: st.DataObject) -> None:
        bank, rows = random_bank(data.draw), data.draw(st.integers(1, 4))
        w = simplexes(data.draw, rows, len(bank.adapts), len(bank) + 1)
        for blend, weights in ((bank.blend, w[:, 0]), (bank.blend_by_matrix, w)):
            batch = dense(blend(weights))
            for b in range(rows):
                alone = dense(blend(weights[b]))
                assert_same({name: t[b] for name, t in batch.items() if name in alone}, alone)
                assert not any(bool(t[b].any()) for name, t in batch.items() if name not in alone)

    @laws
    @given(data=st.data())
    def test_files_and_processes_keep_a_bank(
        self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        bank, directory = random_bank(data.draw), tmp_path_factory.mktemp("bank")
        bank.save(directory)
        w = simplexes(data.draw, len(bank) + 1)
        for same in (ExpertBank.load(directory), pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank)):
            assert (same.names, same.adapts, same.matrices, same.layers) == (
                bank.names,
                bank.adapts,
                bank.matrices,
                bank.layers,
            )
            assert same.metadata == bank.metadata
            assert same.digest == bank.digest
            assert_same(dense(same.blend(w)), dense(bank.blend(w)))
        assert all(check.ok for check in verify_bank(directory))


def test_gradients_reach_experts_without_weight() -> None:
    bank = ExpertBank([lora("a", {"head": 2}, 1), svf("b"), lora("c", {"head": 1, "layers.0.q": 3}, 2)])
    for blend in (bank.blend, bank.blend_by_matrix):
        weights = torch.eye(4, dtype=torch.float64)[3]
        if blend == bank.blend_by_matrix:
            weights = weights.repeat(len(bank.adapts), 1)
        weights.requires_grad_()
        adaptation = blend(weights)
        (
            sum(t.sum() for t in dense(adaptation).values()) + sum(d.c.sum() for d in adaptation.deltas.values())
        ).backward()
        assert weights.grad is not None
        assert bool((weights.grad.reshape(-1, 4)[:, :3] != 0).any(0).all())


def test_few_stacks_are_kept_and_threads_share_them(in_threads: Callable[..., Any]) -> None:
    bank = ExpertBank([lora(f"e{k}", {"head": 1 + k % 2}, k) for k in range(5)])
    subsets = [torch.tensor([float(n >> k & 1) for k in range(6)], dtype=torch.float64) for n in range(1, 64)]

    def blends() -> list[dict[str, Tensor]]:
        return [dense(bank.blend(each / each.sum())) for each in subsets]

    want = [expected(bank, {"head": each / each.sum()}) for each in subsets]
    for found in in_threads(3, blends):
        for got, one in zip(found, want, strict=True):
            assert_same(got, one)
    assert 0 < len(bank._blending._stacks) <= STACKS + 3  # each thread may add one to what another has just begun


def test_blends_made_in_inference_mode_leave_no_trace(tmp_path: Path) -> None:
    ExpertBank([lora("a", {"head": 2})]).save(tmp_path / "bank")
    with torch.inference_mode():
        bank = ExpertBank.load(tmp_path / "bank")
        bank.blend([0.5, 0.5])
    weights = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    dense(bank.blend(weights))["head+"].square().sum().backward()
    assert weights.grad is not None


class TestEdits:
    def test_kinds_come_and_go(self) -> None:
        low, scaled = lora("low", {"head": 2}), svf("scaled")
        both = ExpertBank([low]).with_expert(scaled)
        assert (both.names, both.matrices, both.adapts) == (("low", "scaled"), SCALES, (*SCALES, "head"))
        assert (both.adapt_from, both.layers) == (0, ("layers.0", "layers.1", "head"))
        for alone in (both.without("scaled"), both.with_expert(lora("scaled", {"head": 1}))):
            assert (alone.matrices, alone.adapts) == ({}, ("head",))
            assert alone.blend([1.0, *[0.0] * len(alone)]).scales == {}
        again = both.without("low").renamed("scaled", "z")
        assert (again.names, again.adapts) == (("z",), tuple(SCALES))
        assert again.blend([0.5, 0.5]).deltas == {}

    def test_an_expert_may_be_replaced_by_one_of_other_shapes(self) -> None:
        """Where no other expert has the matrix."""
        new = LoraExpert("a", {"head": (torch.ones(1, 2), torch.ones(3, 1))}, "0123")
        bank = ExpertBank([lora("a", {"head": 2}), svf("b")])
        assert bank.with_expert(new)["a"] is new
        with pytest.raises(TensorError, match=r"expected factors of a matrix \(7, 4\) for head of x, got \(3, 2\)"):
            bank.with_expert(replace(new, name="x"))
        with pytest.raises(TensorError, match=r"expected factors of a matrix \(7, 4\) for head of x, got \(3, 2\)"):
            ExpertBank([bank["a"], replace(new, name="x")])

    def test_a_foreign_expert(self) -> None:
        with pytest.raises(ForeignExpertError, match="expert b to be made for base model 0123, got one for 4567"):
            ExpertBank([lora("a", {"head": 2})]).with_expert(replace(lora("b", {"head": 2}), base="4567"))


class TestExpert:
    @pytest.mark.parametrize(
        "factors",
        [
            (torch.ones(2, 3), torch.ones(4, 3)),
            (torch.ones(3), torch.ones(4, 1)),
            (torch.ones(0, 3), torch.ones(4, 0)),
            (torch.ones(2, 3).long(), torch.ones(4, 2)),
            (torch.ones(2, 3), torch.full((4, 2), torch.nan)),
            (torch.full((2, 3), torch.inf), torch.ones(4, 2)),
        ],
    )
    def test_bad_factors(self, factors: tuple[Tensor, Tensor]) -> None:
        with pytest.raises(TensorError, match=r"expected finite factors .* for m of expert x, got"):
            LoraExpert("x", {"m": factors}, "0")

    def test_other_mistakes(self) -> None:
        with pytest.raises(TensorError, match="expected factors of at least one matrix of expert x, got none"):
            LoraExpert("x", {}, "0")
        with pytest.raises(ConfigError, match="expected an expert name of letters"):
            lora("../up", {"head": 1})
        with pytest.raises(ConfigError, match="expected metadata of expert a in text"):
            replace(lora("a", {"head": 1}), metadata={"base": "x"})

    def test_it_cannot_be_changed(self) -> None:
        down, up = torch.ones(1, 2), torch.ones(3, 1)
        expert = LoraExpert("x", {"m": (down, up)}, "0")
        for tensor in (down, up, *expert.factors["m"]):
            tensor.zero_()
        assert all(bool((tensor == 1).all()) for tensor in expert.factors["m"])
        with pytest.raises(TypeError):
            expert.factors["n"] = (down, up)  # type: ignore[index]

    def test_alone_it_is_its_vertex(self) -> None:
        bank = ExpertBank([lora("a", {"head": 2}), lora("b", {"layers.0.v": 3})])
        assert_same(dense(bank["b"].adaptation()), dense(bank.blend([0.0, 1.0, 0.0])))


class TestFiles:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        ExpertBank([lora("a", {"head": 2}), svf("b"), lora("c", {"layers.0.q": 1})]).save(tmp_path / "bank")
        return tmp_path / "bank"

    def test_an_unread_expert_is_not_read_and_a_damaged_one_tells(self, saved: Path) -> None:
        (file,) = saved.glob("a.*.safetensors")
        file.write_bytes(file.read_bytes()[:-8])
        bank = ExpertBank.load(saved)
        assert bank.blend([0.0, 0.5, 0.5, 0.0]).deltas.keys() == {"layers.0.q"}
        with pytest.raises(BundleError, match="expected a whole safetensors file"):
            bank.blend([0.5, 0.0, 0.5, 0.0])
        assert [check.ok for check in verify_bank(saved)] == [False, True, True]

    @pytest.mark.parametrize(
        "change",
        [
            lambda entry: entry.update(kind="other"),
            lambda entry: entry.pop("kind"),
            lambda entry: entry.pop("matrices"),
            lambda entry: entry.update(matrices={}),
            lambda entry: entry.update(matrices=["head"]),
            lambda entry: entry.update(matrices={"head": 0}),
        ],
    )
    def test_an_edited_index(self, saved: Path, change: Callable[[Any], object]) -> None:
        index = json.loads((saved / "bank.json").read_text())
        change(index["experts"][0])
        (saved / "bank.json").write_text(json.dumps(index))
        with pytest.raises(BundleError, match=r"expected .* in .*bank\.json, got"):
            ExpertBank.load(saved)

    @pytest.mark.parametrize("matrices", [{"head": 3}, {"head": 2, "layers.0.q": 1}, {"layers.0.q": 2}])
    def test_edits_that_only_the_expert_tells(self, saved: Path, matrices: dict[str, int]) -> None:
        index = json.loads((saved / "bank.json").read_text())
        index["experts"][0]["matrices"] = matrices
        (saved / "bank.json").write_text(json.dumps(index))
        with pytest.raises(BundleError, match=r"expected .* in .*a\..*safetensors, got"):
            ExpertBank.load(saved)["a"]
