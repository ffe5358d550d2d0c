"""A resumed chat goes on as it would have, also after a kill; a save that fails takes its turn back. Files of others,
and what does not fit together, are refused; damage: tests/test_damage.py."""

import os
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bayes_dispatch.errors import BundleError, ConfigError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.chat import chat as chat_module
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import (
    BestExpert,
    Blend,
    FixedWeights,
    PosteriorPredictive,
    RefinedMean,
    TopK,
)
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.storage import TEMPORARY, read_tensors, write_tensors

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle

SAID = ["kfpa>apfk\nbcde>", "é+1=", "ab>ba\nbc>", "12+11=", "kk>"]
BLENDS: list[Blend] = [
    PosteriorPredictive(6, merge=0.05),
    RefinedMean(6),
    TopK(3),
    BestExpert(),
    FixedWeights((0.5, 0.5, 0.0, 0.0)),
]

# Says the turns, one a line of its argument, in the bundle and the file that it is given; then waits to be killed.
TALK = """
import sys
import bayes_dispatch as bd
bundle, file, *turns = sys.argv[1:]
chat = bd.TwoPassGenerator(bd.load_bundle(bundle)).chat(blend=bd.PosteriorPredictive(6), seed=4, file=file)
for turn in turns:
    chat.say(turn, 5, do_sample=True, stop=None)
    print(flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("unchecked")
def test_a_blend_of_numpy_numbers(cut64: "Bundle", tmp_path: Path) -> None:
    """It is stored as what it says."""
    blend = FixedWeights(np.array([0.25, 0.75, 0, 0]))  # type: ignore[arg-type]
    TwoPassGenerator(cut64).chat(blend=blend, file=tmp_path / "chat").say("ab>", 1)
    resumed = TwoPassGenerator(cut64).resume_chat(tmp_path / "chat")
    assert resumed.settings.blend == FixedWeights((0.25, 0.75, 0.0, 0.0))


@pytest.mark.parametrize(("name", "blend"), [("llama64", BLENDS[0]), *(("cut64", blend) for blend in BLENDS)], ids=repr)
def test_a_resumed_chat_goes_on_as_it_would_have(
    request: pytest.FixtureRequest, name: str, blend: Blend, tmp_path: Path
) -> None:
    """Resumed before every turn, with merged and forgotten parts."""
    generator, file = TwoPassGenerator(request.getfixturevalue(name)), tmp_path / "new" / "chat"
    given: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "stop": None}
    settings: dict[str, Any] = {"seed": 3, "threshold": 0.02, "max_context": 50, "own_evidence": True}
    whole = generator.chat(blend=blend, **settings)
    generator.chat(blend=blend, **settings).save(file)
    for n, text in enumerate(SAID):
        resumed = generator.resume_chat(file)
        assert (resumed.settings, resumed.turns) == (whole.settings, n)
        turns = whole.say(text, 5, **given), resumed.say(text, 5, **given)
        assert turns[0].text == turns[1].text
        assert turns[0].adapted == turns[1].adapted
        np.testing.assert_allclose(turns[0].log_probabilities, turns[1].log_probabilities, atol=1e-9)
        np.testing.assert_allclose(turns[0].weights, turns[1].weights, atol=1e-9)
        assert resumed.transcript.data == whole.transcript.data
        for each in ("ids", "own", "user", "spans"):
            np.testing.assert_array_equal(getattr(resumed.transcript, each), getattr(whole.transcript, each))
    assert sum(generator.resume_chat(file).transcript.own) > 0


def test_a_killed_chat_resumes(bundle: "Bundle", tmp_path: Path) -> None:
    bundle.save(tmp_path / "bundle")
    file = tmp_path / "chat"
    command = [sys.executable, "-c", TALK, str(tmp_path / "bundle"), str(file), *SAID[:2]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"\n"] * 2
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    file.with_name(f".chat{TEMPORARY}").write_bytes(b"half")  # as one leaves that is killed while it writes
    generator = TwoPassGenerator(bundle)
    whole, resumed = generator.chat(blend=PosteriorPredictive(6), seed=4), generator.resume_chat(file)
    for text in SAID[:2]:
        whole.say(text, 5, do_sample=True, stop=None)
    assert resumed.transcript.data == whole.transcript.data
    one, other = (chat.say(SAID[2], 5, do_sample=True, stop=None) for chat in (whole, resumed))
    assert sorted(os.listdir(tmp_path)) == ["bundle", "chat"]
    assert one.text == other.text
    np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)


@pytest.fixture
def saved(cut64: "Bundle", tmp_path: Path) -> Path:
    chat = TwoPassGenerator(cut64).chat(blend=PosteriorPredictive(6), file=tmp_path / "chat")
    chat.say(SAID[0], 3)
    return tmp_path / "chat"


def test_arrays_that_do_not_fit_are_refused(cut64: "Bundle", saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose digest is right, as somebody may have made it so."""
    tensors, header = read_tensors(saved)
    cases: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"own": tensors["own"][1:]}, {}),
        ({"own": ~tensors["own"]}, {}),
        ({"user": tensors["user"].int()}, {}),
        ({"ids": tensors["ids"] + 250}, {}),
        ({"spans": tensors["spans"][:, :1]}, {}),
        ({"spans": tensors["spans"] + 1}, {}),
        ({"rows": 2 * tensors["rows"]}, {}),
        ({"rows": tensors["rows"][:, 1:]}, {}),
        ({"joint": tensors["joint"] * float("nan")}, {}),
        ({"target": tensors["target"][1:]}, {}),
        ({"rates": tensors["rates"][1:]}, {}),
        ({}, {"turns": "-1"}),
        ({}, {"turns": "many"}),
        ({}, {"settings": "{}"}),
        ({}, {"settings": header["settings"].replace("PosteriorPredictive", "Popen")}),
        ({}, {"settings": header["settings"].replace('"threshold": 0.01', '"threshold": -1')}),
    ]
    for arrays, texts in cases:
        write_tensors(saved, tensors | arrays, header | texts)
        with pytest.raises(BundleError, match="expected a chat in"):
            TwoPassGenerator(cut64).resume_chat(saved)
    write_tensors(saved, {name: tensor for name, tensor in tensors.items() if name != "rows"}, header)
    with pytest.raises(BundleError, match="KeyError: 'rows'"):
        TwoPassGenerator(cut64).resume_chat(saved)


