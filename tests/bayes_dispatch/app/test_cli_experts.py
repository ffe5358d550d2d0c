"""``bayes-dispatch experts``: what it prints is what the bank holds, and edits leave the rest of a bank as it was."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bayes_dispatch.app.bundle import SHIPPED, Bundle
from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.bank_files import verify_bank
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.storage import FINISHED

Experts = Callable[..., tuple[int, str, str]]


@pytest.fixture
def experts(capfd: pytest.CaptureFixture[str]) -> Experts:
    """Exit code, stdout and stderr of ``bayes-dispatch experts …``."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["experts", *map(str, arguments)])
        return (int(exit_.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def saved(bank: ExpertBank, tmp_path: Path) -> Path:
    bank.save(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture(scope="module")
def in_bundle(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    bundle.save(directory)
    return directory


def spoil(directory: Path, name: str) -> None:
    (file,) = directory.glob(f"{name}.*")
    file.write_bytes(file.read_bytes()[:-8])


def assert_one_line(code: int, out: str, err: str) -> None:
    assert (code, out) == (2, "")
    assert err.startswith("bayes-dispatch: error: expected ")
    assert "got" in err
    assert err.count("\n") == 1


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_help_names_the_commands(experts: Experts) -> None:
    code, out, err = experts("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in ("list", "show", "verify", "delete", "rename"))


def test_list(experts: Experts, saved: Path, in_bundle: Path, bank: ExpertBank) -> None:
    for place in (("--bank", saved), ("--bundle", in_bundle)):
        code, out, err = experts("list", "--json", *place)
        assert (code, err) == (0, "")
        document = json.loads(out)
        assert document["base"] == bank.base
        assert list(document["matrices"].items()) == list(bank.matrices.items())
        assert document["scales"] == sum(bank.matrices.values())
        assert {expert["name"]: expert["metadata"] for expert in document["experts"]} == bank.metadata
        assert [expert["name"] for expert in document["experts"]] == list(bank.names)
        code, out, err = experts("list", *place)
        assert (code, err) == (0, "")
        assert all(word in out for word in (*bank.names, "domain", "steps"))


def test_a_save_that_was_stopped_is_read_where_it_is(experts: Experts, bank: ExpertBank, in_bundle: Path) -> None:
    """Between the two steps of a bundle's save."""
    finished = in_bundle / FINISHED
    shutil.copytree(in_bundle, finished)
    shutil.rmtree(finished / "experts")
    bank.without("sort").save(finished / "experts")
    for command, expected in (("list", ["reverse", "add"]), ("verify", ["reverse", "add"])):
        listed = json.loads(experts(command, "--bundle", in_bundle, "--json")[1])["experts"]
        assert [expert["name"] for expert in listed] == expected
    shutil.rmtree(finished)


def test_a_bundle_whose_save_goes_on_while_it_is_read(
    experts: Experts, bundle: Bundle, tmp_path: Path, meanwhile: Callable[..., None]
) -> None:
    """Its files are in another place afterwards."""
    for command in (["list"], ["show", "sort"], ["verify"]):
        directory = tmp_path / command[0]
        bundle.save(directory)
        shutil.copytree(directory, directory / FINISHED)
        meanwhile("bayes_dispatch.experts.bank_files.read_bank", lambda directory=directory: bundle.save(directory))
        assert experts(*command, "--bundle", directory, "--json")[0] == 0


def test_list_shows_metadata_of_all_kinds_and_reads_no_expert(experts: Experts, bank: ExpertBank, saved: Path) -> None:
    known = {"objective": "likelihood", "date": "2026-01-31", "metric.nll": "0.25", "torch": "2.0", "odd": "a\x1b[2Jb"}
    for name in bank:
        vector = bank[name]
        new = type(vector)(name, vector.scales, vector.base, known if name == "sort" else vector.metadata)
        bank = bank.with_expert(new)
    bank.save(saved)
    spoil(saved, "sort")
    code, out, _ = experts("list", "--bank", saved)
    assert code == 0
    assert all(word in out for word in ("objective", "likelihood", "2026-01-31", "metric.nll", "0.25", "a\\x1b[2Jb"))
    assert "\x1b" not in out


def test_without_a_place_it_is_the_shipped_bundle(experts: Experts) -> None:
    assert experts("list", "--json") == experts("list", "--json", "--bundle", SHIPPED)
    assert experts("verify")[0] == 0


def test_show(experts: Experts, saved: Path, bank: ExpertBank) -> None:
    code, out, err = experts("show", "sort", "--bank", saved, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["name"], document["base"], document["metadata"]) == ("sort", bank.base, bank.metadata["sort"])
    for row, (matrix, scales) in zip(document["matrices"], bank["sort"].scales.items(), strict=True):
        distances = [abs(float(z) - 1) for z in scales]
        assert (row["name"], row["rank"]) == (matrix, len(distances))
        assert row["mean"] == pytest.approx(sum(distances) / len(distances))
        assert row["max"] == max(distances)
    code, out, _ = experts("show", "sort", "--bank", saved)
    assert code == 0
    assert all(word in out for word in ("sort", bank.base, "domain", *bank.matrices, f"{row['max']:.4f}"))


class Alive(TorchFunctionMode):
    """The most numbers that tensors which functions gave held at once."""

    now = most = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self._add(found.numel())
            weakref.finalize(found, self._add, -found.numel())
        return found

    def _add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


def test_show_of_updates_makes_them_one_at_a_time(experts: Experts, tmp_path: Path) -> None:
    """They are dense: those of all matrices are as large as the model."""
    draw = torch.Generator().manual_seed(0)
    factors = {
        f"layers.{n}.up": (torch.randn(1, 64, generator=draw), torch.randn(64, 1, generator=draw)) for n in range(12)
    }
    ExpertBank([LoraExpert("low", factors, "0")]).save(tmp_path / "bank")
    with Alive() as alive:
        code, out, _ = experts("show", "low", "--bank", tmp_path / "bank", "--json")
    assert code == 0
    for row, (down, up) in zip(json.loads(out)["matrices"], factors.values(), strict=True):
        update = (up * down).abs()
        assert (row["mean"], row["max"]) == (pytest.approx(float(update.mean())), pytest.approx(float(update.max())))
    assert 64 * 64 < alive.most < 6 * 64 * 64


def test_verify(experts: Experts, saved: Path) -> None:
    code, out, err = experts("verify", "--bank", saved, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["ok"] is True
    spoil(saved, "sort")
    code, out, err = experts("verify", "--bank", saved, "--json")
    assert (code, err) == (2, "")
    document = json.loads(out)
    assert document["ok"] is False
    assert [(row["name"], row["ok"]) for row in document["experts"]] == [
        ("reverse", True),
        ("sort", False),
        ("add", True),
    ]
    assert "expected a whole safetensors file" in document["experts"][1]["reason"]
    code, out, _ = experts("verify", "--bank", saved)
    assert code == 2
    assert "2 of 3 are whole" in out


def test_delete(experts: Experts, saved: Path) -> None:
    before = contents(saved)
    code, out, err = experts("delete", "sort", "--bank", saved, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"deleted": "sort", "experts": ["reverse", "add"]}
    after = contents(saved)
    assert after.keys() == {name for name in before if not name.startswith("sort.")}
    assert all(data == before[name] for name, data in after.items() if name != "bank.json")
    code, out, _ = experts("delete", "add", "--bank", saved)
    assert (code, out) == (0, f"{saved}: deleted add, 1 left\n")
    assert_one_line(*experts("delete", "reverse", "--bank", saved))
    assert ExpertBank.load(saved).names == ("reverse",)


def test_a_damaged_expert_can_be_deleted(experts: Experts, saved: Path) -> None:
    spoil(saved, "sort")
    assert experts("delete", "sort", "--bank", saved)[0] == 0
    assert [(check.name, check.ok) for check in verify_bank(saved)] == [("reverse", True), ("add", True)]


def test_rename(experts: Experts, saved: Path, bank: ExpertBank) -> None:
    code, out, err = experts("rename", "sort", "order", "--bank", saved, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"renamed": "sort", "to": "order", "experts": ["reverse", "order", "add"]}
    assert experts("rename", "add", "sum", "--bank", saved) == (0, f"{saved}: add is now sum\n", "")
    again = ExpertBank.load(saved)
    assert again.names == ("reverse", "order", "sum")
    assert again.metadata["order"] == bank.metadata["sort"]
    assert all(check.ok for check in verify_bank(saved))


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--bank", "nowhere"],
        ["list", "--bundle", "nowhere"],
        ["list", "--bundle", "BANK"],
        ["list", "--bank", "BANK", "--bundle", "BANK"],
        ["show"],
        ["show", "subtract", "--bank", "BANK"],
        ["verify", "--bank", "nowhere"],
        ["delete", "subtract", "--bank", "BANK"],
        ["rename", "sort", "add", "--bank", "BANK"],
        ["rename", "sort", "a b", "--bank", "BANK"],
        ["rename", "sort", "base", "--bank", "BANK"],
        ["dance"],
        [],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(experts: Experts, saved: Path, arguments: list[str]) -> None:
    before = contents(saved)
    result = experts(*(str(saved) if argument == "BANK" else argument for argument in arguments))
    assert result[:2] == (2, "")
    assert_one_line(*result)
    assert contents(saved) == before


def test_a_damaged_expert_is_not_shown(experts: Experts, saved: Path) -> None:
    spoil(saved, "sort")
    assert_one_line(*experts("show", "sort", "--bank", saved))
    assert experts("show", "add", "--bank", saved)[0] == 0


@pytest.mark.parametrize("command", [["delete", "sort"], ["rename", "sort", "order"]], ids=" ".join)
def test_a_bundle_is_not_edited(experts: Experts, in_bundle: Path, tmp_path: Path, command: list[Any]) -> None:
    before = contents(in_bundle / "experts")
    link = tmp_path / "link"
    link.symlink_to(in_bundle / "experts")
    for place in ([], ["--bundle", in_bundle], ["--bank", in_bundle / "experts"], ["--bank", link]):
        result = experts(*command, *place)
        assert_one_line(*result)
        assert "refit" in result[2]
    assert contents(in_bundle / "experts") == before
    copy = shutil.copytree(in_bundle / "experts", tmp_path / "copy")
    assert experts(*command, "--bank", copy)[0] == 0
