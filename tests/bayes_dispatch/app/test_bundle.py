"""A bundle gives back what was saved, whatever the default dtype, in the same files. Parts of two bundles, files that
are not listed and edited lists are refused in a line; other damage: tests/test_damage.py."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.app import shipped
from bayes_dispatch.app.bundle import Bundle, load_bundle
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.dispatcher.program.settings import Admixture
from bayes_dispatch.errors import BundleError, ConfigError, ForeignExpertError, NotFittedError
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import PosteriorPredictive
from bayes_dispatch.serving.engine import BatchedEngine

if TYPE_CHECKING:
    from bayes_dispatch.experts.bank import ExpertBank
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

# Patterns, each of one file: the names of experts' files tell their content.
FILES = [
    "bundle.json",
    "dispatcher/dispatcher.json",
    "dispatcher/dispatcher.safetensors",
    "experts/add.*.safetensors",
    "experts/bank.json",
    "experts/reverse.*.safetensors",
    "experts/sort.*.safetensors",
    "model/config.json",
    "model/model.safetensors",
]


@pytest.fixture(scope="session")
def pristine(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "saved"
    bundle.save(directory)
    return directory


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "saved"))


def checksums(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def the(directory: Path, pattern: str) -> Path:
    (file,) = directory.glob(pattern)
    return file


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((directory / "bundle.json").read_text())
    change(index)
    (directory / "bundle.json").write_text(json.dumps(index))


def sign(directory: Path) -> None:
    """Bring the checksums up to date, as one would who builds a bundle by hand."""
    (found := checksums(directory)).pop("bundle.json")
    edit(directory, lambda index: index.update(files=found))


def refused(directory: Path, message: str, error: type[Exception] = BundleError) -> None:
    with pytest.raises(error, match=message) as raised:
        load_bundle(directory)
    assert "\n" not in str(raised.value)


def test_round_trip(bundle: Bundle, pristine: Path) -> None:
    again = load_bundle(str(pristine))
    assert again.model.fingerprint() == bundle.model.fingerprint()
    assert again.experts.names == bundle.experts.names
    assert again.report == {"note": "tiny"}
    prompts = ["kfpa>apfk\nbcde>", "37+58="]
    given: dict[str, Any] = {"blend": PosteriorPredictive(8), "max_new_tokens": 6, "do_sample": True, "seed": 4}
    ours, theirs = (TwoPassGenerator(system).generate(prompts, **given) for system in (bundle, again))
    assert ours.texts == theirs.texts
    for name in ("token_ids", "log_probabilities", "weights", "predictive_entropy", "mutual_information"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_array_equal(ours.posterior.weights, theirs.posterior.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(
    bundle: Bundle, bundle64: Bundle, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Nor what dtype the model has: a bundle comes back as it was, and says the same."""
    whole = bundle if dtype == torch.float32 else bundle64
    given: dict[str, Any] = {"blend": PosteriorPredictive(4), "max_new_tokens": 5, "seed": 4}
    expected = TwoPassGenerator(whole).generate(["kfpa>apfk\nbcde>"], **given)
    whole.save(tmp_path / "bundle")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        again = load_bundle(tmp_path / "bundle")
        found = TwoPassGenerator(again).generate(["kfpa>apfk\nbcde>"], **given)
    finally:
        torch.set_default_dtype(before)
    assert found.texts == expected.texts
    np.testing.assert_allclose(found.posterior.weights, expected.posterior.weights, atol=1e-5)


def test_its_files_are_json_and_safetensors_alone(pristine: Path) -> None:
    assert [the(pristine, name) for name in FILES] == [pristine / name for name in checksums(pristine)]
    assert list(pristine.parent.iterdir()) == [pristine]


def test_the_same_bundle_is_the_same_files(pristine: Path, tmp_path: Path) -> None:
    load_bundle(pristine).save(tmp_path / "again")
    assert checksums(tmp_path / "again") == checksums(pristine)