def test_a_file_of_bytes(cut64: "Bundle", llama64: Any, saved: Path) -> None:
    """As they were before: read where tokens are bytes."""
    tensors, header = read_tensors(saved)
    expected = TwoPassGenerator(cut64).resume_chat(saved).say(SAID[1], 4)
    old = {name: tensor for name, tensor in tensors.items() if name not in ("ids", "user", "spans")}
    write_tensors(saved, old, header | {"format": "bayes-dispatch chat 1"})
    one = TwoPassGenerator(cut64).resume_chat(saved)
    assert one.say(SAID[1], 4).token_ids.tolist() == expected.token_ids.tolist()
    write_tensors(saved, old, header | {"format": "bayes-dispatch chat 1"})
    with pytest.raises(BundleError, match="expected a file of format 'bayes-dispatch chat 2' in"):
        TwoPassGenerator(llama64).resume_chat(saved)


def test_other_adapters_are_refused(llama64: Any, tmp_path: Path) -> None:
    TwoPassGenerator(llama64).chat(blend=TopK()).save(tmp_path / "chat")
    moved = [
        LoraExpert(e.name, {m: (down, up + 0.1) for m, (down, up) in e.factors.items()}, e.base)
        for e in llama64.experts.values()
    ]
    other = SimpleNamespace(**{**vars(llama64), "experts": ExpertBank(moved)})
    with pytest.raises(BundleError, match="expected a chat with this bundle's scales "):
        TwoPassGenerator(other).resume_chat(tmp_path / "chat")


def test_foreign_files_are_refused(cut64: "Bundle", bundle: "Bundle", saved: Path, make_model: Any) -> None:
    from bayes_dispatch.app.bundle import Bundle

    def other(bank: ExpertBank, model: Any = cut64.model, dispatcher: Any = cut64.dispatcher) -> TwoPassGenerator:
        return TwoPassGenerator(Bundle(model, bank, dispatcher))

    experts = [cut64.experts[name] for name in cut64.experts]
    model = make_model(seed=5, dtype=torch.float64)
    moved = [ExpertVector(e.name, dict(e.scales), model.fingerprint()) for e in experts]
    scaled = [ExpertVector(e.name, {m: 2 * z for m, z in e.scales.items()}, e.base) for e in experts]
    for generator, what in (
        (other(ExpertBank(moved), model), "model"),
        (other(ExpertBank(scaled)), "scales"),
        (other(cut64.experts, dispatcher=bundle.dispatcher), "dispatcher"),
    ):
        with pytest.raises(
            BundleError, match=rf"expected a chat with this bundle's {what} in [^ ]+, got one with another bundle's$"
        ):
            generator.resume_chat(saved)


