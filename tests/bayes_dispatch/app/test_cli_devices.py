"""``--device`` and ``--dtype``: a bundle's model of transformers runs as it is told, this time; what cannot be is one
line. The bundle is of a tiny Llama, whose checkpoint is of float64 and which it reads in bfloat16."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bayes_dispatch.app.bundle import Bundle, load_bundle, transformers_backbone
from bayes_dispatch.app.bundle_at import BundleAt
from bayes_dispatch.app.shipped import SHIPPED
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.generator import TwoPassGenerator
from tests.bayes_dispatch.app.conftest import run
from tests.tiny import tiny_tokenizer

ABSENT = "cuda:99" if torch.cuda.is_available() else "cuda"
COMMANDS = {
    "generate": ["--prompt", "a"],
    "chat": [],
    "compare": ["--documents", "2"],
    "fit": ["--examples", "examples.jsonl", "--out", "new"],
    "serve": ["--port", "0"],
}


@pytest.fixture(scope="module")
def saved(llama64: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    llama64.model.model.save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    model = transformers_backbone(str(directory / "model"), device="cpu", dtype="auto", cast="bfloat16")
    Bundle(model, llama64.experts, llama64.dispatcher).save(directory / "bundle")
    return directory / "bundle"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("ours", [False, True], ids=["transformers", "shipped"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_is_not_there_is_one_line(
    command: str, ours: bool, saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if command == "serve":
        pytest.importorskip("starlette", reason="needs the extra serve")
    given, files = [] if ours else ["--bundle", saved], [Path("examples.jsonl")] if command == "fit" else []
    for file in files:
        file.write_text('{"text": "ab"}\n')
    code, out, err = run(capfd, command, *COMMANDS[command], *given, "--device", ABSENT)
    told = (
        f"bundle of a transformers model for {ABSENT}, got {SHIPPED}, one of our own, on the CPU"
        if ours
        else "device of this "
    )
    assert (code, out) == (2, "")
    assert err.startswith(f"bayes-dispatch: error: expected a {told}")
    assert (err.count("\n"), ABSENT in err, list(Path().iterdir())) == (1, True, files)


def test_a_dtype_reaches_the_model_that_writes(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Numbers are those of the model in float32, and not those of bfloat16, which is the bundle's own."""
    asked = ["generate", "--bundle", saved, "--prompt", "abc", "--max-new-tokens", "2", "--json"]
    found = [json.loads(run(capfd, *asked, *given)[1])["log_probabilities"] for given in ([], ["--dtype", "float32"])]
    for ours, dtype in zip(found, (torch.bfloat16, torch.float32), strict=True):
        system = load_bundle(saved, dtype=str(dtype).removeprefix("torch."))
        assert system.model.dtype == dtype
        expected = TwoPassGenerator(system).generate(["abc"], max_new_tokens=2, seed=0)
        np.testing.assert_array_equal(ours, expected.log_probabilities)
    assert found[0] != found[1]


def test_fit_in_another_dtype_leaves_that_of_the_bundle(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [{"expert": ["reverse", "sort", "add"][n % 3], "text": "xyz"[n % 3] * (1 + n % 5)} for n in range(30)]
    Path("examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--examples", "examples.jsonl", "--bundle", saved, "--dtype", "float32", "--out", "new"]
    assert run(capfd, "fit", *given)[0] == 0
    assert json.loads(Path("new/base.json").read_text()) == json.loads((saved / "base.json").read_text())
    assert load_bundle("new").model.dtype == torch.bfloat16


def test_a_bundle_that_is_named_to_others_is_loaded_there_in_the_same_way(saved: Path) -> None:
    def sent(**settings: Any) -> BundleAt:
        there: BundleAt = pickle.loads(pickle.dumps(BundleAt.here(saved, **settings)))
        return there

    assert sent().load().model.dtype == torch.bfloat16
    assert sent(dtype="float32").load().model.dtype == torch.float32
    with pytest.raises(ConfigError, match=f"expected a device of this machine, got {ABSENT}"):
        sent(device=ABSENT).load()
