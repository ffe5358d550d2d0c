"""A server on a real port answers OpenAI's own client, refuses by name what it does not know, and frees what nobody
waits for."""

import gc
import inspect
import itertools
import json
import logging
import re
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.resources.chat.completions import Completions as ChatCalls
from openai.resources.completions import Completions as CompletionCalls
from prometheus_client.parser import text_string_to_metric_families

from bayes_dispatch.app.bundle import load_bundle
from bayes_dispatch.app.commands.main import main
from bayes_dispatch.errors import BayesDispatchError, ConfigError, PromptTooLongError
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.readers import CachedReader
from bayes_dispatch.serving.engine import BatchedEngine, Limits
from bayes_dispatch.serving.web.answers import ChatShape, CompletionShape
from bayes_dispatch.serving.web.app import make_app
from bayes_dispatch.serving.web.choices import Choice, ChoiceToken, Piece, Stops
from bayes_dispatch.serving.web.feedback import Learner
from bayes_dispatch.serving.web.fields import ChatAsked, CompletionAsked, DispatchAsked
from bayes_dispatch.serving.web.jobs import Jobs
from bayes_dispatch.serving.web.keys import Keys, is_loopback
from bayes_dispatch.serving.web.refusals import RefusedError, as_refused
from bayes_dispatch.serving.web.server import Server, listen
from bayes_dispatch.serving.web.settings import WebSettings
from bayes_dispatch.serving.work import Ended

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "a-key-of-enough-letters"
PROMPT = "kfpa>lgab\nmold>npme\nhbme>"
GREEDY: dict[str, Any] = {"model": "bundle", "prompt": PROMPT, "temperature": 0, "seed": 1, "max_tokens": 6}
LONG = GREEDY | {"max_tokens": 1000, "temperature": 1.5}


class Served:
    """A server in a thread."""

    def __init__(self, bundle: Any, settings: WebSettings, keys: Keys | None, learner: Learner | None = None) -> None:
        self.engine = BatchedEngine(bundle)
        app, listening = make_app(bundle, self.engine, settings, keys, learner=learner), listen("127.0.0.1", 0)
        self.server_address = listening.getsockname()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.server = Server(app, self.engine, settings)
        self.thread = threading.Thread(target=self.server.serve_on, args=[listening], daemon=True)
        self.thread.start()
        self.http = httpx2.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def close(self) -> None:
        self.http.close()
        self.client.close()
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def system() -> Any:
    return load_bundle()


@pytest.fixture(scope="module")
def served(system: Any) -> Iterator[Served]:
    found = Served(system, WebSettings(body_bytes=20_000, prompt_bytes=5_000), Keys([("tests", KEY)]))
    yield found
    found.close()


@pytest.fixture(scope="module")
def expected(system: Any) -> Any:
    return TwoPassGenerator(system).generate([PROMPT], max_new_tokens=6, seed=1, stop="\n")


def dispatch_of(answer: Any) -> Any:
    return answer.model_extra["dispatch"]


def test_a_completion_is_what_generate_gives(served: Served, expected: Any) -> None:
    """Text without its stop, log-probabilities, mutual information, weights before each token, posterior."""
    answer = served.client.completions.create(**GREEDY, stop="\n", logprobs=0)
    (choice,), text = answer.choices, expected.texts[0]
    assert text.endswith("\n")
    assert (choice.text, choice.finish_reason) == (text[:-1], "stop")
    assert choice.logprobs.token_logprobs == pytest.approx(expected.log_probabilities[0, : len(text) - 1], abs=1e-4)
    weights, before = choice.logprobs.model_extra["weights"], expected.paths[0][-expected.lengths[0] :]
    assert np.array(weights) == pytest.approx(before[: len(text) - 1], abs=1e-4)
    told = choice.logprobs.model_extra["mutual_information"]
    assert told == pytest.approx(expected.mutual_information[0, : len(text) - 1], abs=1e-4)
    found = dispatch_of(answer)
    assert found["mean"] == pytest.approx(expected.posterior.mean[0])
    assert np.array(found["interval_90"]) == pytest.approx(expected.posterior.interval(0.9)[:, 0].T)
    assert (found["blend"], found["seed"], found["p_value"], found["foreign"]) == (expected.blend, 1, None, False)
    assert answer.usage.completion_tokens == len(text)


