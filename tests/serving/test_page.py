"""The page at ``/`` in a headless Chromium: it shows what the API answers, a column of weights for each token, and what
is refused; it asks nobody else for anything, and fits a phone."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest

from bayes_dispatch.inference.two_pass.blends import BLENDS, as_blend
from tests.serving.chromium import FOUND, Browser, browsing
from tests.serving.process import ServerProcess, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="needs Chromium (Debian: apt install chromium)"),
]
PROMPT = "kfpa>lgab\nmold>npme\nhbme>"
WIDTHS = {"desktop": (1280, 900), "tablet": (800, 1000), "phone": (390, 844)}
KEY = "a-key-of-enough-letters"
TEXT = "[...document.querySelectorAll('#text span')].map(span => span.textContent)"
COLUMNS = "[...document.querySelectorAll('#text span')].map(span => span.style.backgroundImage)"
OVER = "!document.querySelector('#write').disabled"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, server: ServerProcess) -> Browser:
    """At the page, which knows the models."""
    chromium.see(*WIDTHS["desktop"])
    chromium.open(f"{server.url}/")
    chromium.until("document.querySelectorAll('#model option').length > 1")
    chromium.events.clear()
    return chromium


def ask(browser: Browser, prompt: str = PROMPT, **fields: Any) -> None:
    """Fill in the form and press its button."""
    browser.get("document.querySelector('#settings').open = true")
    browser.type("#prompt", prompt)
    for name, value in fields.items():
        browser.type(f"#{name}", str(value))
    browser.click("#write")


def text_of(browser: Browser, selector: str) -> str:
    return browser.get(f"document.querySelector('{selector}').innerText")


@pytest.mark.parametrize("way", ["completions", "chat/completions"])
def test_it_shows_what_the_api_answers(browser: Browser, server: ServerProcess, way: str) -> None:
    """The text, a column for each token of the weights before it, the posterior, and the gate's word."""
    given = {"max_tokens": 40, "temperature": 1.2, "seed": 3, "false_alarm_rate": 0.05}
    browser.get(f"document.querySelector('#way').value = '{way}'")
    ask(browser, **given)
    browser.until(OVER)
    chat = way != "completions"
    asked = {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True}
    asked = asked if chat else {"prompt": PROMPT, "logprobs": 0}
    answer = httpx2.post(f"{server.url}/v1/{way}", json={"model": "bundle"} | given | asked, timeout=60).json()
    (choice,), dispatch = answer["choices"], answer["dispatch"]
    assert "".join(browser.get(TEXT)) == (choice["message"]["content"] if chat else choice["text"])
    weights = [each["weights"] for each in choice["logprobs"]["content"]] if chat else choice["logprobs"]["weights"]
    columns = browser.get(COLUMNS)
    assert len(columns) == len(weights) > 3
    for column, expected in zip(columns, weights, strict=True):
        ends = re.findall(r"var\(--c\d\) [\d.e-]+% ([\d.e-]+)%", column.partition("), linear")[0])
        assert np.diff([0.0, *map(float, ends)]) / 100 == pytest.approx(np.array(expected), abs=1e-5)
    shown = browser.get("[...document.querySelectorAll('#rows tr:not([hidden]) th')].map(each => each.textContent)")
    order = sorted(range(len(dispatch["mean"])), key=lambda k: -dispatch["mean"][k])
    assert shown[0] == dispatch["experts"][order[0]]
    assert f"p-value {dispatch['p_value']:.4f}" in text_of(browser, "#gate")
    assert "Seed 3" in text_of(browser, "#status")
    assert browser.complaints == []


def test_the_slider_tells_of_a_token(browser: Browser) -> None:
    """By keyboard, as by mouse; also to who does not see it."""
    ask(browser, max_tokens=6, seed=1)
    browser.until(OVER)
    tokens = browser.get(TEXT)
    browser.get("document.querySelector('#at').focus()")
    for _ in range(2):
        browser.press("ArrowLeft", 37)
    value = browser.get("document.querySelector('#at').ariaValueText")
    assert value.startswith(f'{len(tokens) - 2} of {len(tokens)}: "{tokens[-3]}"')
    browser.click("#text span")
    assert text_of(browser, "#here").startswith(f'1 of {len(tokens)}: "{tokens[0]}"')
    assert browser.get("document.querySelectorAll('#text [aria-current]').length") == 1


def test_stop_ends_the_request(browser: Browser, server: ServerProcess) -> None:
    """At the server, too: its rows are free, and it has not written what was asked for."""
    ask(browser, max_tokens=1000, seed=5)
    browser.until("document.querySelectorAll('#text span').length > 3")
    browser.click("#stop")
    browser.until(OVER)
    assert text_of(browser, "#status").startswith("Stopped after")
    assert text_of(browser, "#error") == ""
    browser.until("fetch('/metrics').then(r => r.text()).then(t => /^bayes_dispatch_rows 0/m.test(t))")
    (told,) = [each for each in server.lines if each.get("endpoint") == "/v1/completions"][-1:]
    assert 3 < told["new_tokens"] < 1000


