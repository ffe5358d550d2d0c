"""Training a bundle end to end, by the smallest plan, runs every stage; a stopped run goes on to the same bundle, a
finished one is not done again, and work of another plan is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.tables import report_tables
from bayes_dispatch.app.train import PLANS, train_bundle
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import EXPERT_DOMAINS

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
    assert bundle.report == json.loads(printed)
    assert bundle.gate is not None
    assert len(bundle.gate.scores) == (8 * 20 + 160) * 3 // 4
    titles = " ".join(table.title for table in report_tables(bundle.report))
    assert all(part in titles for part in ("Experts", "Dispatch", "Calibration", "one domain", "alternate", "switch"))


def test_finished_run_is_not_done_again(trained: tuple[Path, str], command: list[str]) -> None:
    before = contents(trained[0])
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


def test_work_of_another_plan_is_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected stages of this plan .* got those of another"):
        train_bundle(PLANS["smoke"].with_seed(1), tmp_path / "bundle", trained[0].with_name("bundle.work"))
