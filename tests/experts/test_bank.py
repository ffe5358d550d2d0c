"""Experts and their bank: blends are convex, vertices are the experts, and the disk gives back what it got."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import (
    BundleError,
    ConfigError,
    ForeignExpertError,
    TensorError,
    UnknownNameError,
)
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.model.files import write_tensors

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]
MakeBank = Callable[..., ExpertBank]

weights = st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda w: sum(w) > 1e-3)


def simplex(raw: list[float]) -> Tensor:
    w = torch.tensor(raw, dtype=torch.float64)
    return w / w.sum()


def assert_scales(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    assert got.scales.keys() == expected.keys()
    for name, z in expected.items():
        torch.testing.assert_close(got.scales[name].double(), z.double(), rtol=0, atol=tolerance)


class TestBlend:
    def test_a_vertex_is_its_expert(self, bank: ExpertBank) -> None:
        for k, name in enumerate(bank.names):
            assert_scales(bank.blend(torch.eye(4)[k]), bank[name].scales, 1e-6)
            assert_scales(bank[name].adaptation(), bank[name].scales, 0)

    def test_the_last_vertex_is_no_adaptation(self, bank: ExpertBank, model64: "MambaFormerForCausalLM") -> None:
        assert bank.components == ("reverse", "sort", "add", "base")
        base = bank.blend(torch.eye(4, dtype=torch.float64)[3])
        assert all(bool((z == 1).all()) for z in base.scales.values())
        ids = torch.arange(20).view(2, 10)
        with torch.no_grad():
            torch.testing.assert_close(model64(ids, adaptation=base).logits, model64(ids).logits, rtol=0, atol=1e-10)

    @settings(max_examples=30, deadline=None)
    @given(weights)
    def test_it_is_the_convex_combination(self, bank: ExpertBank, raw: list[float]) -> None:
        w = simplex(raw)
        expected = {
            name: sum(w[k] * bank[e].scales[name].double() for k, e in enumerate(bank.names)) + w[3]
            for name in bank["add"].scales
        }
        assert_scales(bank.blend(w), expected)

    @settings(max_examples=30, deadline=None)
    @given(weights, weights, st.floats(0, 1))
    def test_it_is_affine(self, bank: ExpertBank, a: list[float], b: list[float], t: float) -> None:
        left, right = bank.blend(simplex(a)).scales, bank.blend(simplex(b)).scales
        between = bank.blend((1 - t) * simplex(a) + t * simplex(b))
        assert_scales(between, {name: (1 - t) * left[name] + t * right[name] for name in left}, 1e-9)

    def test_rows_are_blended_one_by_one(self, bank: ExpertBank) -> None:
        rows = torch.stack([simplex([1, 2, 3, 4]), simplex([0, 1, 0, 1]), simplex([5, 1, 1, 0])])
        batch = bank.blend(rows)
        assert batch.rows == 3
        for b, row in enumerate(rows):
            assert_scales(bank.blend(row), {name: z[b] for name, z in batch.scales.items()})

    def test_permuting_the_experts_permutes_the_weights(self, bank: ExpertBank) -> None:
        order = [2, 0, 1]
        permuted = ExpertBank([bank[bank.names[k]] for k in order])
        assert permuted.names == ("add", "reverse", "sort")
        w = simplex([1, 2, 3, 4])
        assert_scales(permuted.blend(w[[*order, 3]]), bank.blend(w).scales)

    def test_matrices_blend_as_their_scales_do(self, bank: ExpertBank, model64: "MambaFormerForCausalLM") -> None:
        """W(z(w)) = Σ_k w_k W(z_k): one adapted linear map is linear in the weights."""
        linear, name = model64.blocks[1].mixer.qkv, "blocks.1.mixer.qkv"
        x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        w = simplex([1, 2, 3, 4])
        with torch.no_grad():
            parts = [linear(x, bank.blend(vertex).scales[name]) for vertex in torch.eye(4, dtype=torch.float64)]
            mixed = sum(weight * part for weight, part in zip(w, parts, strict=True))
            torch.testing.assert_close(linear(x, bank.blend(w).scales[name]), mixed, rtol=0, atol=1e-10)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("shape", [(3,), (5,), (2, 3), (1, 2, 4), ()])
    def test_weights_of_another_shape(self, bank: ExpertBank, shape: tuple[int, ...]) -> None:
        with pytest.raises(TensorError, match=r"expected weights of shape \(4,\) or \(B, 4\), got"):
            bank.blend(torch.ones(shape))

    def test_weights_that_are_not_finite(self, bank: ExpertBank) -> None:
        with pytest.raises(TensorError, match="finite"):
            bank.blend(torch.tensor([1.0, torch.nan, 0.0, 0.0]))


class TestBank:
    def test_it_is_a_mapping_in_order(self, bank: ExpertBank) -> None:
        assert list(bank) == list(bank.names) == ["reverse", "sort", "add"]
        assert len(bank) == 3
        assert "sort" in bank
        assert "base" not in bank
        assert [expert.name for expert in bank.values()] == list(bank.names)

    def test_an_unknown_name(self, bank: ExpertBank) -> None:
        with pytest.raises(UnknownNameError, match="expected an expert of reverse, sort, add, got 'shift'"):
            bank["shift"]

    def test_it_belongs_to_one_model(self, bank: ExpertBank, make_model: MakeModel, model64: Any) -> None:
        bank.check_base(model64)  # the same weights in float64
        with pytest.raises(ForeignExpertError, match=f"expected experts made for .* got ones for {bank.base}"):
            bank.check_base(make_model(seed=1))

    def test_experts_of_two_models(self, bank: ExpertBank) -> None:
        other = ExpertVector("other", bank["add"].scales, "0123")
        with pytest.raises(ForeignExpertError, match=f"expert other .* base model {bank.base}, got one for 0123"):
            ExpertBank([bank["add"], other])

    def test_experts_of_other_matrices(self, bank: ExpertBank) -> None:
        few = ExpertVector("few", dict(list(bank["add"].scales.items())[:2]), bank.base)
        with pytest.raises(TensorError, match="expected expert few to scale what add scales"):
            ExpertBank([bank["add"], few])

    def test_a_name_twice(self, bank: ExpertBank) -> None:
        with pytest.raises(ConfigError, match=r"different names, got \['add', 'add'\]"):
            ExpertBank([bank["add"], bank["add"]])

    def test_no_experts(self) -> None:
        with pytest.raises(ConfigError, match="expected at least one expert, got none"):
            ExpertBank([])


class TestVector:
    @pytest.mark.parametrize("name", ["base", "", "a b", "../up", "é", "a.b", "_", "a\n"])
    def test_a_name_that_is_no_file(self, name: str) -> None:
        with pytest.raises(ConfigError, match="expected an expert name of letters") as error:
            ExpertVector(name, {"m": torch.ones(2)}, "0")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", ["add", "reversed_add", "v-2", "3"])
    def test_a_name_that_is(self, name: str) -> None:
        assert ExpertVector(name, {"m": torch.ones(2)}, "0").name == name

    @pytest.mark.parametrize(
        "scales",
        [
            {"m": torch.ones(2, 2)},
            {"m": torch.tensor([1, 2])},
            {"m": torch.tensor([1.0, torch.nan])},
            {"m": torch.ones(2), "n": torch.tensor([torch.inf])},
            {},
        ],
    )
    def test_bad_scales(self, scales: dict[str, Tensor]) -> None:
        with pytest.raises(TensorError, match="of expert x, got"):
            ExpertVector("x", scales, "0")

    def test_it_cannot_be_changed(self) -> None:
        vector = ExpertVector("x", {"m": torch.ones(2)}, "0", {"steps": "3"})
        for mapping in (vector.scales, vector.metadata):
            with pytest.raises(TypeError):
                mapping["new"] = 1  # type: ignore[index]


class TestDisk:
    @pytest.fixture
    def saved(self, bank: ExpertBank, tmp_path: Path) -> Path:
        bank.save(tmp_path / "bank")
        return tmp_path / "bank"

    def refused(self, saved: Path, message: str, error: type[Exception] = BundleError) -> None:
        with pytest.raises(error, match=message) as raised:
            ExpertBank.load(saved)
        assert "\n" not in str(raised.value)

    def test_round_trip(self, bank: ExpertBank, saved: Path) -> None:
        again = ExpertBank.load(saved)
        assert (again.names, again.base) == (bank.names, bank.base)
        for name in bank.names:
            assert dict(again[name].metadata) == dict(bank[name].metadata)
            assert_scales(again[name], bank[name].scales, 0)
        w = simplex([1, 2, 3, 4])
        assert_scales(again.blend(w), bank.blend(w).scales, 0)

    def test_the_same_bank_is_the_same_files(self, saved: Path) -> None:
        ExpertBank.load(saved).save(saved.with_name("again"))
        for file in saved.iterdir():
            assert (saved.with_name("again") / file.name).read_bytes() == file.read_bytes()

    def test_saving_again_leaves_no_old_expert(self, bank: ExpertBank, saved: Path) -> None:
        ExpertBank([bank["sort"]]).save(saved)
        assert {file.name for file in saved.iterdir()} == {"bank.json", "sort.safetensors"}
        assert ExpertBank.load(saved).names == ("sort",)

    def test_a_failed_save_leaves_the_old_bank(
        self, bank: ExpertBank, make_bank: MakeBank, model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def failing(path: Path, *content: Any) -> None:
            calls.append(path)
            if len(calls) == 2:
                raise OSError("disk full")
            write_tensors(path, *content)

        monkeypatch.setattr("bayes_dispatch.experts.bank.write_tensors", failing)
        with pytest.raises(OSError, match="disk full"):
            make_bank(model, seed=9).save(saved)
        assert [path.name for path in saved.parent.iterdir()] == ["bank"]
        assert_scales(ExpertBank.load(saved)["add"], bank["add"].scales, 0)

    def test_nothing_there(self, saved: Path) -> None:
        shutil.rmtree(saved)
        self.refused(saved, "readable file .*bank.json")

    @pytest.mark.parametrize("name", ["bank.json", "sort.safetensors"])
    def test_a_missing_file(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        self.refused(saved, f"expected a readable file .*{name}, got: No such file")

    @pytest.mark.parametrize("name", ["bank.json", "sort.safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
    def test_a_truncated_file(self, saved: Path, name: str, share: float) -> None:
        data = (saved / name).read_bytes().rstrip()
        (saved / name).write_bytes(data[: int(share * len(data))])
        self.refused(saved, f"expected .*{name}, got")

    @pytest.mark.parametrize(
        "index",
        [
            [],
            {},
            {"experts": "add"},
            {"base": "0", "experts": []},
            {"base": "0", "experts": ["add", "add"]},
            {"base": "0", "experts": ["add", 3]},
            {"base": "0", "experts": ["../bank/add"]},
        ],
    )
    def test_an_edited_list(self, saved: Path, index: Any) -> None:
        (saved / "bank.json").write_text(json.dumps(index))
        self.refused(saved, "expected .* got")

    def test_a_list_that_names_another_base(self, saved: Path) -> None:
        index = json.loads((saved / "bank.json").read_text())
        (saved / "bank.json").write_text(json.dumps(index | {"base": "0123"}))
        self.refused(saved, "base model 0123", ForeignExpertError)

    def test_an_expert_under_anothers_name(self, saved: Path) -> None:
        shutil.copy(saved / "add.safetensors", saved / "sort.safetensors")
        self.refused(saved, "expected the expert 'sort'")

    def test_a_file_of_another_model(self, saved: Path, bank: ExpertBank) -> None:
        ExpertBank([ExpertVector("sort", bank["sort"].scales, "0123")]).save(saved.with_name("foreign"))
        shutil.copy(saved.with_name("foreign") / "sort.safetensors", saved)
        self.refused(saved, "expert sort .* got one for 0123", ForeignExpertError)

    @pytest.mark.parametrize("content", [torch.ones(2, 2), torch.tensor([1, 2]), torch.tensor([torch.nan])])
    def test_a_file_of_other_tensors(self, saved: Path, bank: ExpertBank, content: Tensor) -> None:
        metadata = {"name": "sort", "base": bank.base}
        safetensors.torch.save_file({"m": content}, saved / "sort.safetensors", metadata=metadata)
        self.refused(saved, "sort")

    def test_a_file_without_tensors(self, saved: Path, bank: ExpertBank) -> None:
        safetensors.torch.save_file({}, saved / "sort.safetensors", metadata={"name": "sort", "base": bank.base})
        self.refused(saved, "sort")
