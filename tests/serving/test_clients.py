"""`bayes-dispatch serve` as a process: clients that others wrote work unchanged, what is too much is refused, and
signals end it as they should."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from tests.serving.process import ServerProcess, serving

pytestmark = pytest.mark.slow
PROMPT = "kfpa>lgab\nmold>npme\nhbme>"
GREEDY: dict[str, Any] = {"model": "bundle", "prompt": PROMPT, "temperature": 0, "seed": 1, "max_tokens": 6}
LONG = GREEDY | {"max_tokens": 1000, "stream": True, "temperature": 1.5}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One that writes one text at a time, and lets one wait."""
    with serving("--running", "1", "--waiting", "1", "--header-bytes", "2048") as found:
        yield found


def until(so: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gauge(server: ServerProcess, name: str) -> float:
    lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"bayes_dispatch_{name} ")))


def answer_of(server: ServerProcess) -> Any:
    return httpx2.post(f"{server.url}/v1/completions", json=GREEDY, timeout=60).json()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: ServerProcess) -> None:
    """A completion, and a stream that is the same text."""

    def curl(fields: dict[str, Any]) -> str:
        post = ["-H", "content-type: application/json", "-d", json.dumps(fields), f"{server.url}/v1/completions"]
        return subprocess.run(["curl", "-sSfN", *post], capture_output=True, text=True, check=True).stdout

    text = json.loads(curl(GREEDY))["choices"][0]["text"]
    assert text == answer_of(server)["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in curl(GREEDY | {"stream": True}).splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == text


def test_langchain(server: ServerProcess) -> None:
    """``invoke``, ``stream`` and ``batch`` of its chat model; what is ours comes through ``extra_body``."""
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai, which no extra installs")
    common: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 8}
    asked = {"model": "bundle", "messages": [{"role": "user", "content": PROMPT}], "blend": "top_k(3)"}
    told = httpx2.post(f"{server.url}/v1/chat/completions", json=asked | common, timeout=60).json()
    expected = told["choices"][0]["message"]["content"]
    chat = langchain.ChatOpenAI(
        model="bundle",
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        extra_body={"blend": "top_k(3)"},
        **common,
    )
    answer = chat.invoke(PROMPT)
    assert (answer.content, answer.response_metadata["finish_reason"]) == (expected, "stop")
    assert answer.usage_metadata["output_tokens"] == told["usage"]["completion_tokens"]
    assert "".join(chunk.content for chunk in chat.stream(PROMPT)) == expected
    assert [each.content for each in chat.batch([PROMPT, PROMPT], {"max_concurrency": 1})] == [expected] * 2


def test_a_full_queue_is_told(server: ServerProcess) -> None:
    """With 429, and when to come again; what had a place keeps it."""
    with ThreadPoolExecutor(1) as pool:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as first:
            lines = first.iter_lines()  # whose end would hang up
            next(lines)
            second = pool.submit(answer_of, server)
            until(lambda: gauge(server, "waiting") == 1)
            third = httpx2.post(f"{server.url}/v1/completions", json=GREEDY)
        assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(third.headers["retry-after"]) >= 1
        assert second.result()["choices"][0]["finish_reason"] == "length"


def test_headers_that_are_too_large(server: ServerProcess) -> None:
    """Are refused in OpenAI's shape, though they come at once; those below the bound are not."""
    url = f"{server.url}/v1/models"
    assert httpx2.get(url, headers={"x-more": "a" * 1000}).status_code == 200
    for answer in (httpx2.get(url, headers={"x-more": "a" * 3000}), httpx2.get(f"{url}?{'a' * 3000}")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (431, "too_large")
    assert httpx2.get(url).status_code == 200


def test_told_to_stop_it_drains() -> None:
    """What runs is written to its end, what comes late gets 503, and the exit code is 0."""
    with serving("--drain", "300") as server:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            server.tell(signal.SIGTERM)
            until(lambda: httpx2.get(f"{server.url}/ready").status_code == 503)
            late = httpx2.post(f"{server.url}/v1/completions", json=GREEDY)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "closing")
            *_, last, done = lines
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
        assert done == "data: [DONE]"
        assert server.ended() == 0


def test_told_twice_it_ends_at_once() -> None:
    """What runs is cut off: it would have had many minutes to end."""
    with serving("--drain", "3000") as server:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            server.tell(signal.SIGINT)
            until(lambda: any(line["event"] == "draining" for line in server.lines))
            server.tell(signal.SIGTERM)
            code = server.ended()
            rest: list[str] = []
            with suppress(httpx2.RemoteProtocolError):
                rest.extend(lines)
        assert "data: [DONE]" not in rest
        assert len(rest) < 1000
        assert code == 0
        assert [line["requests"] for line in server.lines if line["event"] == "cut off"] == [1]
        assert {line["level"] for line in server.lines} == {"info", "warning"}
        assert server.said == []
