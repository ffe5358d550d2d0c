"""Experts of domains and their bundle: a run that was stopped goes on and ends in the same bundle."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.commands.main import main
from bayes_dispatch.app.training.build import BuildSettings, training_evidence
from bayes_dispatch.app.training.documents import DocumentsPlan, examples_of, train_documents
from bayes_dispatch.dispatcher.evidence.files import read_evidence
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import real_domains
from bayes_dispatch.experts.domains.own import OwnText
from bayes_dispatch.experts.training import ExpertSettings
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.model.transformers.backbone import TransformersBackbone
from tests.packages import install, install_translations
from tests.tiny import tiny_model, tiny_tokenizer

BUILD = BuildSettings(
    prompt_lengths=(12, 40),
    pure_prompts=12,
    mixed_prompts=8,
    gate_prompts=0,
    svi=SVISettings(steps=30, rounds=1, conditional_steps=10),
)


def text(letters: str, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join("".join(rng.choice(list(letters), 4)) for _ in range(6)) for _ in range(60))


DOMAINS = [OwnText("low", text("abcdefg", 0)), OwnText("high", text("QRSTUVW", 1))]


@pytest.mark.usefixtures("unchecked")
def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = TransformersBackbone.load(tmp_path / "model")
    experts = ExpertSettings(steps=3, batch_size=2, length=40, adapt_from=2, rank=2)
    plan, out = DocumentsPlan(experts, BUILD), tmp_path / "bundle"
    told: list[str] = []
    whole = train_documents(model, DOMAINS, plan, out, [], False, told.append)
    assert told[:2] == ["expert low", "expert high"]
    assert load_bundle(out).experts.digest == whole.experts.digest
    work = tmp_path / "bundle.work"
    (kept,) = work.rglob("train.npz")
    made = training_evidence(model, whole.experts, examples_of(DOMAINS, BUILD, []), (), BUILD)
    np.testing.assert_array_equal(made.mixtures, read_evidence(kept).mixtures)
    np.testing.assert_array_equal(made.evidence.views["hidden"], read_evidence(kept).evidence.views["hidden"])
    for expert in whole.experts.values():
        assert isinstance(expert, ExpertVector)
        assert {scales.dtype for scales in expert.scales.values()} == {torch.float16}
    shutil.rmtree(out)
    shutil.rmtree(work / "experts" / "high")  # as if it had been stopped there
    told.clear()
    again = train_documents(model, DOMAINS, plan, out, [], False, told.append)
    assert "expert high" in told
    assert "expert low" not in told
    assert again.report["gains"] == whole.report["gains"]
    first, second = (each.experts["high"].adaptation().scales for each in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    told.clear()
    others = [OwnText("low", text("xyz", 2)), DOMAINS[1], OwnText("middle", text("hijklmn", 3))]
    train_documents(model, others, plan, out, [], False, told.append)
    assert [line for line in told if line.startswith("expert")] == ["expert low", "expert middle"]
    assert set(load_bundle(out).report["gains"]) == {"low", "high", "middle"}
    told.clear()
    longer = DocumentsPlan(replace(experts, steps=4), BUILD)
    train_documents(model, DOMAINS, longer, out, [], False, told.append)
    assert [line for line in told if line.startswith("expert")] == ["expert low", "expert high"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("blocks", "first"), [(4, 2), (1, 0)])
def test_the_command_adapts_the_upper_half_of_any_model(
    blocks: int, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(dtype=torch.float32)
    del model.model.layers[blocks:]
    model.config.num_hidden_layers = blocks
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    begun = []

    def train(model: object, domain: object, settings: ExpertSettings, progress: bool) -> None:
        begun.append(settings.adapt_from)
        raise ConfigError("expected no training here, got as far as that")

    monkeypatch.setattr("bayes_dispatch.app.training.documents.train_expert", train)
    install_translations(tmp_path / "packages")
    install(tmp_path / "packages", "mkdocs-material", "1.0", {})
    words = ["train-documents", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    words += ["--packages", str(tmp_path / "packages"), "--domain", "de", "--domain"]
    for last, expected, told in (("icons", [], "expected mkdocs-material"), ("fr", [first], "got as far as that")):
        with pytest.raises(SystemExit):
            main([*words, last])
        assert (begun, told in capsys.readouterr().err) == (
            expected,
            True,
        )  # a package that lacks is told before any training


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--kind", "dora"], "expected a kind of svf or lora, got 'dora'"),
        (["--domain", "tlh"], f"expected a domain of {', '.join(real_domains())}, got 'tlh'"),
        (["--domain", "de", "--model", "nowhere/at/all"], "expected a directory, or a name on the hub"),
    ],
)
def test_what_cannot_be_trained_is_told_at_once(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train-documents", "--out", str(tmp_path / "out"), "--packages", str(tmp_path), *given])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