def test_streams_join_to_the_whole(served: Served) -> None:
    """Of completions: every choice's text and tokens; the first chunk of each has its dispatch, the last the usage."""
    asked = GREEDY | {"n": 2, "prompt": [PROMPT, "12+3="], "temperature": 1, "top_p": 0.9, "logprobs": 0}
    whole = served.client.completions.create(**asked)
    chunks = list(served.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        tokens = [token for each in own if each.logprobs for token in each.logprobs.tokens]
        assert tokens == choice.logprobs.tokens
        assert own[-1].finish_reason == choice.finish_reason
    began = {chunk.choices[0].index: dispatch_of(chunk) for chunk in chunks if "dispatch" in chunk.model_extra}
    assert [began[n] for n in range(4)] == dispatch_of(whole)
    assert [each["seed"] for each in dispatch_of(whole)] == [1, 2, 1, 2]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_a_chat_and_its_stream(served: Served) -> None:
    """A reply ends with a line, as in ``chat``; a reply may come back as a message."""
    first = [
        {"role": "developer", "content": "ab>bc\n"},
        {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
    ]
    asked: dict[str, Any] = {"model": "bundle", "messages": first, "temperature": 0, "seed": 1, "max_tokens": 8}
    whole = served.client.chat.completions.create(**asked, logprobs=True)
    text = whole.choices[0].message.content
    assert "\n" not in text
    assert "".join(token.token for token in whole.choices[0].logprobs.content) == text
    told = [token.model_extra for token in whole.choices[0].logprobs.content]
    assert all(each["mutual_information"] >= 0 for each in told)
    assert all(sum(each["weights"]) == pytest.approx(1, abs=1e-5) for each in told)
    chunks = list(served.client.chat.completions.create(**asked, logprobs=True, stream=True))
    parts = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.model_extra for token in parts] == told
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert dispatch_of(chunks[0]) == dispatch_of(whole)
    again = [*first, whole.choices[0].message.model_dump(), {"role": "user", "content": PROMPT}]
    assert served.client.chat.completions.create(**asked | {"messages": again}).choices[0].message.role == "assistant"


def test_models_and_weights_of_ones_own(served: Served) -> None:
    """A model of one expert is that expert's vertex, by name or in order; each id can be asked for."""
    ids = [model.id for model in served.client.models.list()]
    assert ids[0] == "bundle"
    assert ids[-1] == "bundle:base"
    assert served.client.models.retrieve(ids[1]).id == ids[1]
    vertex = [1.0] + [0.0] * (len(ids) - 2)
    ways = [{"model": ids[1]}, {"weights": {ids[1].partition(":")[2]: 1}}, {"weights": vertex}]
    texts = {served.http.post("/v1/completions", json=GREEDY | way).json()["choices"][0]["text"] for way in ways}
    assert len(texts) == 1


def test_dispatch_alone(served: Served, expected: Any) -> None:
    answer = served.http.post("/v1/dispatch", json={"input": PROMPT, "seed": 1, "false_alarm_rate": 0.05}).json()
    assert answer["dispatch"]["mean"] == pytest.approx(expected.posterior.mean[0])
    assert 0 <= answer["dispatch"]["p_value"] <= 1
    assert (answer["dispatch"]["seed"], "blend" in answer["dispatch"]) == (1, False)
    assert answer["usage"]["completion_tokens"] == 0


def test_who_abstains_writes_nothing(served: Served) -> None:
    asked = GREEDY | {"prompt": "Ω≈ç√ ∫˜µ " * 20, "false_alarm_rate": 0.5, "abstain": True}
    answer = served.http.post("/v1/completions", json=asked).json()
    assert answer["dispatch"]["foreign"] is True
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "content_filter")


