"""Feedback over HTTP moves the prior as the library does, once for a prompt, or not at all; drift shows in counts."""

import asyncio
import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from typer.testing import CliRunner

from bayes_dispatch.app.commands.main import app as commands
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.dispatcher.gate import Gate
from bayes_dispatch.dispatcher.prior import file as prior_file
from bayes_dispatch.errors import BundleError
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.system import dispatch
from bayes_dispatch.serving.web.arrivals import DRIFT_RATE, Arrivals
from bayes_dispatch.serving.web.choices import Choice
from bayes_dispatch.serving.web.feedback import Learner
from bayes_dispatch.serving.web.fields import FeedbackAsked
from bayes_dispatch.serving.web.keys import Keys
from bayes_dispatch.serving.web.refusals import RefusedError
from bayes_dispatch.serving.web.settings import WebSettings
from tests.serving.process import serving
from tests.serving.test_web import KEY, Served

OTHER = {"authorization": f"Bearer {KEY}-2"}
ASKED: dict[str, Any] = {"model": "bundle", "prompt": "ab>ba\nab>", "max_tokens": 3, "seed": 1}


class World:
    """A server that learns, and a dispatcher of one's own that is told the same."""

    def __init__(self, bundle: Any, path: Path, most: int = 8) -> None:
        parts = {name: getattr(bundle, name) for name in ("model", "tokenizer", "experts")}
        self.path, self.dispatcher, self.alike = path, copy.copy(bundle.dispatcher), copy.copy(bundle.dispatcher)
        self.system = SimpleNamespace(**parts, dispatcher=self.dispatcher, gate=None)
        self.dispatcher.keep_prior(path)
        keys = Keys([("ann", KEY), ("bob", f"{KEY}-2")])
        self.served = Served(self.system, WebSettings(), keys, Learner(self.dispatcher, most))

    def ask(self, endpoint: str = "completions", **fields: Any) -> Any:
        answer = self.served.http.post(f"/v1/{endpoint}", json=ASKED | fields if endpoint == "completions" else fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tell(self, answer: Any, headers: Any = None, **fields: Any) -> Any:
        return self.served.http.post("/v1/feedback", json={"id": answer["id"]} | fields, headers=headers)

    def evidence(self, prompt: str = ASKED["prompt"]) -> Evidence:
        return dispatch(self.system, [prompt], 0)[1]


@pytest.fixture(scope="module", autouse=True)
def _compiled(bundle: Any) -> None:
    """What the first request would wait for."""
    TwoPassGenerator(bundle).generate(["a", "b"], max_new_tokens=2)


@pytest.fixture
def world(bundle: Any, tmp_path: Path, unchecked: None) -> Iterator[World]:
    found = World(bundle, tmp_path / "prior.json")
    yield found
    found.served.close()


def same(got: Any, wanted: Any) -> None:
    assert got.events == wanted.events
    np.testing.assert_array_equal(got.mean, wanted.mean)
    np.testing.assert_array_equal(got.covariance, wanted.covariance)


def test_the_prior_moves_as_the_library_moves_it(world: World) -> None:
    """Exactly, for labels; by a reward as near as the evidence, read in pieces or at once. The file has it."""
    answer = world.tell(world.ask(), label="base").json()
    same(world.dispatcher.prior, world.alike.update([3]))
    assert answer["prior"]["mean"] == world.dispatcher.prior.mean.tolist()
    assert answer["prior"]["events"] == 1
    assert world.tell(world.ask("dispatch", input=ASKED["prompt"]), reward=0.25, expert="sort").status_code == 200
    world.alike.feedback("sort", 0.25, world.evidence())
    np.testing.assert_allclose(world.dispatcher.prior.mean, world.alike.prior.mean, rtol=1e-6)
    assert world.tell(world.ask(model="bundle:add"), reward=1).status_code == 200
    world.alike.feedback("add", 1.0, world.evidence())  # a model of one expert
    np.testing.assert_allclose(world.dispatcher.prior.mean, world.alike.prior.mean, rtol=1e-6)
    assert world.tell(world.ask(weights=[0.5, 0.5, 0, 0]), reward=1).status_code == 200
    world.alike.feedback(np.array([[0.5, 0.5, 0.0, 0.0]]), 1.0, world.evidence())
    np.testing.assert_allclose(world.dispatcher.prior.mean, world.alike.prior.mean, rtol=1e-6)
    same(
        prior_file.read_prior(world.path, world.dispatcher.prior.names),
        world.dispatcher.prior,
    )


def test_following_prompts_are_dispatched_with_it(world: World) -> None:
    """Their posterior is that of a dispatcher with this prior; the answer says which it was."""
    before = world.ask()["dispatch"]
    for _ in range(5):
        world.tell(world.ask(), label="add")
    after = world.ask()["dispatch"]
    world.alike.update([2] * 5)
    parts = SimpleNamespace(**vars(world.system) | {"dispatcher": world.alike})
    assert after["mean"] == pytest.approx(dispatch(parts, [ASKED["prompt"]], 1)[0].mean[0], rel=1e-6)
    assert (before["prior_events"], after["prior_events"]) == (0, 5)
    assert after["mean"] != before["mean"]
    assert "bayes_dispatch_prior_events 5.0" in world.served.http.get("/metrics").text


def test_a_restart_keeps_it(bundle: Any, world: World) -> None:
    world.tell(world.ask(), label="sort")
    again = copy.copy(bundle.dispatcher)
    same(again.keep_prior(world.path), world.dispatcher.prior)


def test_a_prompt_counts_once(world: World) -> None:
    """Two choices of one prompt share its feedback; two prompts have one each. Of two at once one is refused."""
    answer = world.ask(prompt=["ab>", "1+2="], n=2)
    assert world.tell(answer, reward=1).json()["error"]["param"] == "choice"
    assert [world.tell(answer, reward=1, choice=n).status_code for n in (1, 0, 2, 3)] == [200, 409, 200, 409]
    answer = world.ask()
    with ThreadPoolExecutor(4) as threads:
        told = [threads.submit(world.tell, answer, label="add") for _ in range(4)]
        assert sorted(each.result().status_code for each in told) == [200, 409, 409, 409]
    assert world.dispatcher.prior.events == 3


def test_a_repeat_waits_for_what_is_being_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """When that fails, one of the repeats is learnt, and the others are told so then."""
    answer, came, full, replace = world.ask(), threading.Semaphore(0), threading.Event(), os.replace
    take = Learner.take

    async def counted(self: Learner, *given: Any) -> Any:
        came.release()
        return await take(self, *given)

    def fails_once(*given: Any) -> None:
        if full.is_set():
            return replace(*given)
        for _ in range(4):
            assert came.acquire(timeout=60)
        full.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Learner, "take", counted)
    monkeypatch.setattr(os, "replace", fails_once)
    with ThreadPoolExecutor(4) as threads:
        told = [threads.submit(world.tell, answer, label="add") for _ in range(4)]
        assert sorted(each.result().status_code for each in told) == [200, 409, 409, 500]
    assert world.dispatcher.prior.events == 1


