"""Banks on disk: loading gives back what was saved, a save writes what changed, experts are read one by one, and a
damaged one alone tells why. That a save is whole or did not happen: tests/bayes_dispatch/test_storage.py."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from bayes_dispatch.app.bundle import SHIPPED
from bayes_dispatch.errors import BundleError, ConfigError, ForeignExpertError, TensorError
from bayes_dispatch.experts import vectors
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.bank_files import verify_bank
from bayes_dispatch.experts.provenance import provenance
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.two_pass.blends import BestExpert, FixedWeights, as_blend
from bayes_dispatch.storage import FINISHED, tensors_as_bytes

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeBank = Callable[..., ExpertBank]
Contents = dict[str, bytes]

MATRICES = {f"blocks.{block}.mixer.{kind}": 128 for block in range(5) for kind in ("in_proj", "out_proj")}
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


@pytest.fixture
def saved(bank: ExpertBank, tmp_path: Path) -> Path:
    bank.save(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened from now on."""
    names: list[str] = []
    really = io.open

    def watched(file: Any, *arguments: Any, **settings: Any) -> Any:
        if not isinstance(file, int):
            names.append(Path(os.fsdecode(file)).name)
        return really(file, *arguments, **settings)

    monkeypatch.setattr(io, "open", watched)
    return names


def file_of(directory: Path, name: str) -> Path:
    (file,) = directory.glob(f"{name}.*.safetensors")
    return file


def contents(directory: Path) -> Contents:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def assert_same(got: ExpertBank, expected: ExpertBank) -> None:
    assert (got.names, got.base, list(got.matrices.items())) == (
        expected.names,
        expected.base,
        list(expected.matrices.items()),
    )
    assert got.metadata == expected.metadata
    for name in expected:
        assert got[name].metadata == expected[name].metadata
        assert list(got[name].scales) == list(expected[name].scales)
        assert all(torch.equal(z, expected[name].scales[matrix]) for matrix, z in got[name].scales.items())


def random_expert(name: str, seed: int = 0) -> ExpertVector:
    generator = torch.Generator().manual_seed(seed)
    scales = {matrix: 1 + 0.1 * torch.randn(rank, generator=generator) for matrix, rank in MATRICES.items()}
    known = {"domain": name, "objective": "likelihood", "steps": "80", "metric.nll": "0.2134", **provenance()}
    return ExpertVector(name, scales, "8b15ce1ffd25814117ecb5fba3591e89", known)


