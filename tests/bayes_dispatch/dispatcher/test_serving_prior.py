"""The dispatcher online: labels and rewards change what it serves at once, none is lost between threads, its prior
outlives it and belongs to its experts, and drift shows."""

import copy
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bayes_dispatch.dispatcher import estimator
from bayes_dispatch.dispatcher import gate as gates
from bayes_dispatch.dispatcher.drift import drift_monitor, watch
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.dispatcher.prior.online import prior_state
from bayes_dispatch.errors import BundleError, ConfigError, NotFittedError, TensorError
from bayes_dispatch.storage.files import alone_in
from tests.bayes_dispatch.conftest import coarsely

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bayes_dispatch.conftest import Sample

    Settings = Callable[..., dict[str, Any]]

ONE_LINE = r"^expected [^\n]*got[^\n]+$"


@pytest.fixture
def own(fitted: Dispatcher, tmp_path: "Path") -> Dispatcher:
    """A copy of the fitted dispatcher, through a file, that a test may change."""
    fitted.save(tmp_path / "own")
    return Dispatcher.load(tmp_path / "own")


def test_it_begins_with_the_programs_prior(own: Dispatcher) -> None:
    np.testing.assert_allclose(own.prior.mean, np.array([3, 3, 3, 1.5]) / 10.5)
    assert own.prior.events == 0


def test_labels_reach_what_is_served(own: Dispatcher, fresh: "Sample") -> None:
    """After forty labels of one expert, prompts that lack evidence go to it; nothing is refitted."""
    nothing = Evidence(fresh.evidence.views, missing={name: np.ones(60, bool) for name in fresh.evidence.views})
    before = own.predict_proba(nothing)[:, 1].mean()
    clear = own.predict_proba(fresh.evidence)[fresh.labels == 0, 0].mean()
    own.update([1] * 40)
    assert own.prior.events == 40
    assert own.prior.mean[1] > 0.75
    assert own.predict_proba(nothing)[:, 1].mean() > before + 0.2
    assert own.predict_proba(fresh.evidence)[fresh.labels == 0, 0].mean() > clear - 0.3  # evidence still speaks
    forgetful = own.update([2] * 5, forgetting=0.5)
    assert forgetful.mean[2] > forgetful.mean[1]


def test_rewards_are_softer_than_labels(own: Dispatcher, fresh: "Sample") -> None:
    start = own.prior
    right = own.feedback(["add"] * 10, [1.0] * 10)
    assert start.mean[2] < right.mean[2]
    own.prior = start
    wrong = own.feedback("add", 0.0)
    assert wrong.mean[2] < start.mean[2]
    assert wrong.mean[0] > start.mean[0]
    own.prior = start
    rows = np.flatnonzero(fresh.labels == 0)[:4]
    with_evidence = own.feedback(["sort"] * 4, np.ones(4), fresh.evidence.select(rows))
    own.prior = start
    assert with_evidence.mean[0] > own.feedback(["sort"] * 4, np.ones(4)).mean[0]


def between_lines(
    dispatcher: Dispatcher, ask: Callable[[Dispatcher], Any], act: Callable[[Dispatcher], object]
) -> Iterator[Any]:
    """What a copy answers when another thread acts on it before the first line of these modules, the second, and on."""
    for turn in count():
        own, passed = copy.copy(dispatcher), 0

        def trace(frame: FrameType, event: str, _: Any, turn: int = turn, own: Dispatcher = own) -> Any:
            nonlocal passed
            if frame.f_code.co_filename not in (estimator.__file__, gates.__file__):
                return None
            if event == "line":
                passed += 1
                if passed == turn + 1:
                    thread = Thread(target=act, args=(own,))
                    thread.start()
                    thread.join()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            found = ask(own)
        finally:
            sys.settrace(before)
        yield found
        if passed <= turn:
            return


