"""Training a bundle end to end, by the smallest plan, runs every stage; a stopped run goes on to the same bundle, a
finished one is not done again."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.tables import report_tables
from bayes_dispatch.app.training.curriculum import CURRICULA
from bayes_dispatch.app.training.plans import PLANS
from bayes_dispatch.app.training.train import train_bundle
from bayes_dispatch.experts.domains import EXPERT_DOMAINS
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import DEFAULT_BLEND
from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
from bayes_dispatch.model.subwords import SubwordTokenizer
from tests.packages import install_translations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_day() -> Iterator[None]:
    """All experts are of one date, whenever the tests run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        yield


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("runs") / "bundle"
    return [sys.executable, "-m", "bayes_dispatch", "train", "--plan", "smoke", "--out", str(out), "--json"]


@pytest.fixture(scope="module")
def trained(command: list[str]) -> tuple[Path, str]:
    """The bundle, and what the command printed."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(command[-2]), done.stdout


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_bundle_and_report(trained: tuple[Path, str]) -> None:
    out, printed = trained
    bundle = load_bundle(out)
    assert bundle.experts.names == tuple(domain.name for domain in EXPERT_DOMAINS)
    told = json.loads(printed)
    assert bundle.report == {name: part for name, part in told.items() if name != "gate"}
    assert bundle.gate is not None
    assert told["gate"]["ranks"] == len(bundle.gate.scores)
    assert len(bundle.gate.scores) == (8 * 20 + 160) * 3 // 4  # a quarter of each of two groups is for regressions
    titles = " ".join(table.title for table in report_tables(bundle.report))
    assert all(part in titles for part in ("Experts", "Dispatch", "Calibration", "one domain", "alternate", "switch"))


def test_finished_run_is_not_done_again(trained: tuple[Path, str], command: list[str]) -> None:
    before = contents(trained[0])
    shutil.rmtree(trained[0])
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == trained[1]
    assert "pre-training" not in done.stderr
    assert contents(trained[0]) == before


def test_stopped_run_goes_on_to_the_same_bundle(trained: tuple[Path, str], tmp_path: Path) -> None:
    """From pre-training's last checkpoint and some experts, in one process instead of two, with a stop between."""
    out, work = tmp_path / "bundle", tmp_path / "work"
    shutil.copytree(trained[0].with_name("bundle.work"), work)
    for done in ("base", "experts/sort", "experts/json", "dispatcher", "gate", "unjudged", "judged"):
        shutil.rmtree(work / done)

    class Stopped(Exception):
        pass

    def stop(stage: str) -> None:
        if stage == "evaluation":
            raise Stopped

    with pytest.raises(Stopped):
        train_bundle(PLANS["smoke"], out, work, processes=1, progress=False, announce=stop)
    assert not out.exists()
    train_bundle(PLANS["smoke"], out, work, processes=1, progress=False)
    assert contents(out) == contents(trained[0])


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packages")
    install_translations(directory)
    return directory


def test_translations_become_a_bundle_in_subwords(packages: Path, tmp_path: Path) -> None:
    """Stopped after its first stage, whose tokenizer is the same whenever it is learnt, and which is done once."""

    class Stopped(Exception):
        pass

    def stop(stage: str) -> None:
        if stage == "experts":
            raise Stopped

    plan, out, work = PLANS["translations-smoke"], tmp_path / "out", tmp_path / "out.work"
    with pytest.raises(Stopped):
        train_bundle(plan, out, progress=False, packages=packages, announce=stop)
    learnt = CURRICULA["translations"](packages).subwords(300, plan.seed)
    assert learnt.to_json() == (work / "tokenizer.json").read_bytes()
    (work / "pretraining" / "pretraining.safetensors").unlink()  # which is not read again
    base = MambaFormerForCausalLM.from_pretrained(work / "base")
    bundle = train_bundle(plan, out, progress=False, packages=packages)
    assert bundle.model.fingerprint() == base.fingerprint()
    assert bundle.model.vocab_size == plan.vocabulary
    assert bundle.experts.names == ("de", "fr", "es", "pt", "pt_BR", "nb", "da", "ru")
    assert isinstance(bundle.tokenizer, SubwordTokenizer)
    assert load_bundle(out).tokenizer.tokenize("de é") == learnt.tokenize("de é")
    assert bundle.report["pure"].keys() == bundle.report["experts"].keys() == set(bundle.experts.names)
    assert "de & fr" in bundle.report["mixed"]
    assert "nb then da" in bundle.report["switching"]
    per_byte, per_token = (bundle.report["experts"]["de"]["base"][name][0] for name in ("nll", "nll_per_token"))
    assert per_token > 1.2 * per_byte > 0  # a token has more than a byte
    result = TwoPassGenerator(load_bundle(out)).generate(["EN: Add page 3\nTR:"], blend=DEFAULT_BLEND, max_new_tokens=4)
    assert len(result.texts) == 1