class TestSaving:
    def test_loading_gives_back_what_was_saved(self, bank: ExpertBank, saved: Path) -> None:
        again = ExpertBank.load(str(saved))
        assert_same(again, bank)
        for blend, weights in ((bank.blend, WEIGHTS), (bank.blend_by_matrix, WEIGHTS.repeat(6, 1))):
            got = getattr(again, blend.__name__)(weights)
            assert all(torch.equal(z, got.scales[name]) for name, z in blend(weights).scales.items())

    def test_one_tensor_may_scale_two_matrices(self, tmp_path: Path) -> None:
        whole = torch.linspace(0.5, 1.5, 256)
        scales = {"blocks.0.mixer.in_proj": whole, "blocks.1.mixer.in_proj": whole, "blocks.2.mixer.in_proj": whole[:9]}
        bank = ExpertBank([ExpertVector("one", scales, "0f")])
        bank.save(tmp_path / "bank")
        assert_same(ExpertBank.load(tmp_path / "bank"), bank)

    def test_the_same_bank_is_the_same_files(self, saved: Path, tmp_path: Path) -> None:
        again = ExpertBank.load(saved)
        again.save(tmp_path / "copy")
        ExpertBank(list(again.values())).save(tmp_path / "rebuilt")
        assert contents(tmp_path / "copy") == contents(tmp_path / "rebuilt") == contents(saved)

    def test_files_are_named_by_their_content(self, bank: ExpertBank, saved: Path) -> None:
        index = json.loads((saved / "bank.json").read_text())
        assert {entry["file"] for entry in index["experts"]} | {"bank.json"} == {file.name for file in saved.iterdir()}
        assert all(entry["file"] == f"{entry['name']}.{entry['digest'][:12]}.safetensors" for entry in index["experts"])
        before = file_of(saved, "sort")
        bank.with_expert(replace(bank["add"], name="sort")).save(saved)
        assert file_of(saved, "sort") != before

    def test_an_expert_of_1280_scales_is_at_most_8_kilobytes(self, tmp_path: Path) -> None:
        ExpertBank([random_expert("reversed_add")]).save(tmp_path / "bank")
        assert file_of(tmp_path / "bank", "reversed_add").stat().st_size <= 8_000

    def test_an_edit_writes_and_reads_only_what_changed(self, bank: ExpertBank, saved: Path, opened: list[str]) -> None:
        untouched = {name: file_of(saved, name).stat() for name in ("reverse", "sort")}
        changed = ExpertBank.load(saved).renamed("add", "plus").with_expert(replace(bank["add"], name="more"))
        del opened[:]
        changed.save(saved)
        assert [name for name in opened if name.startswith(("reverse", "sort"))] == []
        for name, before in untouched.items():
            after = file_of(saved, name).stat()
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert_same(ExpertBank.load(saved), changed)
        assert ExpertBank.load(saved).names == ("reverse", "sort", "plus", "more")

    def test_a_bank_may_have_an_expert_that_is_called_as_a_blend(
        self, bank: ExpertBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was made when that was allowed; it is read, goes to other processes, and its expert can be renamed."""
        with monkeypatch.context() as patch:
            patch.setattr(vectors, "NAMES_OF_BLENDS", set())
            bank.renamed("add", "max").save(tmp_path / "bank")
        loaded = ExpertBank.load(tmp_path / "bank")
        assert as_blend("max", loaded.components) == FixedWeights((0.0, 0.0, 1.0, 0.0), "max")
        assert as_blend("max(  )", loaded.components) == BestExpert()
        assert_same(pickle.loads(pickle.dumps(loaded)).renamed("max", "add"), bank)

    def test_a_bank_may_have_an_expert_of_a_longer_name(
        self, bank: ExpertBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was made when that was allowed."""
        long = "a" * 150
        with monkeypatch.context() as patch:
            patch.setattr(vectors, "LONGEST", 200)
            bank.renamed("add", long).save(tmp_path / "bank")
        loaded = ExpertBank.load(tmp_path / "bank")
        assert_same(pickle.loads(pickle.dumps(loaded)).renamed(long, "add"), bank)
        with pytest.raises(ConfigError, match="of at most 100 letters, got 150"):
            ExpertBank(list(loaded.values()))

    def test_saving_repairs_files_of_experts_at_hand(self, bank: ExpertBank, saved: Path) -> None:
        file_of(saved, "sort").write_bytes(b"x")
        bank.save(saved)
        assert_same(ExpertBank.load(saved), bank)

    def test_an_expert_whose_file_has_gone_is_not_saved(self, saved: Path) -> None:
        bank = ExpertBank.load(saved)
        file_of(saved, "sort").unlink()
        before = contents(saved)
        with pytest.raises(BundleError, match=r"expected a readable file .*sort.*, got: No such file"):
            bank.without("add").save(saved)
        assert contents(saved) == before


class TestReading:
    def test_a_thousand_experts_open_without_one_being_read(self, tmp_path: Path, opened: list[str]) -> None:
        names = [f"expert_{k}" for k in range(1000)]
        one = random_expert("expert_0")
        ExpertBank([replace(one, name=name) for name in names]).save(tmp_path / "bank")
        del opened[:]
        bank = ExpertBank.load(tmp_path / "bank")
        assert bank.names == tuple(names)
        assert bank.matrices == MATRICES
        assert bank.metadata["expert_7"] == one.metadata
        assert "expert_999" in bank
        assert opened == ["bank.json"]
        del opened[:]
        assert bank["expert_7"] is bank["expert_7"]
        assert opened == [file_of(tmp_path / "bank", "expert_7").name]
        del opened[:]
        assert bank.without("expert_8")["expert_7"] is bank["expert_7"]
        weights = torch.zeros(2, 1001)
        weights[0, 7], weights[1, [4, -1]] = 1, 0.5
        blended = bank.blend(weights)
        assert opened == [file_of(tmp_path / "bank", "expert_4").name]
        expected = one.scales[FIRST]
        got = blended.scales[FIRST]
        torch.testing.assert_close(got, torch.stack([expected, (expected + 1) / 2]), rtol=0, atol=1e-6)

    def test_a_blend_is_the_same_whatever_was_read_before(self, saved: Path) -> None:
        weights = torch.tensor([0.7, 0.0, 0.2, 0.1])
        bank = ExpertBank.load(saved)
        before = bank.blend(weights)
        bank.blend(torch.full((4,), 0.25))
        after = bank.blend(weights)
        assert all(torch.equal(z, after.scales[name]) for name, z in before.scales.items())

    def test_experts_read_in_inference_mode_can_be_differentiated_later(self, saved: Path) -> None:
        with torch.inference_mode():
            bank = ExpertBank.load(saved)
            bank.blend(torch.full((4,), 0.25))
        weights = torch.full((4,), 0.25, requires_grad=True, dtype=torch.float64)
        sum(z.square().sum() for z in bank.blend(weights).scales.values()).backward()
        assert weights.grad is not None
        assert not any(z.is_inference() for z in bank["add"].scales.values())

    def test_reading_more_experts_leaves_gradients_of_earlier_blends(self, saved: Path, bank: ExpertBank) -> None:
        loaded = ExpertBank.load(saved)
        weights = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
        total = sum(z.sum() for z in loaded.blend(weights).scales.values())
        loaded.blend(torch.full((4,), 0.25))
        total.backward()
        expected = sum(float((z.double() - 1).sum()) for z in bank["reverse"].scales.values())
        assert float(weights.grad[0]) == pytest.approx(expected)

    def test_the_working_directory_may_change(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(saved.parent)
        bank = ExpertBank.load("bank")
        monkeypatch.chdir("/")
        assert bank["add"].name == "add"

    @pytest.mark.parametrize("step", ["read_json", "read_bytes"])
    def test_a_save_between_two_steps_of_reading(
        self, saved: Path, bank: ExpertBank, meanwhile: Callable[..., None], step: str
    ) -> None:
        """Of one that another process was amid: its files are in another place afterwards."""
        shutil.copytree(saved, saved / FINISHED)
        meanwhile(f"bayes_dispatch.experts.bank_files.{step}", lambda: bank.save(saved))
        assert_same(ExpertBank.load(saved), bank)

    def test_a_bank_that_is_saved_anew_while_it_is_verified_is_whole(
        self, saved: Path, bank: ExpertBank, meanwhile: Callable[..., None]
    ) -> None:
        other = bank.renamed("sort", "order")
        meanwhile("bayes_dispatch.experts.bank_files.read_bytes", lambda: other.save(saved))
        assert [(check.name, check.reason) for check in verify_bank(saved)] == [(name, None) for name in other]

    def test_it_belongs_to_one_model(
        self, saved: Path, bank: ExpertBank, make_model: Callable[..., "MambaFormerForCausalLM"]
    ) -> None:
        other = make_model(seed=1)
        with pytest.raises(
            ForeignExpertError, match=f"base model {other.fingerprint()}, got ones for {bank.base}"
        ) as error:
            ExpertBank.load(saved).check_base(other)
        assert "\n" not in str(error.value)


Spoil = Callable[[Path, ExpertBank], object]
FIRST = "blocks.0.mixer.in_proj"


def rewritten(change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> Spoil:
    """The file of ``sort`` written anew, with other scales or another header."""

    def spoil(file: Path, bank: ExpertBank) -> None:
        scales = {name: z.clone() for name, z in bank["sort"].scales.items()}
        header = {**bank["sort"].metadata, "name": "sort", "base": bank.base}
        change(scales, header)
        file.write_bytes(tensors_as_bytes(scales, header))

    return spoil


def become_a_directory(file: Path, bank: ExpertBank) -> None:
    file.unlink()
    file.mkdir()


EDITED = "with digest [0-9a-f]{12}, got [0-9a-f]{12}: it was edited"
NOT_FINITE = "of expert sort, got NaN or infinite ones"
DAMAGE: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda file, bank: file.unlink(), "expected a readable file .*, got: No such file"),
    "a directory": (become_a_directory, "expected a readable file .*, got: Is a directory"),
    "cut": (lambda file, bank: file.write_bytes(file.read_bytes()[:-9]), "expected a whole safetensors file"),
    "swapped": (
        lambda file, bank: shutil.copy(file_of(file.parent, "add"), file),
        "expected the expert 'sort' in .*, got the expert 'add'",
    ),
    "no header": (
        rewritten(lambda scales, header: header.clear()),
        "expected the name and base model of an expert in",
    ),
    "foreign": (
        rewritten(lambda scales, header: header.update(base="0123")),
        "expected expert sort to be made for base model .*, got one for 0123",
    ),
    "NaN": (rewritten(lambda scales, header: scales[FIRST].fill_(torch.nan)), NOT_FINITE),
    "infinite": (rewritten(lambda scales, header: scales[FIRST][:1].fill_(torch.inf)), NOT_FINITE),
    "another value": (rewritten(lambda scales, header: scales[FIRST][:1].add_(0.5)), EDITED),
    "another note": (rewritten(lambda scales, header: header.update(domain="add")), EDITED),
    "fewer matrices": (
        rewritten(lambda scales, header: scales.pop(FIRST)),
        "expected 6 matrices in .*, got others or fewer: blocks",
    ),
    "more matrices": (
        rewritten(lambda scales, header: scales.update(more=torch.ones(2))),
        "expected 6 matrices in .*, got others or fewer: more",
    ),
    "another rank": (
        rewritten(lambda scales, header: scales.update({FIRST: torch.ones(3)})),
        r"expected \d+ scales of blocks.* in .*, got 3",
    ),
    "no scales": (rewritten(lambda scales, header: scales.update({FIRST: torch.ones(0)})), "expected .*, got"),
    "two axes": (
        rewritten(lambda scales, header: scales.update({FIRST: torch.ones(2, 2)})),
        r"expected finite scales of shape \(rank,\) for blocks.*, got shape \(2, 2\)",
    ),
    "whole numbers": (
        rewritten(lambda scales, header: scales.update({FIRST: scales[FIRST].long()})),
        "got shape .* of torch.int64",
    ),
    "eight bits": (
        rewritten(lambda scales, header: scales.update({FIRST: scales[FIRST].to(torch.float8_e5m2)})),
        "got shape .* of torch.float8_e5m2",
    ),
}


class TestDamage:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_one_expert_is_refused_and_the_others_are_not(self, saved: Path, bank: ExpertBank, kind: str) -> None:
        before, file = contents(saved), file_of(saved, "sort")
        spoil, reason = DAMAGE[kind]
        spoil(file, bank)
        loaded = ExpertBank.load(saved)
        error = ForeignExpertError if kind == "foreign" else BundleError
        for use in (
            lambda: loaded["sort"],
            lambda: loaded.blend(torch.full((4,), 0.25)),
            lambda: loaded.renamed("sort", "x"),
        ):
            with pytest.raises(error, match=reason) as raised:
                use()
            assert "\n" not in str(raised.value)
            assert str(file) in str(raised.value)
        assert torch.equal(loaded["add"].scales[FIRST], bank["add"].scales[FIRST])
        loaded.blend(torch.tensor([0.5, 0.0, 0.5, 0.0]))
        checks = {check.name: check for check in verify_bank(saved)}
        assert [name for name, check in checks.items() if not check.ok] == ["sort"]
        assert checks["sort"].reason == str(raised.value)
        assert all((saved / name).read_bytes() == data for name, data in before.items() if name != file.name)

    @pytest.mark.parametrize("kind", ["NaN", "foreign", "two axes", "more matrices", "swapped"])
    def test_a_right_digest_does_not_help(self, saved: Path, bank: ExpertBank, kind: str) -> None:
        file, (spoil, reason) = file_of(saved, "sort"), DAMAGE[kind]
        spoil(file, bank)
        digest = blake2b(file.read_bytes(), digest_size=16).hexdigest()
        new = f"sort.{digest[:12]}.safetensors"
        file.rename(saved / new)
        edit(saved, lambda index: index["experts"][1].update(digest=digest, file=new))
        with pytest.raises((BundleError, ForeignExpertError), match=reason):
            ExpertBank.load(saved)["sort"]

    def test_a_damaged_expert_can_be_deleted_or_replaced(self, saved: Path, bank: ExpertBank) -> None:
        DAMAGE["NaN"][0](file_of(saved, "sort"), bank)
        loaded = ExpertBank.load(saved)
        loaded.with_expert(bank["sort"]).save(saved)
        assert all(check.ok for check in verify_bank(saved))
        DAMAGE["NaN"][0](file_of(saved, "sort"), bank)
        loaded.without("sort").save(saved)
        assert [check.name for check in verify_bank(saved) if check.ok] == ["reverse", "add"]

    def test_a_bank_that_is_whole(self, saved: Path) -> None:
        assert [(check.name, check.ok, check.reason) for check in verify_bank(saved)] == [
            (name, True, None) for name in ("reverse", "sort", "add")
        ]
        assert all(check.ok for check in verify_bank(SHIPPED / "experts"))


def edit(directory: Path, change: Callable[[Any], object]) -> None:
    index = json.loads((directory / "bank.json").read_text())
    change(index)
    (directory / "bank.json").write_text(json.dumps(index))


class TestIndex:
    def refused(self, saved: Path, message: str) -> None:
        for read in (ExpertBank.load, verify_bank):
            with pytest.raises(BundleError, match=message) as raised:
                read(saved)
            assert "\n" not in str(raised.value)

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "bank", r"expected a readable file .*bank.json, got: No such file")

    def test_the_older_format(self, saved: Path) -> None:
        (saved / "bank.json").write_text(json.dumps({"base": "0", "experts": ["add"]}))
        self.refused(saved, r"expected a bank of format 2 in .*bank.json, got the older one")

    @pytest.mark.parametrize("index", [[], {}, None, "text", {"format": 1}, {"format": 3}, {"format": "2"}])
    def test_something_else(self, saved: Path, index: Any) -> None:
        (saved / "bank.json").write_text(json.dumps(index))
        self.refused(saved, r"expected a bank of format 2 in .*bank.json, got")

    @pytest.mark.parametrize(
        "change",
        [
            lambda index: index.pop("base"),
            lambda index: index.update(base=3),
            lambda index: index.update(base=""),
            lambda index: index.update(more=3),
            lambda index: index.update(matrices=["m"]),
            lambda index: index.update(matrices={}),
            lambda index: index.update(matrices={"m": "3"}),
            lambda index: index.update(matrices={"m": True}),
            lambda index: index.update(matrices={"m": 0}),
            lambda index: index.update(format=2.0),
            lambda index: index.update(experts=[]),
            lambda index: index.update(experts={"add": 1}),
            lambda index: index.update(experts=["add"]),
            lambda index: index["experts"].append(index["experts"][0]),
            lambda index: index["experts"][0].pop("digest"),
            lambda index: index["experts"][0].update(more="x"),
            lambda index: index["experts"][0].update(name=3),
            lambda index: index["experts"][0].update(name="other"),
            lambda index: index["experts"][0].update(name="../bank/add"),
            lambda index: index["experts"][0].update(name="base"),
            lambda index: index["experts"][0].update(file="../secret"),
            lambda index: index["experts"][0].update(file=None),
            lambda index: index["experts"][0].update(file=index["experts"][1]["file"]),
            lambda index: index["experts"][0].update(digest="0" * 32),
            lambda index: index["experts"][0].update(digest="G" * 32),
            lambda index: index["experts"][0].update(metadata=["domain"]),
            lambda index: index["experts"][0].update(metadata={"domain": 3}),
        ],
    )
    def test_an_edited_one(self, saved: Path, change: Callable[[Any], object]) -> None:
        edit(saved, change)
        self.refused(saved, "expected .*, got")

    def test_edits_that_only_the_experts_tell(self, saved: Path, bank: ExpertBank) -> None:
        for change, message in (
            (lambda index: index.update(base="0123"), f"expert sort .* base model 0123, got one for {bank.base}"),
            (
                lambda index: index["experts"][1]["metadata"].update(steps="9"),
                "metadata of sort .* others in bank.json",
            ),
            (lambda index: index["matrices"].popitem(), "expected 5 matrices in .*, got others or fewer"),
        ):
            before = (saved / "bank.json").read_bytes()
            edit(saved, change)
            with pytest.raises((BundleError, ForeignExpertError), match=message):
                ExpertBank.load(saved)["sort"]
            assert not any(check.ok for check in verify_bank(saved) if check.name == "sort")
            (saved / "bank.json").write_bytes(before)