def test_a_refusal_in_the_servers_words(browser: Browser, server: ServerProcess) -> None:
    """At the field that is at fault; and the next request is as good as ever."""
    ask(browser, max_tokens=10**6)
    browser.until(OVER)
    asked = {"model": "bundle", "prompt": PROMPT, "max_tokens": 10**6}
    expected = httpx2.post(f"{server.url}/v1/completions", json=asked).json()["error"]["message"]
    assert text_of(browser, "#error") == expected
    assert browser.get("document.querySelector('#error').getAttribute('role')") == "alert"
    assert browser.get("document.querySelector('[aria-invalid]').id") == "max_tokens"
    ask(browser, max_tokens=2)
    browser.until(OVER)
    assert text_of(browser, "#error") == ""
    assert len(browser.get(TEXT)) > 0


def test_what_is_written_stays_text(browser: Browser) -> None:
    """Markup is shown as it stands, and the policy would let none of it act."""
    markup = "<img src=x onerror=alert(1)><b>"
    event = '{"error": {"message": "' + markup + '"}}'
    browser.get(f"fetch = async () => new Response({event!r}, {{status: 400}})")
    ask(browser)
    browser.until(OVER)
    assert text_of(browser, "#error") == markup
    assert browser.get("document.querySelectorAll('#error *').length") == 0
    refused = "(() => { try { document.body.innerHTML = '<b>'; return 'made'; } catch (e) { return e.name; } })()"
    assert browser.get(refused) == "TypeError"


def test_what_an_engine_does_not_know_is_said_so(browser: Browser) -> None:
    """The text and its weights are there; its shade is none."""
    logprobs = {"tokens": ["a"], "token_logprobs": [-1.0], "mutual_information": [None], "weights": [[0.25, 0.75]]}
    dispatch = {"experts": ["b", "base"], "mean": [0.5, 0.5], "interval_90": [[0, 1], [0, 1]], "p_value": None}
    chunks = [
        {"choices": [], "dispatch": dispatch | {"foreign": False, "blend": "b", "seed": 1}},
        {"choices": [{"text": "a", "logprobs": logprobs, "finish_reason": "length"}]},
    ]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    browser.get(f"fetch = async () => new Response({json.dumps(stream)})")
    ask(browser)
    browser.until(OVER)
    assert browser.get(TEXT) == ["a"]
    assert text_of(browser, "#here").endswith("mutual information not known")
    assert "--unsure-most) * 0)" in browser.get(COLUMNS)[0].replace("0.000", "0")
    assert browser.complaints == []


def test_it_loads_nothing_else(browser: Browser, server: ServerProcess) -> None:
    """One document; all else that it asks is this server's API."""
    browser.open(f"{server.url}/")
    browser.until("document.querySelectorAll('#model option').length > 1")
    ask(browser, max_tokens=2)
    browser.until(OVER)
    asked = [url for url in browser.asked if not url.startswith("data:")]
    assert asked == [f"{server.url}/", f"{server.url}/v1/models", f"{server.url}/v1/completions"]
    assert browser.complaints == []
    elsewhere = "fetch('https://example.org/').then(() => 'asked', error => error.name)"
    assert browser.get(elsewhere) == "TypeError"
    assert any("Content Security Policy" in str(each) for each in browser.complaints)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", list(WIDTHS))
def test_it_fits(browser: Browser, server: ServerProcess, size: str, dark: bool) -> None:
    """Nothing scrolls sideways, with a long text that has long lines; everything that is to be pressed has a name."""
    browser.see(*WIDTHS[size], dark)
    ask(browser, f"{'a' * 300}>", max_tokens=200, temperature=2, seed=2)
    browser.until(OVER)
    width, _ = WIDTHS[size]
    assert browser.get("document.documentElement.scrollWidth") <= width
    for element in ("#text", "#rows", "#form"):
        assert browser.get(f"document.querySelector('{element}').getBoundingClientRect().right") <= width
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    of_use = ("button", "textbox", "spinbutton", "combobox", "checkbox", "slider", "DisclosureTriangle")
    roles = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
    found = [(role, name) for role, name in roles if role in of_use]
    assert {role for role, _ in found} >= {"button", "textbox", "spinbutton", "slider"}
    assert all(name for _, name in found), found


def test_a_server_with_keys_is_asked_with_one(chromium: Browser) -> None:
    """The page itself needs none; what it asks for does, and it says so."""
    with serving(BAYES_DISPATCH_KEYS=f"ann:{KEY}") as server:
        chromium.see(*WIDTHS["desktop"])
        chromium.open(f"{server.url}/")
        chromium.until("!document.querySelector('#key-field').hidden")
        ask(chromium, max_tokens=2)
        chromium.until(OVER)
        assert text_of(chromium, "#error").startswith("expected an API key")
        chromium.type("#key", KEY)
        ask(chromium, max_tokens=2)
        chromium.until(f"{OVER} && document.querySelectorAll('#model option').length > 1")
        assert text_of(chromium, "#error") == ""
        assert len(chromium.get(TEXT)) > 0


def test_its_blends_are_known(browser: Browser) -> None:
    named = browser.get("[...document.querySelectorAll('#blends option')].map(each => each.value)")
    assert {type(as_blend(name)) for name in named} == set(BLENDS.values())
