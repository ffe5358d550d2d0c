"""Laws: blends are linear in the weights, vertices are the experts, edits leave a bank as it was, threads share one."""

import copy
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.errors import (
    ConfigError,
    ForeignExpertError,
    TensorError,
    UnknownNameError,
)
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.two_pass.blends import FixedWeights
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeModel = Callable[..., "MambaFormerForCausalLM"]


def random_bank(draw: Callable[..., Any]) -> ExpertBank:
    """One to six experts of one to four matrices of rank one to seven, far from 1 on both sides."""
    ranks = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return ExpertBank(
        [
            ExpertVector(
                f"expert_{k}",
                {f"m{n}": 1 + 2 * torch.randn(rank, generator=generator) for n, rank in enumerate(ranks)},
                "0123",
            )
            for k in range(draw(st.integers(1, 6)))
        ]
    )


def simplexes(draw: Callable[..., Any], *shape: int) -> Tensor:
    """Weights that sum to 1 along the last axis; some are 0."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.rand(*shape, generator=generator, dtype=torch.float64)
    w = torch.where(torch.rand(*shape, generator=generator) < 0.3, 0.0, w)
    w[..., -1] += 1e-3
    return w / w.sum(dim=-1, keepdim=True)


def simplex(raw: list[float]) -> Tensor:
    w = torch.tensor(raw, dtype=torch.float64)
    return w / w.sum()


def assert_scales(got: Any, expected: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    assert got.scales.keys() == expected.keys()
    for name, z in expected.items():
        torch.testing.assert_close(got.scales[name].double(), z.double(), rtol=0, atol=tolerance)


laws = settings(max_examples=25, deadline=None)


class TestLaws:
    """What holds of every bank and all weights."""

    @laws
    @given(st.data())
    def test_a_vertex_is_its_expert_and_base_is_one(self, data: st.DataObject) -> None:
        bank = random_bank(data.draw)
        *vertices, base = torch.eye(len(bank) + 1, dtype=torch.float64)
        for name, vertex in zip(bank, vertices, strict=True):
            assert_scales(bank.blend(vertex), bank[name].scales)
        assert all(bool((z == 1).all()) for z in bank.blend(base).scales.values())

    @laws
    @given(st.data())
    def test_a_blend_is_the_convex_combination(self, data: st.DataObject) -> None:
        bank = random_bank(data.draw)
        w = simplexes(data.draw, len(bank) + 1)
        expected = {
            name: sum((w[k] * expert.scales[name].double() for k, expert in enumerate(bank.values())), w[-1])
            for name in bank.matrices
        }
        assert_scales(bank.blend(w), expected)

    @laws
    @given(st.data(), st.floats(0, 1))
    def test_a_blend_of_mixed_weights_is_the_mixture_of_blends(self, data: st.DataObject, t: float) -> None:
        bank = random_bank(data.draw)
        v, w = simplexes(data.draw, 2, len(bank) + 1)
        left, right = bank.blend(v).scales, bank.blend(w).scales
        expected = {name: (1 - t) * left[name] + t * right[name] for name in left}
        assert_scales(bank.blend((1 - t) * v + t * w), expected)

    @laws
    @given(st.data())
    def test_permuting_the_experts_permutes_the_weights(self, data: st.DataObject) -> None:
        bank = random_bank(data.draw)
        order = data.draw(st.permutations(range(len(bank))))
        permuted = ExpertBank([bank[bank.names[k]] for k in order])
        assert permuted.names == tuple(bank.names[k] for k in order)
        w = simplexes(data.draw, len(bank.matrices), len(bank) + 1)
        assert_scales(permuted.blend(w[0, [*order, -1]]), bank.blend(w[0]).scales)
        assert_scales(permuted.blend_by_matrix(w[:, [*order, -1]]), bank.blend_by_matrix(w).scales)

    @laws
    @given(st.data())
    def test_rows_are_blended_one_by_one(self, data: st.DataObject) -> None:
        bank, rows = random_bank(data.draw), data.draw(st.integers(1, 4))
        w = simplexes(data.draw, rows, len(bank.matrices), len(bank) + 1)
        for blend, weights in ((bank.blend, w[:, 0]), (bank.blend_by_matrix, w)):
            batch = blend(weights)
            assert batch.rows == rows
            for b in range(rows):
                alone = blend(weights[b])
                assert alone.rows is None
                assert_scales(alone, {name: z[b] for name, z in batch.scales.items()})

    @laws
    @given(st.data())
    def test_equal_weights_of_all_matrices_are_global_ones(self, data: st.DataObject) -> None:
        bank = random_bank(data.draw)
        w = simplexes(data.draw, 3, len(bank) + 1)
        for weights in (w, w[0]):
            repeated = weights.unsqueeze(-2).repeat_interleave(len(bank.matrices), dim=-2)
            assert_scales(bank.blend_by_matrix(repeated), bank.blend(weights).scales)

    @laws
    @given(st.data())
    def test_each_matrix_has_its_own_weights(self, data: st.DataObject) -> None:
        bank = random_bank(data.draw)
        w = simplexes(data.draw, len(bank.matrices), len(bank) + 1)
        expected = {name: bank.blend(w[m]).scales[name] for m, name in enumerate(bank.matrices)}
        assert_scales(bank.blend_by_matrix(w), expected)

    @laws
    @given(st.data())
    def test_matrices_blend_as_their_scales_do(self, data: st.DataObject) -> None:
        """W(z(w)) = Σ_k w_k W(z_k): the adapted map is linear in the weights, folded or factored."""
        bank = random_bank(data.draw)
        w = simplexes(data.draw, len(bank) + 1)
        name, rank = next(iter(bank.matrices.items()))
        with torch.random.fork_rng():
            torch.manual_seed(data.draw(st.integers(0, 2**31)))
            linear = SVDLinear(rank + 2, rank).double()
            x = torch.randn(1, data.draw(st.sampled_from([1, 40])), rank + 2, dtype=torch.float64)
        with torch.no_grad():
            parts = [linear(x, bank.blend(v).scales[name]) for v in torch.eye(len(w), dtype=torch.float64)]
            mixed = (w[:, None, None, None] * torch.stack(parts)).sum(0)
            torch.testing.assert_close(linear(x, bank.blend(w).scales[name]), mixed, rtol=0, atol=1e-10)


def test_gradients_reach_experts_without_weight(make_bank: Any, model: Any) -> None:
    """At a vertex, whatever was blended before."""
    bank, again = make_bank(model), make_bank(model)
    again.blend(torch.full((4,), 0.25))
    found = []
    for each in (bank, again):
        weights = torch.tensor([0.0, 0.0, 0.0, 1.0], requires_grad=True)
        scales = each.blend(weights).scales
        found.append(torch.autograd.grad(sum(z.sum() for z in scales.values()), weights)[0])
    assert (found[0][:3] != 0).all()
    torch.testing.assert_close(*found)


def test_the_published_factor_would_break_the_law() -> None:
    """With W(z) · Σs / Σ(s∘z), as Transformer² has it, the blend of matrices is another matrix than W of the blend."""
    linear = SVDLinear(3, 2).double()
    U, s, Vt, _ = linear.factors()

    def published(z: Tensor) -> Tensor:
        return (U * (s * z)) @ Vt * s.sum() / (s * z).sum()

    z1, z2 = torch.tensor([2.0, 1.0]).double(), torch.tensor([1.0, 3.0]).double()
    assert float((published((z1 + z2) / 2) - (published(z1) + published(z2)) / 2).abs().max()) > 1e-3


class TestBlend:
    def test_the_last_vertex_is_no_adaptation(self, bank: ExpertBank, model64: "MambaFormerForCausalLM") -> None:
        assert bank.components == ("reverse", "sort", "add", "base")
        base = bank.blend(torch.eye(4, dtype=torch.float64)[3])
        ids = torch.arange(20).view(2, 10)
        with torch.no_grad():
            torch.testing.assert_close(model64(ids, adaptation=base).logits, model64(ids).logits, rtol=0, atol=1e-10)

    def test_a_blend_by_matrix_adapts_a_model(self, bank: ExpertBank, model64: "MambaFormerForCausalLM") -> None:
        """One matrix under an expert, the others under base."""
        weights = torch.eye(4, dtype=torch.float64)[3].repeat(len(bank.matrices), 1)
        weights[2] = torch.eye(4, dtype=torch.float64)[1]
        name = list(bank.matrices)[2]
        ids = torch.arange(20).view(2, 10)
        with torch.no_grad():
            got = model64(ids, adaptation=bank.blend_by_matrix(weights)).logits
            only = replace(bank["sort"].adaptation(), scales={name: bank["sort"].scales[name].double()})
            torch.testing.assert_close(got, model64(ids, adaptation=only).logits, rtol=0, atol=1e-10)
        assert list(bank.matrices) == list(model64.adaptable())

    def test_scales_are_those_of_float32_experts(self, bank: ExpertBank) -> None:
        for k, name in enumerate(bank.names):
            blended = bank.blend(torch.eye(4)[k])
            assert {z.dtype for z in blended.scales.values()} == {torch.float32}
            assert_scales(blended, bank[name].scales, 1e-6)
            assert_scales(bank[name].adaptation(), bank[name].scales, 0)

    def test_gradients_reach_the_weights(self, bank: ExpertBank) -> None:
        weights = simplex([1, 2, 3, 4]).repeat(len(bank.matrices), 1).requires_grad_()
        sum(z.sum() for z in bank.blend_by_matrix(weights).scales.values()).backward()
        expected = [[float((bank[e].scales[m].double() - 1).sum()) for e in bank.names] + [0] for m in bank.matrices]
        torch.testing.assert_close(weights.grad, torch.tensor(expected, dtype=torch.float64))

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("shape", [(3,), (5,), (2, 3), (1, 2, 4), ()])
    def test_weights_of_another_shape(self, bank: ExpertBank, shape: tuple[int, ...]) -> None:
        with pytest.raises(TensorError, match=r"expected weights of shape \(4,\) or \(B, 4\), got"):
            bank.blend(torch.ones(shape))

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("shape", [(4,), (1, 4), (6, 3), (7, 4), (1, 1, 6, 4), (2, 4, 6)])
    def test_weights_by_matrix_of_another_shape(self, bank: ExpertBank, shape: tuple[int, ...]) -> None:
        assert len(bank.matrices) == 6
        with pytest.raises(TensorError, match=r"expected weights of shape \(6, 4\) or \(B, 6, 4\), got"):
            bank.blend_by_matrix(torch.ones(shape))

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1.0, torch.nan, 0.0, 0.0], "expected finite weights, got NaN"),
            ([0.5, 0.5, 0.5, 0.5], "expected weights that sum to 1, got a sum of 2"),
            ([0.5, 0.7, -0.2, 0.0], "expected weights of at least 0, got -0.2"),
        ],
    )
    def test_weights_off_the_simplex(self, bank: ExpertBank, weights: list[float], message: str) -> None:
        """At every entrance of weights."""
        w = torch.tensor(weights)
        many, layers = len(bank.matrices), len(bank.layers)
        for use in (
            lambda: bank.blend(w.numpy()),
            lambda: bank.blend_by_matrix(w.repeat(many, 1)),
            lambda: bank.blend_by_layer(w.repeat(2, layers, 1)),
            lambda: FixedWeights(tuple(weights)),
        ):
            with pytest.raises(ConfigError, match=message):
                use()

    def test_arrays_and_lists_are_weights(self, bank: ExpertBank) -> None:
        weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0]])
        for same in (weights.double().numpy(), weights.tolist()):
            assert bank.blend(same).scales == bank.blend(weights).scales
        assert_scales(bank.blend(weights.half()), bank.blend(weights).scales, 1e-2)

    def test_threads_share_a_bank(self, bank: ExpertBank, tmp_path: Path, in_threads: Callable[..., Any]) -> None:
        """A blend sees each expert whole, whoever reads it first; the former code lost experts in one trial of five."""
        bank.save(tmp_path)
        weights = torch.full((4,), 0.25)
        expected = bank.blend(weights).scales
        for _ in range(40):
            fresh = ExpertBank.load(tmp_path)
            for blended in in_threads(4, lambda: fresh.blend(weights)):  # noqa: B023
                assert blended.scales == expected
            assert fresh.blend(weights).scales == expected


class TestBank:
    def test_it_is_a_mapping_in_order(self, bank: ExpertBank) -> None:
        assert list(bank) == list(bank.names) == ["reverse", "sort", "add"]
        assert len(bank) == 3
        assert "sort" in bank
        assert "base" not in bank
        assert [expert.name for expert in bank.values()] == list(bank.names)
        assert bank.matrices == bank["add"].matrices
        assert bank.metadata == {name: {"domain": name, "steps": "0"} for name in bank.names}

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

    def test_another_process_has_the_same(self, bank: ExpertBank, tmp_path: Path) -> None:
        """A bank that was loaded is sent with all its experts: its files may be out of the other's sight."""
        bank.save(tmp_path / "bank")
        sent = pickle.dumps(ExpertBank.load(tmp_path / "bank"))
        shutil.rmtree(tmp_path / "bank")
        for same in (pickle.loads(sent), copy.deepcopy(bank)):
            assert (same.names, same.base, same.matrices, same.metadata) == (
                bank.names,
                bank.base,
                bank.matrices,
                bank.metadata,
            )
            assert all(same[name].scales == bank[name].scales for name in bank)