def test_a_bundle_that_is_saved_anew_while_it_is_read_is_the_new_one(
    bundle: Bundle, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are checked and then read, by name: not those of two saves."""
    others, read = [replace(bundle, report={"seed": n}) for n in range(2)], Dispatcher.load

    def load(directory: Path) -> Dispatcher:
        if others:
            others.pop().save(saved)
        return read(directory)

    monkeypatch.setattr(Dispatcher, "load", load)
    assert load_bundle(saved).report == {"seed": 0}
    assert not others


def test_without_a_directory_it_is_the_shipped_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "SHIPPED", saved)
    assert load_bundle().report == {"note": "tiny"}


class TestDamage:
    def test_nothing_there(self, saved: Path) -> None:
        shutil.rmtree(saved)
        refused(saved, "expected a bundle directory or smollm2, got .*saved")
        saved.write_text("a file")
        refused(saved, "expected a bundle directory or smollm2, got .*saved")

    def test_an_empty_directory(self, tmp_path: Path) -> None:
        refused(tmp_path, "expected a bundle, with a bundle.json, in .*, got none")

    @pytest.mark.parametrize(
        "change",
        [
            lambda index: index.pop("format"),
            lambda index: index.update(format=2),
            lambda index: index.update(format="1"),
            lambda index: index.pop("files"),
            lambda index: index.update(files=["model/config.json"]),
            lambda index: index["files"].update({"model/config.json": "0" * 64}),
            lambda index: index["files"].update({"model/config.json": 5}),
            lambda index: index["files"].update({"../outside.json": "0" * 64}),
            lambda index: index["files"].update({"more.json": "0" * 64}),
            lambda index: index.update(report=["no", "mapping"]),
        ],
    )
    def test_an_edited_list(self, saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
        edit(saved, change)
        refused(saved, "expected .* got")

    @pytest.mark.parametrize("name", ["model/factors.safetensors", "experts/a", "dispatcher/a", "gate/gate.json"])
    def test_files_that_are_not_listed(self, saved: Path, name: str) -> None:
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).with_name(".DS_Store").write_text("icons")  # which a file manager leaves
        load_bundle(saved)
        (saved / name).write_text("x")
        refused(saved, f"expected no other files of its parts in .*, got {name}")

    @pytest.mark.parametrize("content", ["[]", "null", '"text"', "{}", "{'a': 1}"])
    def test_a_list_that_is_none(self, saved: Path, content: str) -> None:
        (saved / "bundle.json").write_text(content)
        refused(saved, "expected .*bundle.json, got")


class TestForeign:
    @pytest.fixture
    def other(
        self,
        bundle: Bundle,
        make_model: Callable[..., "MambaFormerForCausalLM"],
        make_bank: Callable[..., "ExpertBank"],
        tmp_path: Path,
    ) -> Path:
        """A bundle of another model."""
        model = make_model(seed=8)
        Bundle(model, make_bank(model), bundle.dispatcher).save(tmp_path / "other")
        return tmp_path / "other"

    @pytest.mark.parametrize("part", ["model", "experts"])
    def test_parts_of_two_bundles(self, saved: Path, other: Path, part: str) -> None:
        shutil.rmtree(saved / part)
        shutil.copytree(other / part, saved / part)
        refused(saved, "with checksum|expected the file experts")
        sign(saved)
        refused(saved, "expected experts made for base model .* got ones for", ForeignExpertError)

    def test_one_foreign_expert(self, saved: Path, other: Path) -> None:
        shutil.copy(the(other, "experts/sort.*.safetensors"), the(saved, "experts/sort.*.safetensors"))
        sign(saved)
        refused(saved, "expected expert sort to be made for base model", ForeignExpertError)

    def test_a_dispatcher_over_other_experts(self, bundle: Bundle) -> None:
        for names in (("reverse", "sort"), ("sort", "reverse", "add"), ("reverse", "sort", "add", "shift")):
            with pytest.raises(
                ConfigError, match=r"expected a dispatcher over .'reverse', 'sort', 'add'.* got one over"
            ):
                Bundle(bundle.model, bundle.experts, Dispatcher(names))

    def test_a_dispatcher_of_other_views(self, bundle: Bundle) -> None:
        embedded = Evidence({"embedding": np.eye(4).repeat(3, 0)})
        program = Admixture(views={"embedding": "vectors"})
        dispatcher = Dispatcher(bundle.experts.names, svi=SVISettings(steps=2, rounds=1), program=program)
        dispatcher.fit(embedded, mixtures=np.eye(4).repeat(3, 0))
        with pytest.raises(ConfigError, match=r"^expected a dispatcher of the views hidden, .*, got one of embedding$"):
            Bundle(bundle.model, bundle.experts, dispatcher)

    def test_engines_refuse_the_same(self, bundle: Bundle) -> None:
        parts = {"model": bundle.model, "tokenizer": bundle.tokenizer, "experts": bundle.experts}
        system = SimpleNamespace(**parts, dispatcher=Dispatcher(("reverse", "sort")))
        with pytest.raises(ConfigError, match="expected a dispatcher over"):
            BatchedEngine(system)
        with pytest.raises(ConfigError, match="expected a dispatcher over"):
            pytest.importorskip("bayes_dispatch.serving.vllm.engine").VllmEngine(system, "http://127.0.0.1:9")


def test_a_report_that_json_cannot_hold_is_not_saved(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^expected a report of JSON values, got another: .*int64"):
        replace(bundle, report={"prompts": np.int64(3)}).save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_dispatcher_that_is_not_fitted_is_not_saved(bundle: Bundle, saved: Path) -> None:
    before = checksums(saved)
    with pytest.raises(NotFittedError):
        Bundle(bundle.model, bundle.experts, Dispatcher(bundle.experts.names)).save(saved)
    assert checksums(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