@pytest.mark.usefixtures("unchecked")
def test_answers_are_of_one_moment(
    fitted: Dispatcher, sample: "Sample", settings: "Settings", tmp_path: "Path", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever another thread fits meanwhile: prior, calibration and gate are not those of another fit."""
    X, pure = sample.evidence.select(slice(0, 2)), np.flatnonzero(sample.labels >= 0)
    other = coarsely(Dispatcher(fitted.experts, **settings()).fit(sample.evidence, sample.labels))
    monkeypatch.setattr(estimator, "fit_parts", lambda *_: (other.state, other.report))
    own = coarsely(fitted).calibrate(sample.evidence.select(pure), sample.labels[pure])
    own.update([1] * 40)
    gate = Gate.calibrate(own, sample.evidence)

    def saved(dispatcher: Dispatcher) -> list[Any]:
        dispatcher.save(tmp_path / "saved")
        return [(tmp_path / "saved" / f"dispatcher.{end}").read_bytes() for end in ("json", "safetensors")]

    asked: dict[str, Callable[[Dispatcher], Any]] = {
        "predict_proba": lambda each: each.predict_proba(X),
        "predict_set": lambda each: each.predict_set(X, 0.5),
        "posterior": lambda each: [(found := each.posterior(X, 2)).weights, found.calibrated is None],
        "feedback": lambda each: each.feedback(["sort"] * 2, [1.0, 0.0], X).mean,
        "simulate": lambda each: [(found := each.simulate(2, 2))[0], found[1].weights],
        "foreignness": lambda each: gate.foreignness(each, X),
        "save": saved,
    }
    for name, ask in asked.items():

        def answer(dispatcher: Dispatcher, ask: Callable[[Dispatcher], Any] = ask) -> str:
            try:
                return repr(ask(dispatcher))
            except (ConfigError, NotFittedError) as error:
                return repr(error)

        before, after = answer(copy.copy(own)), answer(copy.copy(own).fit(X))
        assert before != after
        found = list(between_lines(own, answer, lambda each: each.fit(X)))
        assert set(found) == {before, after}, name


@pytest.mark.parametrize("kept", [False, True])
def test_events_of_threads_and_of_dispatchers_that_share_a_file_all_count(
    own: Dispatcher, tmp_path: "Path", kept: bool
) -> None:
    """Four threads of labels and rewards; where the prior is kept, half of them by another dispatcher, as another
    process has one. Threads take turns every 10 µs, so that lost updates would show."""
    others = [own, own]
    if kept:
        own.keep_prior(tmp_path / "prior.json")
        others[1] = Dispatcher.load(tmp_path / "own")
        others[1].keep_prior(tmp_path / "prior.json")
    calls = [lambda: own.update([0]), lambda: own.feedback("add", 0.5)]
    calls += [lambda: others[1].update([1, 2]), lambda: others[1].feedback("base", 1.0)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(call) for _ in range(40) for call in calls]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert own.update([0]).events == 40 * 5 + 1


def test_the_prior_outlives_the_process(own: Dispatcher, tmp_path: "Path") -> None:
    """From a file or with the dispatcher; never into another one, nor from what is no such file."""
    file = tmp_path / "prior.json"
    own.keep_prior(file)
    own.update([0, 0, 2])
    other = Dispatcher.load(tmp_path / "own")
    assert other.prior.events == 0
    assert other.keep_prior(file).events == 3
    np.testing.assert_array_equal(other.prior.mean, own.prior.mean)
    other.save(tmp_path / "saved")
    assert Dispatcher.load(tmp_path / "saved").prior.events == 3
    file.write_text(file.read_text()[:-9])
    with pytest.raises(BundleError, match=ONE_LINE):
        other.keep_prior(file)
    own.prior = own.prior  # writes a whole file again
    assert other.keep_prior(file).events == 3


def test_a_file_that_cannot_be_replaced_is_refused_at_the_start(
    own: Dispatcher, tmp_path: "Path", monkeypatch: pytest.MonkeyPatch
) -> None:
    own.keep_prior(tmp_path / "prior.json")

    def forbidden(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "fchmod", forbidden)
    with pytest.raises(BundleError, match=ONE_LINE):
        Dispatcher.load(tmp_path / "own").keep_prior(tmp_path / "prior.json")


def test_no_prior_waits_for_the_file_of_another(own: Dispatcher, tmp_path: "Path") -> None:
    own.keep_prior(tmp_path / "kept" / "prior.json")
    other = copy.copy(own)
    with alone_in(tmp_path / "kept"):
        waiting, free = (Thread(target=each.update, args=([0],)) for each in (own, other))
        waiting.start()
        waiting.join(0.1)
        free.start()
        free.join(30)
        assert (own.prior.events, other.prior.events) == (0, 1)
    waiting.join()
    assert own.prior.events == 1


def test_the_file_is_of_one_dispatcher_wherever_the_process_is(
    own: Dispatcher, tmp_path: "Path", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy, or one sent to another process, keeps a prior of its own."""
    monkeypatch.chdir(tmp_path)
    own.keep_prior("prior.json")
    monkeypatch.chdir(tmp_path / "own")
    own.update([0])
    for sent in (copy.copy(own), copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert sent.update([1]).events == 2
        with pytest.raises(ValueError, match="read-only"):
            sent.prior.mean[0] = 1
    again = Dispatcher.load(".")
    assert again.keep_prior(tmp_path / "prior.json").events == own.prior.events == 1
    assert not (tmp_path / "own" / "prior.json").exists()


def test_what_comes_after_a_drift_goes_on_with_the_file(
    own: Dispatcher, sample: "Sample", settings: "Settings", tmp_path: "Path"
) -> None:
    """Shares are of the experts, whatever fit serves them; a new fit begins anew, and a file of others is refused."""
    own = coarsely(own)
    own.svi = settings()["svi"]
    own.keep_prior(tmp_path / "prior.json")
    own.update([0])
    known = sample.evidence.select(range(40))
    later = own.recalibrate(known, sample.labels[:40], sample.mixtures[:40])
    assert later.fingerprint != own.fingerprint
    assert later.update([1, 2]).events == 3
    assert own.update([0]).events == 4
    again = Dispatcher.load(tmp_path / "own")
    np.testing.assert_array_equal(again.keep_prior(tmp_path / "prior.json").mean, own.prior.mean)
    later.fit(sample.evidence, sample.labels)
    assert later.update([0]).events == 1
    assert own.keep_prior(tmp_path / "prior.json").events == 4
    with pytest.raises(BundleError, match=r"^expected names \['a', 'b', 'base'\] in .*, got \["):
        Dispatcher.flat(("a", "b")).keep_prior(tmp_path / "prior.json")


def test_updates_move_no_score_of_drift(own: Dispatcher, fresh: "Sample") -> None:
    """Scores of before and after are exchangeable, as the monitor's guarantee takes it; posteriors do follow."""
    own = coarsely(own)
    before, mean = own.log_evidence(fresh.evidence), own.mean(fresh.evidence)
    np.testing.assert_array_equal(before, own.posterior(fresh.evidence, 1).log_evidence)
    own.update([2] * 40)
    np.testing.assert_array_equal(own.log_evidence(fresh.evidence), before)
    assert np.abs(own.mean(fresh.evidence) - mean).max() > 0.01


def test_drift_shows_and_is_mended(own: Dispatcher, make_sample: "Callable[..., Sample]", settings: "Settings") -> None:
    """Prompts as before raise no alarm at rate .01; shifted ones do, and a recalibrated dispatcher expects them."""
    own = coarsely(own)
    held_out, ordinary, later = (make_sample(count, seed) for count, seed in ((200, 21), (150, 22), (200, 23)))
    monitor = drift_monitor(own.log_evidence(held_out.evidence), false_alarm_rate=0.01)
    _, report = watch(monitor, own.log_evidence(ordinary.evidence))
    assert report.first_alarm is None
    views = later.evidence.views
    shifted = Evidence({**views, "hidden": views["hidden"] + 2.0}, later.evidence.lengths, later.evidence.missing)
    _, report = watch(monitor, own.log_evidence(shifted))
    assert report.first_alarm is not None
    own.svi = settings(svi=40)["svi"]
    before = own.state.pack()[1]["globals.loc.M"].copy()
    new = own.recalibrate(shifted, later.labels, later.mixtures)
    np.testing.assert_array_equal(own.state.pack()[1]["globals.loc.M"], before)
    assert new.log_evidence(shifted).mean() > own.log_evidence(shifted).mean() + 1
    assert new.prior is own.prior
    pure = later.labels >= 0
    assert (new.predict_proba(shifted).argmax(1) == later.labels)[pure].mean() > 0.8


def test_labels_mend_a_drift_of_any_size(
    own: Dispatcher, make_sample: "Callable[..., Sample]", settings: "Settings"
) -> None:
    """Of an expert that no label is of as much is known as before."""

    def moved(count: int, seed: int) -> tuple[Evidence, np.ndarray]:
        made = make_sample(count, seed)
        rows = np.flatnonzero((made.labels >= 0) & ~made.evidence.is_missing("hidden"))
        hidden = Evidence({"hidden": made.evidence.views["hidden"] + 4.0})
        return hidden.select(rows), made.labels[rows]

    own.svi = settings(svi=50)["svi"]
    (later, labels), (fresh, judged) = moved(150, 24), moved(60, 25)
    assert len(labels) < 105
    assert (own.predict_proba(fresh).argmax(1) == judged).mean() < 0.4
    new = own.recalibrate(later, labels)
    assert (new.predict_proba(fresh).argmax(1) == judged).mean() > 0.9
    rows = np.flatnonzero(labels > 0)
    scales = own.recalibrate(later.select(rows), labels[rows]).state.globals.scales["M"]
    assert (scales[0] < own.state.globals.scales["M"][0] + 0.15).all()


def test_blends_are_lists_as_well_as_arrays(own: Dispatcher) -> None:
    blends = [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    again, expected = copy.copy(own), own.feedback(np.array(blends), [1.0, 0.0])
    np.testing.assert_array_equal(again.feedback(blends, [1.0, 0.0]).mean, expected.mean)


@pytest.mark.usefixtures("unchecked")
def test_what_is_of_another_kind(own: Dispatcher) -> None:
    """The names of weights by name are no two events."""
    with pytest.raises(ConfigError, match=r"^expected names of experts, or rows of 4 weights, got \{'add': 0.7"):
        own.feedback({"add": 0.7, "sort": 0.3}, [1.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^expected a PriorState, got None$"):
        own.prior = None  # type: ignore[assignment]
    assert own.prior.events == 0


def test_bad_events(own: Dispatcher, fresh: "Sample") -> None:
    before = own.prior
    with pytest.raises((ConfigError, TensorError), match=ONE_LINE):
        own.update([7])
    for unknown in ("nosuch", ["add", "nosuch"]):
        with pytest.raises(ConfigError, match="expected experts among"):
            own.feedback(unknown, 1.0)
    with pytest.raises((ConfigError, TensorError), match=ONE_LINE):
        own.feedback("add", 1.5)
    with pytest.raises(TensorError, match="expected evidence of 1 prompts, got 60"):
        own.feedback("add", 1.0, fresh.evidence)
    with pytest.raises(ConfigError, match="expected a prior over"):
        own.prior = prior_state(np.ones(3), ("a", "b", "base"))
    assert own.prior is before
    with pytest.raises(NotFittedError, match=ONE_LINE):
        Dispatcher(["a", "b"]).update([0])