def test_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert provenance() == {"date": "1970-01-02", "bayes_dispatch": "0.1.0", "torch": torch.__version__}
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert provenance()["date"] > "2026"


def test_experts_of_the_embedding(model: "MambaFormerForCausalLM", tmp_path: Path) -> None:
    """They are kept, verified and refused as those of other matrices are, and nothing is below them."""
    draw = torch.Generator().manual_seed(0)
    ranks = {**model.adaptable(), **model.adaptable_on_request()}
    ranks = {name: rank for name, rank in ranks.items() if not name.startswith("blocks.0.")}

    def expert(name: str, ranks: dict[str, int]) -> ExpertVector:
        scales = {matrix: 1 + 0.3 * torch.randn(rank, generator=draw) for matrix, rank in ranks.items()}
        return ExpertVector(name, scales, model.fingerprint())

    bank = ExpertBank([expert(name, ranks) for name in "xyz"])
    bank.save(tmp_path / "bank")
    again = ExpertBank.load(tmp_path / "bank")
    assert_same(again, bank)
    again.check_base(model)
    assert (bank.adapt_from, again.adapt_from) == (0, 0)
    assert all(check.ok for check in verify_bank(tmp_path / "bank"))
    ids = torch.tensor([[256, 97, 98]])
    with torch.no_grad():
        one, other = (model(ids, adaptation=each.blend(WEIGHTS.float())).logits for each in (bank, again))
    assert torch.equal(one, other)
    blocks = {name: rank for name, rank in ranks.items() if name != "embedding"}
    assert ExpertBank([expert("x", blocks)]).adapt_from == 1
    for wrong in (blocks, {**ranks, "embedding": 31}):
        with pytest.raises(TensorError, match="expected expert w to scale what the bank scales"):
            bank.with_expert(expert("w", wrong))
    file_of(tmp_path / "bank", "y").write_bytes(file_of(tmp_path / "bank", "x").read_bytes())
    assert [check.ok for check in verify_bank(tmp_path / "bank")] == [True, False, True]