class TestEdits:
    def test_another_expert_stands_at_the_end(self, bank: ExpertBank) -> None:
        more = bank.with_expert(replace(bank["add"], name="more"))
        assert more.names == ("reverse", "sort", "add", "more")
        assert more["more"].scales == bank["add"].scales
        assert bank.names == ("reverse", "sort", "add")
        w = simplex([1, 2, 3, 4])
        assert_scales(more.blend(torch.cat([w[:3], torch.zeros(1), w[3:]])), bank.blend(w).scales)

    def test_an_expert_of_the_same_name_is_replaced(self, bank: ExpertBank) -> None:
        new = replace(bank["add"], name="sort", metadata={"domain": "other"})
        changed = bank.with_expert(new)
        assert changed.names == bank.names
        assert changed["sort"] is new
        assert changed.metadata["sort"] == {"domain": "other"}
        assert bank["sort"] is not new

    def test_a_foreign_expert(self, bank: ExpertBank) -> None:
        with pytest.raises(ForeignExpertError, match=f"expert add .* base model {bank.base}, got one for 0123"):
            bank.with_expert(replace(bank["add"], base="0123"))

    def test_an_expert_of_other_matrices(self, bank: ExpertBank) -> None:
        few = replace(bank["add"], scales=dict(list(bank["add"].scales.items())[:2]))
        with pytest.raises(TensorError, match="expected expert add to scale what the bank scales"):
            bank.with_expert(few)

    def test_without(self, bank: ExpertBank) -> None:
        assert bank.without("sort").names == ("reverse", "add")
        assert bank.names == ("reverse", "sort", "add")
        with pytest.raises(UnknownNameError, match="expected an expert of reverse, sort, add, got 'shift'"):
            bank.without("shift")
        with pytest.raises(ConfigError, match="expected another expert to stay in the bank, got 'add'"):
            bank.without("sort").without("reverse").without("add")

    def test_renamed(self, bank: ExpertBank) -> None:
        renamed = bank.renamed("sort", "order")
        assert renamed.names == ("reverse", "order", "add")
        assert renamed["order"].name == "order"
        assert renamed["order"].scales == bank["sort"].scales
        assert renamed.metadata["order"] == bank.metadata["sort"]
        assert "order" not in bank
        w = simplex([1, 2, 3, 4])
        assert_scales(renamed.blend(w), bank.blend(w).scales, 0)

    @pytest.mark.parametrize(
        ("old", "new", "error", "message"),
        [
            ("shift", "other", UnknownNameError, "expected an expert of reverse, sort, add, got 'shift'"),
            ("sort", "add", ConfigError, "expected a name that no expert of the bank has, got 'add'"),
            ("sort", "sort", ConfigError, "expected a name that no expert of the bank has, got 'sort'"),
            ("sort", "base", ConfigError, "other than 'base', got 'base'"),
            ("sort", "../up", ConfigError, "expected an expert name of letters"),
            ("sort", "top_k", ConfigError, "expected an expert name that is no blend's, got 'top_k'"),
        ],
    )
    def test_names_that_cannot_be(
        self, bank: ExpertBank, old: str, new: str, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            bank.renamed(old, new)

    @pytest.mark.parametrize("name", ["max", "posterior_mean"])
    def test_no_expert_is_called_as_a_blend(self, bank: ExpertBank, name: str) -> None:
        expert = replace(bank["sort"], name=name)
        for make in (lambda: ExpertBank([bank["add"], expert]), lambda: bank.with_expert(expert)):
            with pytest.raises(ConfigError, match=f"expected an expert name that is no blend's, got '{name}'"):
                make()


class TestVector:
    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("name", ["base", "", "a b", "../up", "é", "a.b", "_", "a\n", 3])
    def test_a_name_that_is_no_file(self, name: Any) -> None:
        with pytest.raises(ConfigError, match="expected an expert name of letters") as error:
            ExpertVector(name, {"m": torch.ones(2)}, "0")
        assert "\n" not in str(error.value)

    def test_a_name_too_long_for_a_file(self) -> None:
        with pytest.raises(ConfigError, match=r"expected an expert name of at most 100 letters, got 101: a{20}…"):
            ExpertBank([ExpertVector("a" * 101, {"m": torch.ones(2)}, "0")])

    @pytest.mark.parametrize("name", ["add", "reversed_add", "v-2", "3", "a" * 100])
    def test_a_name_that_is(self, name: str) -> None:
        assert ExpertVector(name, {"m": torch.ones(2)}, "0").name == name

    @pytest.mark.parametrize(
        "scales",
        [
            {"m": torch.ones(2, 2)},
            {"m": torch.tensor([1, 2])},
            {"m": torch.tensor([1.0, torch.nan])},
            {"m": torch.ones(2), "n": torch.tensor([torch.inf])},
            {"m": torch.ones(0)},
            {"m": torch.ones(2).to(torch.float8_e4m3fn)},
            {},
        ],
    )
    def test_bad_scales(self, scales: dict[str, Tensor]) -> None:
        with pytest.raises(TensorError, match="of expert x, got"):
            ExpertVector("x", scales, "0")

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        "metadata", [{"name": "x"}, {"base": "0"}, {"digest": ""}, {"steps": 3}, {3: "steps"}, {"\ud800": ""}]
    )
    def test_bad_metadata(self, metadata: Any) -> None:
        with pytest.raises(ConfigError, match="expected metadata of expert x in text, under names other than"):
            ExpertVector("x", {"m": torch.ones(2)}, "0", metadata)

    def test_it_cannot_be_changed(self) -> None:
        given = torch.ones(2)
        vector = ExpertVector("x", {"m": given}, "0", {"steps": "3"})
        for tensor in (given, vector.scales["m"]):
            tensor.zero_()
        assert vector.scales == {"m": torch.ones(2)}
        for mapping in (vector.scales, vector.metadata):
            with pytest.raises(TypeError):
                mapping["new"] = 1  # type: ignore[index]


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_list_of_experts(bank: ExpertBank) -> None:
    expert: Any = bank["add"]
    assert ExpertBank(iter([expert])).names == ("add",)  # type: ignore[arg-type]
    for wrong, message in (
        (expert, "expected experts to be a list, got ExpertVector"),
        ({"add": expert}, "expected an ExpertVector or a LoraExpert, got 'add'"),
        ([expert, None], "expected an ExpertVector or a LoraExpert, got None"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            ExpertBank(wrong)
    with pytest.raises(ConfigError, match=r"^expected an ExpertVector or a LoraExpert, got 'add'"):
        bank.with_expert("add")  # type: ignore[arg-type]


def test_whole_numbers_and_truth_values_are_weights(bank: ExpertBank) -> None:
    """As the same numbers with a point are."""
    width = len(bank.components)
    expected = bank.blend(torch.eye(width)[1])
    whole, truths = torch.eye(width, dtype=torch.int64)[1], torch.eye(width, dtype=torch.bool)[1]
    for weights in (whole, truths, whole.tolist()):
        assert all(torch.equal(z, expected.scales[name]) for name, z in bank.blend(weights).scales.items())
    with pytest.raises(TensorError, match=r"expected weights in rows of one length, got \[\[1\.0\], \[0\.5"):
        bank.blend([[1.0], [0.5, 0.5]])