@hypothesis.settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 16)), max_size=40))
def test_nobody_pushes_out_those_of_who_has_fewer(most: int, arrivals: list[tuple[str, int]]) -> None:
    """Whoever comes with how much: there is no more than there may be; of each the oldest go, and no more than must;
    who loses one had as many before it as any other, and who has an equal part loses none."""
    learner = Learner(Dispatcher(["red", "blue"]), most)

    def choices() -> dict[str, dict[str, int]]:
        return {who: {name: len(each.prompts) for name, each in own.items()} for who, own in learner._given.items()}

    for n, (owner, size) in enumerate(arrivals):
        before = choices()
        if size <= most:
            before.setdefault(owner, {})[str(n)] = size
        learner.remember(str(n), owner, [Choice(k, 0) for k in range(size)])
        after = choices()
        had, has = ({who: sum(own.values()) for who, own in each.items()} for each in (before, after))
        assert learner.held == sum(has.values()) <= most
        last = {}  # the size of the last answer that each has lost
        for who, own in before.items():
            lost = len(own) - len(after[who])
            assert list(after[who].items()) == list(own.items())[lost:]
            if lost:
                last[who] = list(own.values())[lost - 1]
                assert had[who] > most / len(before)
                assert has[who] + last[who] >= max(has.values())
        assert not last or max(last.values()) + learner.held > most


def test_who_floods_loses_its_own(bundle: Any, tmp_path: Path) -> None:
    """By answers of one choice, of several, and of more than there may be."""
    dispatcher = copy.copy(bundle.dispatcher)
    dispatcher.keep_prior(tmp_path / "prior.json")
    learner = Learner(dispatcher, 9)

    def known(owner: str, *ids: int) -> list[bool]:
        return [str(n) in learner._given.get(owner, {}) for n in ids]

    for n in range(2):
        learner.remember(str(n), "ann", [Choice(0, 0)])
    for n in range(20):
        learner.remember(str(n), "bob", [Choice(0, 0)])
        learner.remember(str(n), "cy", [Choice(k, 0) for k in range(2)])
    learner.remember("20", "cy", [Choice(k, 0) for k in range(9)])
    learner.remember("21", "cy", [Choice(k, 0) for k in range(32)])
    assert known("ann", 0, 1) == [True, True]
    assert known("bob", 0, 17, 18, 19) == [False, True, True, True]
    with pytest.raises(RefusedError) as refused:
        asyncio.run(learner.take(FeedbackAsked(id="21", label="base"), "cy"))
    assert refused.value.status == 404


