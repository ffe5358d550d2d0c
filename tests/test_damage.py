"""Every kind of thing that we keep, damaged in every way. Laws, for each file of each kind:

- what was saved is what is loaded: saved again, it is the same bytes;
- a file that is missing, cut, longer, changed by a bit, of another kind or version, is refused in one line, or what is
  loaded is what was saved; the former where that cannot be;
- a link in the place of a file is read, and is never written to or replaced by a later save;
- a file that is not ours in a saved directory is neither read nor lost; a directory cannot be taken for a file.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

from bayes_dispatch.app.bundle import SHIPPED, Bundle, load_bundle
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.files import read_evidence, write_evidence
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.dispatcher.prior.file import read_prior, write_prior
from bayes_dispatch.dispatcher.prior.online import prior_state
from bayes_dispatch.errors import BayesDispatchError, BundleError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import TopK
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.model.mambaformer.cache.cache import Cache
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.mambaformer.svd.files import load_factors, save_factors
from bayes_dispatch.model.pretraining.checkpoints import Identity, load_checkpoint, save_checkpoint
from bayes_dispatch.model.pretraining.recipe import PretrainingSettings
from bayes_dispatch.storage import digest, read_directory, read_tensors, write_directory, write_tensors

if TYPE_CHECKING:
    MakeModel = Callable[..., MambaFormerForCausalLM]

WORDS = ["ab>ba\n", "1+2=3\n", "kfpa>"]
COMPONENTS = ("a", "b", "base")


class Kind(NamedTuple):
    """How one thing is saved, and loaded and saved again; both are given the path of a file or a directory."""

    save: Callable[[Path], Any]
    again: Callable[[Path, Path], Any]
    newer: Callable[[Path], Any] | None = None  # makes it one of a version that is yet to come


def edit(file: Path, change: Callable[[dict[str, Any]], object], seal: bool = False) -> None:
    data = json.loads(file.read_text())
    change(data)
    if seal:
        data.pop("digest")
        data["digest"] = digest(data)
    file.write_text(json.dumps(data))


def newer_document(path: Path, kind: str) -> None:
    document, arrays = read_directory(path, kind)
    write_directory(path, kind, {**document, "version": document["version"] + 1}, arrays)


def newer_tensors(path: Path) -> None:
    tensors, header = read_tensors(path)
    kind, _, version = header["format"].rpartition(" ")
    write_tensors(path, tensors, {**header, "format": f"{kind} {int(version) + 1}"})


def model_again(old: Path, new: Path) -> None:
    MambaFormerForCausalLM.from_pretrained(old).save_pretrained(new)


def factors_again(old: Path, new: Path) -> None:
    """Those that were read; they are decomposed anew where there are none."""
    model = MambaFormerForCausalLM.from_pretrained(old)
    model.save_pretrained(new)
    if load_factors(model, old):
        save_factors(model, new, rank=3)


def bank_again(old: Path, new: Path) -> None:
    ExpertBank(list(ExpertBank.load(old).values())).save(new)


@pytest.fixture(scope="module")
def kinds(make_model: "MakeModel", bundle: Bundle) -> dict[str, Kind]:
    model, dispatcher = make_model(), bundle.dispatcher
    evidence = first_pass(model, bundle.tokenizer, WORDS * 40).evidence
    gate = Gate.calibrate(dispatcher, evidence, bins=1)
    whole = Bundle(model, bundle.experts, dispatcher, {"note": "x"}, evidence={"add": evidence}, gate=gate)
    identity = Identity(model.config, PretrainingSettings(steps=3), "float32")

    def checkpoint(path: Path) -> None:
        trained = make_model(seed=1)
        optimizer = torch.optim.AdamW(trained.parameters())
        trained(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
        optimizer.step()
        save_checkpoint(path, trained, optimizer, identity, 2)

    def checkpoint_again(old: Path, new: Path) -> None:
        other = make_model(seed=2)
        optimizer = torch.optim.AdamW(other.parameters())
        save_checkpoint(new, other, optimizer, identity, load_checkpoint(old, other, optimizer, identity))

    def cache(path: Path) -> None:
        state = model.init_cache(2, 8)
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache=state)
        state.save(path)

    def factored(path: Path) -> None:
        model.save_pretrained(path)
        save_factors(make_model(), path, rank=3)

    def chat(path: Path) -> None:
        TwoPassGenerator(whole).chat(blend=TopK(), file=path).say("ab>", 2)

    state = prior_state(np.array([3.0, 3.0, 1.5]), COMPONENTS)
    return {
        "model": Kind(model.save_pretrained, model_again),
        "factors": Kind(factored, factors_again),
        "cache": Kind(cache, lambda old, new: Cache.load(old).save(new), newer_tensors),
        "checkpoint": Kind(checkpoint, checkpoint_again),
        "bank": Kind(whole.experts.save, bank_again, lambda p: edit(p / "bank.json", lambda i: i.update(format=3))),
        "dispatcher": Kind(
            dispatcher.save,
            lambda old, new: Dispatcher.load(old).save(new),
            lambda path: newer_document(path, "dispatcher"),
        ),
        "gate": Kind(
            gate.save, lambda old, new: Gate.load(old).save(new), lambda path: newer_document(path, "gate")
        ),
        "bundle": Kind(
            whole.save,
            lambda old, new: load_bundle(old).save(new),
            lambda path: edit(path / "bundle.json", lambda index: index.update(format=2)),
        ),
        "prior": Kind(
            lambda path: write_prior(path, state),
            lambda old, new: write_prior(new, read_prior(old, COMPONENTS)),
            lambda path: edit(path, lambda body: body.update(version=2), seal=True),
        ),
        "evidence": Kind(
            lambda path: write_evidence(path, evidence),
            lambda old, new: write_evidence(new, read_evidence(old).evidence),
        ),
        "chat": Kind(
            chat, lambda old, new: TwoPassGenerator(whole).resume_chat(old).save(new), newer_tensors
        ),
    }  # fmt: skip


NAMES = ("model", "factors", "cache", "checkpoint", "bank", "dispatcher", "gate", "bundle", "prior", "evidence", "chat")


@pytest.fixture(scope="module")
def pristine(kinds: dict[str, Kind], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    assert tuple(kinds) == NAMES
    found = {name: tmp_path_factory.mktemp("pristine") / name for name in NAMES}
    for name, path in found.items():
        kinds[name].save(path)
    return found


def files(path: Path) -> dict[str, bytes]:
    """By their paths below it; "" is the path itself."""
    every = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in every}


def flip(data: bytes, place: float) -> bytes:
    changed = bytearray(data)
    changed[int(place * (len(data) - 1))] ^= 4
    return bytes(changed)


CERTAIN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "end cut": lambda data: data.rstrip()[:-1],
    "longer": lambda data: data + b"x",
    "JSON of something else": lambda data: b"[1, 2]",
    "pickled": lambda data: b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.",
}
POSSIBLE: dict[str, Callable[[bytes], bytes]] = {  # what a bit changes may be layout alone
    f"bit at {place:.0%}": lambda data, place=place: flip(data, place) for place in (0.02, 0.3, 0.6, 0.9, 1.0)
}


@pytest.mark.parametrize("name", NAMES)
def test_damage(name: str, kinds: dict[str, Kind], pristine: dict[str, Path], tmp_path: Path) -> None:
    kind, whole, path, copy = kinds[name], files(pristine[name]), tmp_path / "it", tmp_path / "again"
    tried = 0

    def outcome() -> str | None:
        """The line that refuses it; none where all is as it was."""
        nonlocal tried
        tried += 1
        shutil.rmtree(copy, ignore_errors=True)
        if copy.is_file():
            copy.unlink()
        try:
            kind.again(path, copy)
        except BayesDispatchError as error:
            return str(error)
        assert files(copy).keys() >= (whole.keys() if name != "factors" else {"config.json"})
        assert all(files(copy)[each] == whole[each] for each in files(copy))
        return None

    shutil.copytree(pristine[name], path) if pristine[name].is_dir() else shutil.copy(pristine[name], path)
    assert outcome() is None
    for each, data in whole.items():
        file = path if path.is_file() else path / each
        for damage, change in (CERTAIN | POSSIBLE).items():
            file.write_bytes(change(data))
            line = outcome()
            if line is not None:
                assert re.fullmatch("[^\n]*expected [^\n]*got[^\n]+", line)
            else:  # behind its end a zip file may have anything
                assert damage in POSSIBLE or (name, damage) == ("evidence", "longer"), (each, damage)
        file.unlink()
        assert name in ("checkpoint", "factors") or outcome() is not None, (each, "missing")  # these two begin anew
        file.mkdir()
        assert name == "factors" or outcome() is not None, (each, "a directory")
        file.rmdir()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_bytes(data)
        file.symlink_to(elsewhere)
        assert outcome() is None, (each, "a link")
        if path.is_dir() and name != "checkpoint":
            with pytest.raises(BundleError, match=r"got other things in it: .*\(a link\)"):
                kind.save(path)
            assert file.is_symlink()
        assert elsewhere.read_bytes() == data
        file.unlink()
        file.write_bytes(data)
    assert outcome() is None
    assert tried > 10 * len(whole)
    if path.is_dir():
        (path / "notes").write_text("mine")
        assert outcome() is None
        if name != "checkpoint":
            with pytest.raises(BundleError, match="got other things in it: notes"):
                kind.save(path)
        assert (path / "notes").read_text() == "mine"
        (path / "notes").unlink()
        kind.save(path)
    if kind.newer is not None:
        kind.newer(path)
        assert outcome() is not None


def test_earlier_saves_load_and_are_replaced(tmp_path: Path) -> None:
    """The shipped bundle has no digest in its model, and its parts none of later formats."""
    shutil.copytree(SHIPPED, tmp_path / "bundle")
    before = load_bundle(tmp_path / "bundle")
    before.save(tmp_path / "bundle")
    after = load_bundle(tmp_path / "bundle")
    assert after.model.fingerprint() == before.model.fingerprint()
    assert sorted(os.listdir(tmp_path / "bundle")) == sorted(os.listdir(SHIPPED))
    shutil.copytree(SHIPPED / "model", tmp_path / "model")
    before.model.save_pretrained(tmp_path / "model")
    assert MambaFormerForCausalLM.from_pretrained(tmp_path / "model").fingerprint() == before.model.fingerprint()