CHAT: dict[str, Any] = {"model": "bundle", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
TEXT: dict[str, Any] = {"model": "bundle", "prompt": "a", "max_tokens": 1}
ASKED: dict[str, dict[str, Any]] = {"completions": TEXT, "chat/completions": CHAT, "dispatch": {"input": "a"}}
REFUSED = [
    ("completions", {"foo": 1}, "foo"),
    ("completions", {"best_of": 2}, "best_of"),
    ("completions", {"echo": True}, "echo"),
    ("completions", {"suffix": "x"}, "suffix"),
    ("completions", {"logprobs": 1}, "logprobs"),
    ("completions", {"frequency_penalty": 0.5}, "frequency_penalty"),
    ("completions", {"logit_bias": {"1": 2}}, "logit_bias"),
    ("completions", {"prompt": [1, 2]}, "prompt"),
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": "a" * 6000}, "prompt"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"max_tokens": 10**6}, "max_tokens"),
    ("completions", {"max_tokens": "3"}, "max_tokens"),
    ("completions", {"temperature": 3}, "temperature"),
    ("completions", {"top_p": 0}, "top_p"),
    ("completions", {"n": 9}, "n"),
    ("completions", {"n": 8, "prompt": ["a"] * 5}, "n"),
    ("completions", {"stop": ["a"] * 5}, "stop"),
    ("completions", {"stop": ""}, "stop"),
    ("completions", {"seed": -1}, "seed"),
    ("completions", {"seed": 2**63 - 1}, "seed"),
    ("completions", {"stream_options": {}}, "stream_options"),
    ("completions", {"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo"),
    ("completions", {"blend": "nonsense"}, "blend"),
    ("completions", {"blend": "__import__('os')"}, "blend"),
    ("completions", {"draws": 4, "blend": "top_k"}, "draws"),
    ("completions", {"draws": 1000, "stream": True}, "draws"),
    ("completions", {"blend": "top_k(40)", "stream": True}, "blend"),
    ("completions", {"weights": [1]}, "weights"),
    ("completions", {"weights": {"nobody": 1}}, "weights"),
    ("completions", {"weights": {"sort": 0.5}}, "weights"),
    ("completions", {"weights": {"sort": 1}, "blend": "top_k"}, "blend"),
    ("completions", {"model": "bundle:sort", "weights": {"sort": 1}}, "weights"),
    ("completions", {"abstain": True}, "abstain"),
    ("completions", {"false_alarm_rate": 2}, "false_alarm_rate"),
    ("dispatch", {"false_alarm_rate": 2}, "false_alarm_rate"),
    ("dispatch", {"input": ""}, "input"),
    ("chat/completions", {"tools": [{}]}, "tools"),
    ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
    ("chat/completions", {"store": True}, "store"),
    ("chat/completions", {"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
    ("chat/completions", {"max_completion_tokens": 1}, "max_tokens"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}] * 3}, "messages"),
    ("chat/completions", {"messages": [{"role": "system", "content": "a"}] * 2 + CHAT["messages"]}, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": ""}]}, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
]


@pytest.mark.parametrize(("endpoint", "given", "param"), REFUSED)
def test_refused_by_name(served: Served, endpoint: str, given: dict[str, Any], param: str) -> None:
    answer = served.http.post(f"/v1/{endpoint}", json=ASKED[endpoint] | given)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith("expected")
    assert answer.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    ("endpoint", "given", "message"),
    [
        (
            "completions",
            {"seed": 2**63 - 1},
            f"expected seed to be a whole number from 0 to {2**63 - 2}, got {2**63 - 1}",
        ),
        ("completions", {"n": 9}, "expected n to be less than or equal to 8, got 9"),
        ("chat/completions", {"messages": []}, "expected messages to have at least 1 item, got []"),
        ("feedback", {"id": "a" * 81}, f"expected id to have at most 80 characters, got '{'a' * 79}"),
    ],
)
def test_what_was_expected_is_told_as_it_was_sent(
    served: Served, endpoint: str, given: dict[str, Any], message: str
) -> None:
    answer = served.http.post(f"/v1/{endpoint}", json=ASKED.get(endpoint, {}) | given)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


@pytest.mark.parametrize(
    ("endpoint", "kind"),
    [("completions", CompletionAsked), ("chat/completions", ChatAsked), ("dispatch", DispatchAsked)],
)
def test_the_largest_number_of_json_is_refused_in_each_field(served: Served, endpoint: str, kind: Any) -> None:
    """It has as many digits as Python prints; one more would fail as ours."""
    for name in kind.model_fields:
        others = json.dumps({key: value for key, value in ASKED[endpoint].items() if key != name} | {"user": None})
        body = f'{others[:-1]}, "{name}": {"9" * 4300}}}'
        answer = served.http.post(f"/v1/{endpoint}", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (name, answer.text)


def test_too_many_tokens_have_openais_code() -> None:
    """Programs shorten what they sent by it; the field is the request's own."""
    told = as_refused(Ended("failed", PromptTooLongError("expected less, got more")), "req-1", "messages", "blend")
    assert (told.status, told.param, told.code) == (400, "messages", "context_length_exceeded")


def test_a_completion_of_no_number_asks_for_no_more_than_it_may(system: Any) -> None:
    job = Jobs(system, WebSettings(max_new_tokens=5)).of_completion(CompletionAsked(model="bundle", prompt="a"), "")
    assert job.works[0].writing is not None
    assert job.works[0].writing.max_new_tokens == 5


def test_what_never_has_room_to_wait_is_refused(system: Any) -> None:
    """With 429 a client would ask for ever. A key has half of the tokens that may wait."""
    jobs = Jobs(system, WebSettings(max_new_tokens=2**16))
    asked = CompletionAsked(model="bundle", prompt=["a"] * 8, max_tokens=2**16)
    assert len(jobs.of_completion(asked, "ann").works) == 8
    with pytest.raises(RefusedError, match=f"expected at most {2**19} tokens of all choices, got {9 * 2**16}") as told:
        jobs.of_completion(asked.model_copy(update={"prompt": ["a"] * 9}), "ann")
    assert (told.value.status, told.value.param) == (400, "max_tokens")
    assert WebSettings.tokens <= Limits.waiting_tokens // 4  # and as many again for prompts


def test_more_tokens_than_a_text_may_have_are_refused_at_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    """Else each chat that names no number would be."""
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--port", "0", "--bundle", "nowhere", "--max-new-tokens", "65537"])
    told = "expected max_new_tokens to be a whole number from 1 to 65536, got 65537"
    assert stopped.value.code == 2
    assert f"bayes-dispatch: error: {told}\n" in capfd.readouterr().err  # a server of other tests may log there


@pytest.mark.parametrize(("calls", "kind"), [(ChatCalls, ChatAsked), (CompletionCalls, CompletionAsked)])
def test_every_field_of_openais_client_is_known(calls: Any, kind: Any) -> None:
    """None is taken for a mistake, and null is as if it were absent."""
    names = set(inspect.signature(calls.create).parameters) - {"self", "timeout"}
    assert {name for name in names if not name.startswith("extra_")} <= set(kind.model_fields)


def test_what_asks_for_nothing_is_accepted(served: Served) -> None:
    off = {"frequency_penalty": 0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}, "store": False}
    off |= dict.fromkeys(set(ChatAsked.model_fields) - set(CHAT) - set(off))
    assert served.http.post("/v1/chat/completions", json=CHAT | off).status_code == 200


def test_errors_have_openais_shape(served: Served) -> None:
    post, json_type = served.http.post, {"content-type": "application/json"}
    wrong = [
        (post("/v1/completions", content=b"{", headers=json_type), 400),
        (post("/v1/completions", content=b'{"prompt": "\xff"}', headers=json_type), 400),
        (post("/v1/completions", content=b"[" * 10_000, headers=json_type), 400),
        (post("/v1/completions", content=b"a=b"), 415),
        (post("/v1/completions", json={"prompt": "a" * 30_000}), 413),
        (post("/v1/completions", content=iter([b"a" * 9_000] * 4), headers=json_type), 413),  # without a length
        (post("/v1/completions", json=TEXT | {"model": "gpt-4o"}), 404),
        (post("/v1/nothing", json={}), 404),
        (served.http.get("/v1/completions"), 405),
        (served.http.get("/v1/models", headers={"authorization": f"Bearer {KEY}x"}), 401),
        (served.http.get("/metrics", headers={"authorization": "Basic"}), 401),
    ]
    for answer, status in wrong:
        assert answer.status_code == status, answer.text
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert served.http.get("/v1/completions").headers["allow"] == "POST"
    assert served.http.get("/health/").status_code == 404  # and no redirection
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="no", max_retries=0).models.list()
    assert httpx2.get(f"{served.url}/health").status_code == httpx2.get(f"{served.url}/ready").status_code == 200