def test_refused_by_name(world: World) -> None:
    """Another's answer is as one that never was; what was forgotten, too."""
    answer = world.ask()
    wrong: list[tuple[dict[str, Any], int, str | None]] = [
        ({}, 400, "label"),
        ({"label": "add", "reward": 1}, 400, "label"),
        ({"label": "nobody"}, 400, "label"),
        ({"label": "add", "expert": "add"}, 400, "expert"),
        ({"reward": 1, "expert": "nobody"}, 400, "expert"),
        ({"reward": 1.5}, 400, "reward"),
        ({"reward": True}, 400, "reward"),
        ({"label": "add", "choice": 1}, 400, "choice"),
        ({"label": "add", "id": "cmpl-0"}, 404, "id"),
    ]
    for fields, status, param in wrong:
        told = world.tell(answer, **fields)
        assert (told.status_code, told.json()["error"]["param"]) == (status, param), told.text
    assert world.tell(answer, headers=OTHER, label="add").status_code == 404
    dispatched = world.tell(world.ask("dispatch", input="ab>"), reward=1)
    assert (dispatched.status_code, dispatched.json()["error"]["param"]) == (400, "expert")
    for _ in range(8):
        world.ask()
    assert world.tell(answer, label="add").status_code == 404
    assert world.dispatcher.prior.events == 0
    assert "bayes_dispatch_remembered 8.0" in world.served.http.get("/metrics").text


def test_a_stream_can_be_told_of_when_it_is_over(world: World) -> None:
    chunks = list(world.served.client.completions.create(**ASKED, stream=True))
    assert world.tell({"id": chunks[0].id}, reward=0).status_code == 200