def test_a_dispatcher_that_was_fitted_again_owns_what_is_said_then(cut64: "Bundle", tmp_path: Path) -> None:
    system = replace(cut64, dispatcher=deepcopy(cut64.dispatcher))
    generator = TwoPassGenerator(system)
    chat = generator.chat(blend=TopK(), file=tmp_path / "chat")
    chat.say(SAID[0], 1)
    evidence = first_pass(cut64.model, cut64.tokenizer, SAID[:4], cut=cut64.cut).evidence
    system.dispatcher.fit(evidence, np.arange(4) % 3)
    assert system.dispatcher.fingerprint != cut64.dispatcher.fingerprint
    chat.say(SAID[1], 1)
    assert generator.resume_chat(tmp_path / "chat").turns == 2
    with pytest.raises(BundleError, match="expected a chat with this bundle's dispatcher "):
        TwoPassGenerator(cut64).resume_chat(tmp_path / "chat")


def test_the_experts_are_hashed_once(cut64: "Bundle", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are all of a large bundle's weights but its model's, and they never change."""
    hashed: list[int] = []
    blend = ExpertBank.blend

    def counted(self: ExpertBank, weights: torch.Tensor, alike: bool = False) -> Any:
        if torch.equal(weights, torch.eye(4, dtype=weights.dtype)):  # all that they are
            hashed.append(len(weights))
        return blend(self, weights, alike)

    monkeypatch.setattr(ExpertBank, "blend", counted)
    generator = TwoPassGenerator(replace(cut64, experts=ExpertBank([cut64.experts[name] for name in cut64.experts])))
    chat = generator.chat(blend=TopK(), file=tmp_path / "chat")
    for text in SAID[:2]:
        chat.say(text, 1)
    generator.resume_chat(tmp_path / "chat").say(SAID[2], 1)
    generator.chat(blend=TopK()).save(tmp_path / "another")
    assert hashed == [4]


class OwnBlend(FixedWeights):
    """A blend that no table knows."""


def test_what_cannot_be_written(cut64: "Bundle", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TwoPassGenerator(cut64)
    with pytest.raises(ConfigError, match=r"expected a blend of .* in a chat with a file, got OwnBlend"):
        generator.chat(blend=OwnBlend((1.0, 0.0, 0.0, 0.0)), file=tmp_path / "chat")
    for path in (tmp_path, Path(__file__)):
        with pytest.raises(ConfigError, match=r"expected a new file for a chat, got .*, which exists"):
            generator.chat(blend=TopK(), file=path)
    with pytest.raises(BundleError, match="got a directory"):
        generator.chat(blend=TopK()).save(tmp_path)
    chat = generator.chat(blend=TopK(), file=tmp_path / "chat")
    chat.say(SAID[0], 3)
    before = (tmp_path / "chat").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            chat.say(SAID[1], 3)
    assert [file.name for file in tmp_path.iterdir()] == ["chat"]
    assert (tmp_path / "chat").read_bytes() == before
    (tmp_path / "link").symlink_to("chat")
    chat.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert generator.resume_chat(tmp_path / "chat").turns == 1  # the turn that could not be kept was taken back


def test_a_chat_that_goes_on_twice(cut64: "Bundle", saved: Path) -> None:
    """The turns of whoever was first stay; the other's turn is taken back, and it may go on in a file of its own."""
    generator = TwoPassGenerator(cut64)
    one, other = (generator.resume_chat(saved) for _ in range(2))
    for text in SAID[1:3]:
        one.say(text, 3)
    kept, transcript = saved.read_bytes(), other.transcript.data
    for _ in range(2):
        with pytest.raises(BundleError, match=r"expected the chat in .* after turn 1, got one that went on elsewhere"):
            other.say(SAID[1], 3)
    assert (saved.read_bytes(), other.turns, other.transcript.data) == (kept, 1, transcript)
    other.save(saved)  # which puts it in the place of the other's
    other.say(SAID[1], 3)
    assert generator.resume_chat(saved).turns == 2
    with pytest.raises(BundleError, match="went on elsewhere"):
        one.say(SAID[1], 3)


@pytest.mark.usefixtures("unchecked")
def test_a_save_that_fails_takes_the_turn_back(
    cut64: "Bundle", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat is as it was before the turn, in memory and on disk, and goes on as it would have."""
    generator = TwoPassGenerator(cut64)
    free = generator.chat(blend=PosteriorPredictive(6), seed=np.int64(3))
    chat = generator.chat(blend=PosteriorPredictive(np.int64(6)), seed=np.int64(3), file=tmp_path / "talk")
    for each in (free, chat):
        each.say(SAID[0], 5)
    first = chat.turn

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(chat_module, "write_chat", full)
        with pytest.raises(OSError, match="No space left"):
            chat.say(SAID[2], 5)
    assert chat.turns == 1
    assert chat.turn is first
    assert generator.resume_chat(tmp_path / "talk").turns == 1
    assert chat.say(SAID[2], 5).text == free.say(SAID[2], 5).text