def test_it_is_ready_while_its_engine_can_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while the vLLM server or all replicas behind it are gone; it runs all the same."""
    gone = replace(served.engine.state, serves=False)
    monkeypatch.setattr(BatchedEngine, "state", property(lambda _: gone))
    answer = served.http.get("/ready")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_serving")
    assert served.http.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/"])
def test_what_can_be_got_tells_its_head_alone(served: Served, path: str) -> None:
    whole, head = served.http.get(path), served.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert served.http.head("/v1/completions").status_code == 405
    assert served.http.get(path).status_code == 200  # on the same connection: nothing of a body was left in it


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_rows(served: Served, stream: bool) -> None:
    asked = GREEDY | {"max_tokens": 1000, "stop": "never", "stream": stream}
    with httpx2.Client(base_url=served.url, headers=served.http.headers, timeout=1 if not stream else 60) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=asked) as answer:
                told = (line for line in answer.iter_lines() if line)
                assert all(next(told).startswith("data: {") for _ in range(4))
                assert served.engine.state.running == 1
        else:
            with pytest.raises(httpx2.TimeoutException):
                client.post("/v1/completions", json=asked)
    deadline = time.monotonic() + 5
    while (state := served.engine.state).running + state.waiting and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (state.running, state.waiting, state.rows) == (0, 0, 0)


def test_metrics_are_those_of_the_guide(served: Served) -> None:
    families = {each.name for each in text_string_to_metric_families(served.http.get("/metrics").text)}
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    named = {name.removesuffix("_total") for name in re.findall(r"`(bayes_dispatch_\w+)`", page)}
    assert named
    assert named == {name for name in families if not name.endswith("_created")}


def test_what_an_engine_does_not_know_is_null() -> None:
    """Engines whose model sees one set of weights at a time know no mutual information."""
    token = ChoiceToken("a", 0, -1.0, None, (0.25, 0.75))
    piece, choice = Piece("a", (token,)), Choice(0, 0)
    told = [shape.part(choice, piece, piece.tokens)["logprobs"] for shape in (CompletionShape(), ChatShape())]
    assert (told[0]["mutual_information"], told[0]["weights"]) == ([None], [(0.25, 0.75)])
    assert told[1]["content"][0].items() >= {"mutual_information": None, "weights": (0.25, 0.75)}.items()


@given(
    st.text("abc", max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 12), max_size=6),
)
def test_a_stop_is_cut_however_the_text_is_split(text: str, stops: list[str], cuts: list[int]) -> None:
    """What is let through joins to the text up to its stop, and is never taken back."""
    for end in range(len(text) + 1):
        if any(text[:end].endswith(stop) for stop in stops):
            text = text[:end]
            break
    ending = max((stop for stop in stops if text.endswith(stop)), key=len, default="")
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    through = Stops(stops)
    found = "".join(through.add(text[start:end]) for start, end in itertools.pairwise(places))
    last, stopped = through.end()
    assert (found + last, stopped) == (text[: len(text) - len(ending)], bool(ending))


def test_keys_are_kept_from_others(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(ConfigError, match=r"expected a readable file of keys .*keys, got: No such file"):
        Keys.read(file)
    file.write_text(f"# who asks\nann {KEY}\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="its owner alone"):
        Keys.read(file)
    file.chmod(0o600)
    assert Keys.read(file).owner(KEY.encode()) == "ann"
    found = Keys.given(None, {"BAYES_DISPATCH_KEYS": f"ann:{KEY},bob:{KEY}2"})
    assert found is not None
    assert [found.owner(key.encode()) for key in (KEY, f"{KEY}2", f"{KEY}3")] == ["ann", "bob", None]
    for wrong in ([], [("ann", "short")], [("ann", KEY), ("bob", KEY)], [("an n", KEY)]):
        with pytest.raises(ConfigError, match="expected"):
            Keys(wrong)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        1,
        1,
        1,
        0,
        0,
    ]


def test_a_server_that_stops_drains_first(system: Any) -> None:
    """What is written is written to its end; what comes late gets 503; without keys, foreign hosts get 403."""
    served = Served(system, WebSettings(), None)
    assert served.http.get("/v1/models", headers={"host": "example.org"}).status_code == 403
    found = SimpleNamespace(text=None)

    def ask() -> None:
        found.text = served.http.post("/v1/completions", json=GREEDY | {"max_tokens": 60, "stop": None}).json()

    asking = threading.Thread(target=ask)
    asking.start()
    while not served.engine.state.running and asking.is_alive():
        time.sleep(0.005)
    served.server.stop()
    while not served.engine.state.closing:
        time.sleep(0.001)
    late = served.http.post("/v1/completions", json=TEXT)
    asking.join()
    assert (late.status_code, late.json()["error"]["code"]) == (503, "closing")
    assert json.dumps(found.text).count("finish_reason") == 1
    served.thread.join(20)
    assert not served.thread.is_alive()
    served.http.close()
    served.client.close()


@pytest.mark.parametrize("stream", [True, False])
def test_told_twice_it_cuts_off_what_runs(system: Any, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One line tells how many requests; nothing is logged as a failure of ours, with its places."""
    served = Served(system, WebSettings(drain=3000.0), None)
    asked, cut = LONG | {"stream": stream}, threading.Event()

    def ask() -> None:
        with pytest.raises(httpx2.RemoteProtocolError):
            served.http.post("/v1/completions", json=asked)
        cut.set()

    with caplog.at_level(logging.INFO):
        asking = threading.Thread(target=ask)
        asking.start()
        while not served.engine.state.new_tokens:
            time.sleep(0.005)
        served.server.stop()
        served.server.stop()
        asking.join()
        served.thread.join(30)
    served.close()
    assert cut.is_set()
    told = {record.event: record.facts for record in caplog.records if hasattr(record, "event")}
    assert (told["cut off"], told["request"]["error"]) == ({"requests": 1}, "cut_off")
    assert max(record.levelno for record in caplog.records) == logging.WARNING