def test_a_file_that_cannot_be_written_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that was broken meanwhile; when it can be again, the same feedback is taken."""
    answer, before, content = world.ask(), world.dispatcher.prior, world.path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(world.path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        told = world.tell(answer, label="add")
    assert (told.status_code, told.json()["error"]["code"]) == (500, "prior_not_kept")
    assert str(world.path) not in told.text
    world.path.write_bytes(content[:-9])
    assert world.tell(answer, label="add").status_code == 500
    world.path.write_bytes(content)
    assert world.dispatcher.prior is before
    assert world.tell(answer, label="add").json()["prior"]["events"] == 1


def test_who_asks_while_others_tell_sees_one_whole_state(world: World) -> None:
    """Each posterior is that of the prior after as many labels as it says, whatever was learnt meanwhile."""
    states = [copy.copy(world.alike)]
    for _ in range(6):
        states[-1].update([2])
        states.append(copy.copy(states[-1]))
    wanted = {}
    for state in [copy.copy(world.alike), *states[:-1]]:
        parts = SimpleNamespace(**vars(world.system) | {"dispatcher": state})
        wanted[state.prior.events] = dispatch(parts, [ASKED["prompt"]], 1)[0].mean[0]
    answers = [world.ask("dispatch", input="ab>") for _ in range(6)]
    with ThreadPoolExecutor(3) as threads:
        told = [threads.submit(world.tell, answer, label="add") for answer in answers]
        found = [threads.submit(world.ask, "dispatch", input=ASKED["prompt"], seed=1) for _ in range(24)]
        assert all(each.result().status_code == 200 for each in told)
        seen = [each.result()["dispatch"] for each in found]
    for each in seen:
        assert each["mean"] == pytest.approx(wanted[each["prior_events"]], rel=1e-6)
    assert world.dispatcher.prior.events == 6
    assert len({tuple(mean) for mean in wanted.values()}) == 7  # else any state would do


def test_without_a_file_there_is_no_feedback(bundle: Any, unchecked: None) -> None:
    served = Served(bundle, WebSettings(), Keys([("ann", KEY)]))
    told = served.http.post("/v1/feedback", json={"id": "cmpl-0", "label": "add"})
    served.close()
    assert (told.status_code, told.json()["error"]["code"]) == (404, "no_feedback")
    assert "--prior" in told.json()["error"]["message"]


def test_a_broken_file_stops_the_start(tmp_path: Path) -> None:
    """By one line; nothing is listened to any more."""
    (tmp_path / "prior.json").write_text("{}")
    result = CliRunner().invoke(commands, ["serve", "--port", "0", "--prior", str(tmp_path / "prior.json")])
    assert isinstance(result.exception, BundleError)
    assert "\n" not in str(result.exception)
    assert str(result.exception).startswith("expected format")


@pytest.fixture(scope="module")
def made() -> tuple[Callable[..., Evidence], Dispatcher, Gate]:
    """Items of two experts, of one that nobody is for, and a gate calibrated on the former."""
    means = 3 * np.random.default_rng(5).normal(size=(3, 4))

    def items(count: int, seed: int, only: int | None = None) -> Evidence:
        random = np.random.default_rng(seed)
        of = np.arange(count) % 2 if only is None else np.full(count, only)
        hidden = means[random.permutation(of)] + random.normal(size=(count, 4))
        return Evidence({"hidden": hidden}, random.integers(20, 80, count))

    random = np.random.default_rng(0)
    labels = np.arange(80) % 2
    hidden = means[labels] + random.normal(size=(80, 4))
    few: dict[str, Any] = {
        "svi": SVISettings(steps=40, conditional_steps=10),
        "features": FeatureSettings(dimensions=4, folds=2),
    }
    dispatcher = Dispatcher(["red", "blue"], **few).fit(Evidence({"hidden": hidden}, np.full(80, 40)), labels)
    return items, dispatcher, Gate.calibrate(dispatcher, items(400, 1), bins=1)


def test_drift_and_foreign_prompts_are_counted(made: tuple[Callable[..., Evidence], Dispatcher, Gate]) -> None:
    """Ten streams as held out raise no more alarms at .01, nor foreign ones at .05, than one of 1,000 seeds has; what
    comes of another domain is foreign and raises it within 40 prompts."""
    items, dispatcher, gate = made
    alarms = foreign = 0
    for seed in range(10):
        ordinary = Arrivals(dispatcher, gate)
        some = items(30, 100 + seed)
        for n in range(30):
            ordinary.ask(some.select([n]))
        alarms, foreign = alarms + ordinary.monitor.alarmed, foreign + ordinary.foreign
    assert alarms <= binom.isf(0.001, 10, DRIFT_RATE)
    assert 0 < foreign <= binom.isf(0.001, 300, 0.05)
    strange, odd = Arrivals(dispatcher, gate), items(40, 7, only=2)
    for n in range(40):
        strange.ask(odd.select([n]))
    assert strange.monitor.alarmed
    assert strange.foreign > 20
    before = strange.monitor.log_martingale
    dispatcher.update([0] * 20)  # what is learnt of shares is no drift
    again = Arrivals(dispatcher, gate)
    for n in range(40):
        again.ask(odd.select([n]))
    assert again.monitor.log_martingale == before


def test_a_burst_is_asked_about_in_part_and_copies_once(
    bundle: Any, made: tuple[Callable[..., Evidence], Dispatcher, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the gate is asked, others are let by; of four choices of a prompt one arrives."""
    items, dispatcher, gate = made
    arrivals, some = Arrivals(dispatcher, gate), items(20, 3)
    for n in range(20):
        arrivals.add(some.select([n]))
    arrivals._thread.shutdown()
    assert 1 <= arrivals.gated <= 20
    assert arrivals.monitor.arrived == arrivals.gated
    added: list[Evidence] = []
    served = Served(bundle, WebSettings(), None)
    monkeypatch.setattr("bayes_dispatch.serving.web.metrics.Metrics.dispatched", lambda _, begun: added.append(begun))
    answer = served.http.post("/v1/completions", json=ASKED | {"prompt": ["ab>", "1+2="], "n": 2})
    served.close()
    assert answer.status_code == 200
    assert len(added) == 2


@pytest.mark.slow
def test_a_killed_server_loses_only_what_was_in_flight(tmp_path: Path) -> None:
    """What it had answered as learnt, the next one has; the file is whole, and nothing else is left beside it."""
    kept = tmp_path / "prior.json"
    asked = {"model": "bundle", "prompt": "kfpa>lgab\nmold>npme\nhbme>", "max_tokens": 4, "seed": 1}
    with serving("--prior", str(kept)) as server:
        with httpx2.Client(base_url=server.url, timeout=60) as client:
            for events in (1, 2):
                more = asked | {"prompt": "ab>bc\n" * events + "ef>"}
                answer = client.post("/v1/completions", json=more).json()
                told = client.post("/v1/feedback", json={"id": answer["id"], "label": "shift"})
                assert told.status_code == 200, told.text
                assert told.json()["prior"]["events"] == events
            with client.stream("POST", "/v1/completions", json=asked | {"max_tokens": 1000, "stream": True}) as stream:
                lines = stream.iter_lines()
                assert next(lines).startswith("data: {")
                server.tell(signal.SIGKILL)
                with pytest.raises(httpx2.HTTPError):
                    list(lines)
        assert server.ended() == -signal.SIGKILL
    with serving("--prior", str(kept)) as server:
        answer = httpx2.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()
        assert answer["dispatch"]["prior_events"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["prior.json"]
