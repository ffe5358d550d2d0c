"""What a stopped run left is taken up by its own kind alone: work of another version, of other settings or texts is
refused, or left where it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

import bayes_dispatch
from bayes_dispatch.app.training.build import kept_at
from bayes_dispatch.app.training.curriculum import CURRICULA, Curriculum
from bayes_dispatch.app.training.plans import PLANS, TrainingPlan
from bayes_dispatch.app.training.train import train_bundle
from bayes_dispatch.errors import BayesDispatchError
from bayes_dispatch.experts.domains.base import DomainCorpus
from bayes_dispatch.experts.domains.own import OwnText
from bayes_dispatch.storage import work_beside

PLAN = PLANS["smoke"]


class Stopped(Exception):
    pass


def curriculum(text: str) -> Curriculum:
    one = OwnText("one", text * 1000)
    return Curriculum(DomainCorpus({one: 1.0}), (one,), (one,), (), {}, {})


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Begins a run of a small curriculum, which is stopped, if nothing is wrong, before its first stage."""
    monkeypatch.setitem(CURRICULA, "conventions", lambda packages: curriculum(str(packages)))

    def stop(stage: str) -> None:
        raise Stopped

    def run(plan: TrainingPlan = PLAN, packages: Path | None = None) -> None:
        train_bundle(plan, tmp_path / "out", tmp_path / "work", packages=packages, announce=stop)

    return run


def refused(begin: Callable[..., None], *given: object) -> str:
    with pytest.raises(BayesDispatchError) as error:
        begin(*given)
    return str(error.value)


def test_training_goes_on_in_its_own_work_alone(
    begin: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        with pytest.raises(Stopped):
            begin()
    work, advice = tmp_path / "work", ": delete it, or use a new one"
    assert refused(begin, PLAN.with_seed(1)) == f"expected stages of seed 1 in {work}, got those of 0{advice}"
    assert refused(begin, PLAN, Path("other")).startswith("expected stages of texts '")
    monkeypatch.setattr(bayes_dispatch, "__version__", "9.9.9")
    assert refused(begin) == f"expected stages of version '9.9.9' in {work}, got those of '0.1.0'{advice}"
    (work / "plan.json").unlink()
    (work / "base").mkdir()
    assert refused(begin) == f"expected a new or empty directory, got {work}, which holds base"


def test_what_another_version_kept_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept_at(Path("out"), {"seed": 0})
    assert kept_at(Path("out"), {"seed": 0}) == before
    monkeypatch.setattr(bayes_dispatch, "__version__", "9.9.9")
    assert kept_at(Path("out"), {"seed": 0}) != before


def test_it_is_beside_the_directory_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    same = kept_at(tmp_path / "here", {"seed": 0})
    assert kept_at(Path("."), {"seed": 0}) == kept_at(Path("../here"), {"seed": 0}) == same
    assert same.parent == work_beside(Path(".")) == tmp_path.resolve() / "here.work"