def test_when_the_drain_is_over_what_runs_is_told_so(system: Any, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(system, WebSettings(drain=0.1), None)
    with caplog.at_level(logging.INFO):
        with served.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            served.server.stop()
            *_, last = lines
        served.thread.join(30)
    served.close()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "closing"
    told = {record.event: record.facts for record in caplog.records if hasattr(record, "event")}
    assert told["drain over"] == {"requests": 1}
    assert "cut off" not in told
    assert max(record.levelno for record in caplog.records) == logging.WARNING


def test_what_is_late_gets_504(system: Any) -> None:
    """And OpenAI's client does not ask again for what takes too long."""
    served = Served(system, WebSettings(patience=0.02), None)
    with pytest.raises(openai.InternalServerError, match="time enough"):
        served.client.with_options(max_retries=1).completions.create(**LONG)
    assert 'requests_total{endpoint="/v1/completions",status="504"} 1.0' in served.http.get("/metrics").text
    late = served.http.post("/v1/completions", json=GREEDY | {"max_tokens": 1000, "stop": None})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    with served.http.stream("POST", "/v1/completions", json=GREEDY | {"max_tokens": 1000, "stream": True}) as answer:
        told = answer.read().decode()
    assert answer.status_code == 504 or json.loads(told.split("data: ")[-1])["error"]["code"] == "timeout"
    served.close()


def test_what_breaks_is_told_as_ours(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that predicts NaN is no fault of the request; a number that is too large is."""
    whole = CachedReader.read
    with monkeypatch.context() as patch:
        patch.setattr(CachedReader, "read", lambda self, tokens: whole(self, tokens) * float("nan"))
        answer = served.http.post("/v1/completions", json=GREEDY)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"].startswith("internal error, request id")
    assert "NaN" not in answer.text
    body = '{"model": "bundle", "prompt": "a", "weights": [' + ", ".join(["1" + "0" * 400] * 9) + "]}"
    answer = served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "weights")
    assert served.http.post("/v1/completions", json=GREEDY).status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET "])
def test_a_connection_without_a_request_is_closed(system: Any, said: bytes) -> None:
    """Also after an answer; one with a request is not, however long that takes."""
    served = Served(system, WebSettings(body_seconds=0.3), None)
    with socket.create_connection(served.server_address, timeout=60) as connection:
        connection.sendall(said)
        while connection.recv(65_536):
            pass
    answer = served.http.post("/v1/completions", json=GREEDY | {"max_tokens": 300, "stop": None})
    assert answer.status_code == 200
    served.close()


def connection_of(served: Served, client: socket.socket) -> Any:
    """The server's end of a connection."""
    for _ in waits():
        for each in list(served.server.server_state.connections):
            if each.client == client.getsockname():
                return each
    raise AssertionError("the server has no such connection")


def waits() -> Iterator[None]:
    """Again and again, but for ten seconds only."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        yield
        time.sleep(0.005)


GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
STREAM = json.dumps(LONG | {"stream": True, "logprobs": 0}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "


@pytest.mark.parametrize("asked", [GET * 50, POST + b"%d\r\n\r\n" % len(STREAM) + STREAM])
def test_who_does_not_read_is_cut_off(system: Any, asked: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """No fault of ours: it is logged as none."""
    served = Served(system, WebSettings(body_seconds=0.3), None)
    with socket.create_connection(served.server_address, timeout=60) as client:
        transport = connection_of(served, client).transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        transport.set_write_buffer_limits(high=4096)
        client.sendall(asked)
        assert any(not served.server.server_state.connections for _ in waits())
    assert any(not served.server.server_state.tasks for _ in waits())
    served.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_connection_waits_for_its_next_request_longer_than_a_proxy(system: Any) -> None:
    """Which keeps it for a minute, and would send on what has just been closed."""
    served = Served(system, WebSettings(body_seconds=0.05), None)
    assert served.server.config.timeout_keep_alive > 60
    with socket.create_connection(served.server_address, timeout=60) as client:
        for _ in range(2):
            client.sendall(GET.replace(b"/ ", b"/health "))
            answer = b""
            while not answer.endswith(b"}"):  # head and body may come one after the other
                answer += (part := client.recv(65_536))
                assert part
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.3)
    served.close()


def test_a_connection_that_is_over_is_forgotten(served: Served) -> None:
    """At once, with its last request; not when it would have been looked at."""
    with socket.create_connection(served.server_address, timeout=60) as client:
        client.sendall(GET.replace(b"/ ", b"/health "))
        client.recv(65_536)
        known = weakref.ref(connection_of(served, client))
    assert any(gc.collect() >= 0 and known() is None for _ in waits())


def test_more_connections_than_there_may_be_are_closed(system: Any) -> None:
    """Though nothing has been asked on them; those that there are go on."""
    served = Served(system, WebSettings(connections=2), None)
    with closing(socket.create_connection(served.server_address)) as one, closing(socket.socket()) as two:
        connection_of(served, one)
        two.connect(served.server_address)
        connection_of(served, two)
        with socket.create_connection(served.server_address, timeout=60) as third:
            assert third.recv(1) == b""
        two.sendall(GET)
        assert two.recv(12) == b"HTTP/1.1 200"
    assert any(not served.server.server_state.connections for _ in waits())
    assert served.http.get("/health").status_code == 200
    served.close()


def test_the_log_has_little_of_who_has_no_key(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Of a long method a part; of another protocol, which browsers and curl ask for, nothing."""
    with caplog.at_level(logging.INFO):
        assert httpx2.request("A" * 5000, f"{served.url}/v1/models").status_code == 401
        upgraded = httpx2.get(f"{served.url}/health", headers={"connection": "upgrade", "upgrade": "h2c"})
        assert upgraded.status_code == 200
        assert any(len(told(caplog)) == 2 for _ in waits())
    assert [facts["method"] for facts in told(caplog)] == ["A" * 16, "GET"]
    assert max(record.levelno for record in caplog.records) == logging.INFO


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What the log has of requests."""
    return [record.facts for record in caplog.records if getattr(record, "event", None) == "request"]


def test_a_server_whose_engine_has_ended_ends(system: Any) -> None:
    engine = BatchedEngine(system)
    server = Server(make_app(system, engine), engine, WebSettings())
    engine.close(0.0)
    with pytest.raises(BayesDispatchError, match="expected an engine that runs"):
        server.serve_on(listen("127.0.0.1", 0))


def test_copies_of_a_prompt_differ(served: Served, system: Any) -> None:
    """Each is that of a seed of its own."""
    asked = {"model": "bundle:base", "temperature": 1, "max_tokens": 8, "seed": 7}
    found = served.http.post("/v1/completions", json=asked | {"prompt": ["ab>", "1+", "ab>"]}).json()
    seeds = [each["seed"] for each in found["dispatch"]]
    assert seeds == [7, 7, 8]
    generator = TwoPassGenerator(system)
    for choice, seed, prompt in zip(found["choices"], seeds, ["ab>", "1+", "ab>"], strict=True):
        alone = generator.generate([prompt], blend="base", max_new_tokens=8, do_sample=True, seed=seed)
        assert choice["text"] == alone.texts[0]


def test_the_first_of_many_faults_is_enough(served: Served) -> None:
    answer = served.http.post("/v1/chat/completions", json={"model": "bundle", "messages": [{}] * 4000})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].role"


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """``TCP_NODELAY`` of what a listening socket accepts: a head and its body are two packets."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
